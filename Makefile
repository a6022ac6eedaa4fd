# Two commands: `make reproduce` and `make test`. Both need only Python >= 3.11 and make; the rest goes to .venv.
# PROFILE is a folder of workflows/profiles: default, gpu or slurm. CORES takes fewer cores than there are.
# QUICK=1: the figures of the paper with two seeds, marked as such, in the folder quick/ beside the full results.
PYTHON ?= python3
PROFILE ?= default
CORES ?=
QUICK ?=
BIN := .venv/bin
SNAKEMAKE = $(BIN)/snakemake $(if $(CORES),--cores $(CORES)) --workflow-profile workflows/profiles
QUICKLY = $(if $(QUICK),--directory quick --config quick=true)
SMK := Snakefile workflows/rules

.PHONY: help setup compile reproduce smoke real-vllm gpu test test-compiled wheel-test clients digests soak lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: .venv/installed  ## build .venv from requirements.txt, once, and the compiled core if it can; says which core it is
	@$(BIN)/python tools/compile_core.py

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

compile: setup  ## compile the core again after its sources have changed (docs/architecture.md); setup does it too

reproduce: setup  ## run every experiment, draw every figure (figures/), write results/report.html
	@$(SNAKEMAKE)/$(PROFILE) $(QUICKLY); status=$$?; \
	  $(SNAKEMAKE)/$(PROFILE) $(QUICKLY) --report results/report.html $$([ $$status = 0 ] || echo written) || exit; \
	  [ $$status = 0 ] || echo "error: a job failed, as said above; results/report.html shows all others" >&2; \
	  exit $$status

smoke: setup  ## the same pipeline on a few small points
	$(SNAKEMAKE)/smoke -- smoke

real-vllm: setup  ## install vLLM into .venv-vllm and measure it beside our server (docs/real-vllm.md)
	$(SNAKEMAKE)/$(PROFILE) real-vllm

gpu:  ## what needs a GPU, on a machine with one: kernel tests, profile, benchmarks, recorded runs (docs/cluster.md)
	@PYTHONPATH=system:workflows:. $(PYTHON) tools/gpu_session.py $(GPU_OPTIONS)

test: setup  ## run the tests, in pure Python, where a method of an object can be replaced
	FASTSERVE_PURE=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-compiled: setup  ## the tests of decisions and units again, with the compiled core
	$(BIN)/python -m pytest -n auto --dist worksteal tests/decisions tests/unit

wheel-test: setup  ## install the wheel into an empty environment and run its commands from another folder
	$(BIN)/python -m pytest tests/workflow/test_installed.py --empty-environment

digests: setup  ## write tests/decisions/digests.json anew: every policy's decisions, hashed
	PYTHONPATH=tests $(BIN)/python -m support.decisions

clients: setup .venv-clients/installed  ## drive the server with other projects' clients (requirements-clients.txt)
	$(BIN)/python -m pytest -n auto --dist loadfile tests/clients

.venv-clients/installed: requirements-clients.txt | setup
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt
	@touch $@

soak: setup  ## the invariants on 100,000 generated scenarios, for an hour or so
	$(BIN)/python -m pytest -n auto tests/invariants --hypothesis-profile=soak

lint: setup  ## ruff, mypy, snakemake --lint, snakefmt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakemake --lint
	$(BIN)/snakefmt --check $(SMK)

format: setup  ## format Python and Snakemake files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt $(SMK)

bench: setup  ## speed of the simulator, of decisions, of reading traces, of the CPU engine, its swapping, its ranks and the server, printed
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/traces.py
	$(BIN)/python benchmarks/cpu_engine.py
	$(BIN)/python benchmarks/swapping.py
	$(BIN)/python benchmarks/control_channel.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/server_soak.py

clean:  ## remove what runs wrote, keep recorded results and .venv
	rm -rf .snakemake quick
	find results figures -mindepth 1 -maxdepth 1 ! -name recorded ! -name README.md -exec rm -rf {} +
