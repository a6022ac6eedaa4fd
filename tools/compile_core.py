"""Compile the core of `fastserve` with mypyc, in place: `make compile`; setup.py does so for a wheel.

Prints one line that says which core is there now, and why it is pure Python, if it is. Compiles nothing if the sources
have not changed since the last time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

MODULES = (
    "core.clock",
    "core.request",
    "engine.arrivals",
    "engine.engine",
    "engine.executor",
    "engine.iteration_log",
    "engine.job",
    "engine.lookahead",
    "engine.records",
    "kvcache.block_pool",
    "kvcache.manager",
    "kvcache.oldest_first_pool",
    "kvcache.prefix_cache",
    "latency.base",
    "latency.fitted",
    "latency.kernel_latency",
    "latency.pipelined",
    "latency.with_engine_time",
    "policies.enst",
    "policies.fcfs",
    "policies.gittins.index",
    "policies.gittins.lengths",
    "policies.gittins.policy",
    "policies.gittins.queue",
    "policies.skip_join_mlfq",
    "scheduler.batch",
    "scheduler.iteration",
    "scheduler.moving.ahead",
    "scheduler.moving.base",
    "scheduler.moving.never",
    "scheduler.moving.on_demand",
    "scheduler.need",
    "scheduler.policy",
    "scheduler.queue",
    "scheduler.scheduler",
    "scheduler.waiting",
    "simulation.executor",
    "simulation.range_guard",
)
"""Modules of `fastserve` in which a simulation spends its time. docs/architecture.md says what mypyc asks of them."""

SYSTEM = Path(__file__).resolve().parents[1] / "system"
GROUP = "fastserve"
COMPILED = "core: compiled"
MYPY_CONFIGURATION = f"""\
[mypy]
mypy_path = {SYSTEM}
explicit_package_bases = True
namespace_packages = True
# The same result whatever is installed, in an environment for building too.
no_site_packages = True
ignore_missing_imports = True
follow_imports = silent
"""


def compile_core() -> str:
    """Make the compiled core what the sources say, or remove it. Returns the line that says which core is there."""
    loading = _loading()
    if loading.is_forced_pure():
        shutil.rmtree(loading.FOLDER, ignore_errors=True)
        return f"core: pure Python ({loading.PURE_VARIABLE} is set)"
    if not _is_current(loading):
        shutil.rmtree(loading.FOLDER, ignore_errors=True)
        try:
            _compile(loading)
        except CompileError as error:
            return f"core: pure Python ({error})"
    return COMPILED


class CompileError(Exception):
    """Why nothing was compiled."""


def _loading() -> ModuleType:
    """fastserve.core.compiled, without `fastserve`, which may need packages that are not there yet."""
    spec = importlib.util.spec_from_file_location("_loading", SYSTEM / "fastserve/core/compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_current(loading: ModuleType) -> bool:
    manifest = loading.manifest()
    if manifest is None:
        return False
    return list(manifest["sources"]) == _names() and not loading.changed_sources(manifest["sources"])


def _names() -> list[str]:
    return [f"fastserve.{module}" for module in MODULES]


def _compile(loading: ModuleType) -> None:
    """Compile in a temporary folder, gather the modules beside their place, and put them there all at once."""
    compiler = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    if os.name != "nt" and not shutil.which(os.environ.get("CC", compiler).split()[0]):
        raise CompileError(f"no C compiler: {compiler} is not installed")
    if importlib.util.find_spec("mypyc") is None:
        raise CompileError("mypy is not installed")
    sources = {name: loading.source_digest(name) for name in _names()}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # A process of its own: mypyc ends the process when it finds an error.
        command = [sys.executable, __file__, "--into", name]
        done = subprocess.run(command, cwd=SYSTEM, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, sep="", file=sys.stderr)
            raise CompileError("mypyc or the C compiler failed; its messages are above")
        staging = loading.FOLDER.with_name(f"{loading.FOLDER.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        files = {module: f"{module}{loading.SUFFIX}" for module in (f"{GROUP}__mypyc", *_names())}
        for module, file in files.items():
            shutil.move(work / "lib" / f"{module.replace('.', '/')}{loading.SUFFIX}", staging / file)
        manifest = {"suffix": loading.SUFFIX, "sources": sources, "files": files}
        (staging / loading.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        staging.rename(loading.FOLDER)


def _build(work: Path) -> None:
    """Write C, and compile it. The paths of sources are relative to the current folder, `system`."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    configuration = work / "mypy.ini"
    configuration.write_text(f"{MYPY_CONFIGURATION}cache_dir = {work / 'cache'}\n", encoding="utf-8")
    sources = [f"{name.replace('.', '/')}.py" for name in _names()]
    extensions = mypycify(
        ["--config-file", str(configuration), *sources],
        opt_level="3",
        debug_level="0",
        group_name=GROUP,
        target_dir=str(work / "c"),
    )
    for extension in extensions:
        extension.extra_compile_args.append("-ffp-contract=off")  # A fused product and sum would round otherwise.
    command = Distribution({"name": GROUP, "ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(work / "lib"), str(work / "objects")
    command.ensure_finalized()
    with contextlib.redirect_stdout(io.StringIO()):
        command.run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--into"]:
        _build(Path(sys.argv[2]))
    else:
        print(compile_core())
