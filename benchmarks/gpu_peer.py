"""Output tokens per second beside transformers' continuous batching: the same requests, weights and machine, in turns.

Requests of ShareGPT's lengths (outputs cut at --max-output), all there from the start, decoded greedily to exactly
their lengths. The peer is what `generate_batch` runs on, its manager, since only that takes a length for each request.
It gets the very tensors of our model, a cache that holds all requests at once and as many requests in a batch, no
sharing of prefixes (there are none), and its default attention: flash-attention where that is installed, else SDPA. It
runs as it is by default and with CUDA graphs and asynchronous batching; the best of all its runs counts. Neither
system's start and warm-up do.

If the peer fails, its error is written beside our numbers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from _gpu import engine_on, parser, run_benchmark, table, verdict
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from fastserve import SamplingParams
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.runtime.models import Part, empty_model
from fastserve.runtime.models.loader import dummy_weights
from fastserve.runtime.worker import Worker
from harness.workload.arrivals import AT_ONCE
from harness.workload.workload import make_workload

POLICIES = ("fastserve-fcfs", "fastserve")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "CUDA graphs, asynchronous": {"use_cuda_graph": True, "use_async_batching": True},
}
"""Of the peer. On a CPU it takes the second as the first, so only that is run."""
TARGET = 2.0
BLOCK_SIZE, PAGE_SIZE, MAX_BATCH_TOKENS = 16, 256, {"cuda": 8192, "cpu": 512}
"""The peer's page, and the tokens of its batch, are its defaults on a GPU."""
REQUESTS, BATCHES, MAX_OUTPUT = {"cuda": 128, "cpu": 8}, {"cuda": (64, 128), "cpu": (4, 8)}, {"cuda": 128, "cpu": 12}

Tokens = list[list[int]]


@dataclass(frozen=True)
class Requests:
    """What is to be served."""

    prompts: Tokens
    output_lens: list[int]

    @property
    def num_output_tokens(self) -> int:
        """Of all."""
        return sum(self.output_lens)

    def pages(self, size: int) -> int:
        """Pages of `size` tokens for all of them at once."""
        lengths = zip(self.prompts, self.output_lens, strict=True)
        return sum(-(-(len(prompt) + output) // size) for prompt, output in lengths)

    def shortened(self, max_output: int) -> Requests:
        """The same with outputs of no more tokens, to warm up."""
        return Requests(self.prompts, [min(max_output, output) for output in self.output_lens])


def make_requests(config: ModelConfig, count: int, max_output: int) -> Requests:
    """Lengths of the built-in ShareGPT, seed 0."""
    workload = make_workload("sharegpt", "poisson", AT_ONCE, count, 0)
    prompts = [workload.prompt_token_ids(i, config.vocab_size) for i in range(count)]
    return Requests(prompts, [min(max_output, length) for length in workload.output_tokens.tolist()])


# -- the two systems -------------------------------------------------------------------------------------------------


def serve(
    arguments: argparse.Namespace, worker: Worker, policy: str, batch: int, requests: Requests
) -> tuple[float, Tokens]:
    """Seconds and tokens of our engine."""
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in requests.output_lens]
    with engine_on(worker, arguments, policy, batch) as llm:
        began = time.perf_counter()
        outputs = llm.generate(prompt_token_ids=requests.prompts, sampling_params=params)
        return time.perf_counter() - began, [output.token_ids for output in outputs]


def peer_model(worker: Worker) -> OPTForCausalLM:
    """Transformers' model around the tensors of ours."""
    config, dtype = worker.model.config, worker.gpu_cache.dtype
    with torch.device("meta"):
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                word_embed_proj_dim=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                ffn_dim=config.intermediate_size,
                max_position_embeddings=config.max_model_len,
                do_layer_norm_before=True,
                eos_token_id=None,
                dtype=dtype,
                attn_implementation="sdpa",
            )
        )
    source = worker.model
    if worker.device.type == "cpu":  # Ours may be packed there, and cannot be read: the same once more.
        source = empty_model(Part.whole(config, dtype, worker.device))
        dummy_weights(source, 0)
    tensors = {weight.name: weight.target for weight in source.weights()}
    tensors["lm_head.weight"] = source.embedding
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


@contextmanager
def peer_manager(model: OPTForCausalLM, requests: Requests, options: dict[str, Any]) -> Iterator[Any]:
    """A manager of the peer, started and with its graphs captured."""
    longest = max(requests.output_lens)
    hints = WorkloadHints(
        max_prompt_length=max(map(len, requests.prompts)),
        max_generated_length=longest,
        num_requests=len(requests.prompts),
    )
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=requests.pages(PAGE_SIZE) + 1,
            max_batch_tokens=MAX_BATCH_TOKENS[model.device.type],
            allow_block_sharing=False,
            **options,
        ),
        timeout=5,
        workload_hints=hints,
    ) as manager:
        yield manager


def peer_serve(manager: Any, requests: Requests, timeout_s: float) -> tuple[float, Tokens]:
    """Seconds and tokens of the peer; RuntimeError if it fails or takes longer than `timeout_s`."""
    began = time.perf_counter()
    ids = [
        manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        for prompt, length in zip(requests.prompts, requests.output_lens, strict=True)
    ]
    tokens: dict[str, list[int]] = {}
    while len(tokens) < len(ids):
        result = manager.get_result(timeout=1)
        if result is not None and result.error:
            raise RuntimeError(f"request {result.request_id}: {result.error}")
        if result is not None and result.is_finished():
            tokens[result.request_id] = list(result.generated_tokens)
        elif not manager.is_running():
            raise RuntimeError(f"its thread has ended: {manager.background_thread_status.fatal_error!r}")
        elif time.perf_counter() - began > timeout_s:
            raise RuntimeError(f"{len(ids) - len(tokens)} of {len(ids)} requests unfinished after {timeout_s:g} s")
    seconds = time.perf_counter() - began
    outputs = [tokens[request_id] for request_id in ids]
    if [len(output) for output in outputs] != requests.output_lens:
        raise RuntimeError("it generated other numbers of tokens than asked for")
    return seconds, outputs


# -- the comparison --------------------------------------------------------------------------------------------------


class Comparison:
    """Both systems' runs, one after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        kind = torch.device(arguments.device).type
        config = preset(arguments.model)
        if config.architecture != "opt":
            raise ConfigError(f"--model {arguments.model}: the peer is built for OPT only; choose one of its presets")
        self.arguments = arguments
        self.requests = make_requests(
            config, arguments.num_requests or REQUESTS[kind], arguments.max_output or MAX_OUTPUT[kind]
        )
        self.worker = Worker(
            config,
            num_gpu_blocks=self.requests.pages(BLOCK_SIZE),
            num_host_blocks=64,
            block_size=BLOCK_SIZE,
            device=arguments.device,
            dtype=arguments.dtype,
            max_batch_size=max(BATCHES[kind]),
        )
        self.ours: dict[tuple[str, int], list[float]] = {
            (policy, batch): [] for batch in BATCHES[kind] for policy in POLICIES
        }
        self.settings = list(SETTINGS)[: None if kind == "cuda" else 1]
        self.peers: dict[str, list[float]] = {setting: [] for setting in self.settings}
        self.errors: dict[str, str] = {}
        self.tokens: Tokens = []
        self.peer_tokens: Tokens = []

    def run(self) -> None:
        """Everything. Each of ours runs once before, since a GPU may be of no use after a peer's failure, and then
        beside the peer or, what should have run beside one that failed, after it."""
        for policy, batch in self.ours:
            serve(self.arguments, self.worker, policy, batch, self.requests.shortened(4))
        variants = list(self.ours)
        for variant in variants:
            self._run_ours(variant)
        for i, setting in enumerate(self.settings):
            try:
                self._beside(setting, variants[i :: len(self.settings)])
            except Exception as error:  # Of the peer's own kinds, and out of memory.
                self.errors[setting] = "".join(traceback.format_exception(error))
                print(f"transformers, {setting}: failed: {error}", flush=True)
            gc.collect()
            if self.worker.device.type == "cuda":
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()
        try:
            for variant, seconds in self.ours.items():
                while len(seconds) < self.arguments.repeats:
                    self._run_ours(variant)
        except RuntimeError as error:
            if not self.errors:
                raise
            print(f"after that our engine could not run either: {error}", flush=True)

    def _beside(self, setting: str, variants: Sequence[tuple[str, int]]) -> None:
        with peer_manager(peer_model(self.worker), self.requests, SETTINGS[setting]) as manager:
            peer_serve(manager, self.requests.shortened(4), self.arguments.peer_timeout)
            for _ in range(self.arguments.repeats):
                seconds, self.peer_tokens = peer_serve(manager, self.requests, self.arguments.peer_timeout)
                self.peers[setting].append(seconds)
                for variant in variants:
                    if len(self.ours[variant]) < self.arguments.repeats:
                        self._run_ours(variant)

    def _run_ours(self, variant: tuple[str, int]) -> None:
        seconds, self.tokens = serve(self.arguments, self.worker, *variant, self.requests)
        self.ours[variant].append(seconds)


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the table."""
    comparison = Comparison(arguments)
    comparison.run()
    requests = comparison.requests
    total = requests.num_output_tokens
    num_prompt_tokens = sum(map(len, requests.prompts))
    print(
        f"{arguments.model} in {arguments.dtype}: {len(requests.prompts)} requests, {num_prompt_tokens} prompt tokens, "
        f"{total} output tokens; transformers {transformers.__version__}"
    )
    best = max((total / seconds for runs in comparison.peers.values() for seconds in runs), default=None)
    ours, rows = [], []
    for (policy, batch), runs in comparison.ours.items():
        rate = total / statistics.median(runs)
        ratio = None if best is None else rate / best
        ours.append({"policy": policy, "max_batch_size": batch, "seconds": runs, "tokens_per_s": rate, "ratio": ratio})
        rows.append((f"{policy}, batch {batch}", *_columns(runs, rate), "-" if ratio is None else f"{ratio:.2f}"))
    peers = []
    for setting, runs in comparison.peers.items():
        rate = total / min(runs) if runs else None
        error = comparison.errors.get(setting)
        peers.append({"setting": setting, "seconds": runs, "tokens_per_s": rate, "error": error})
        rows.append((f"transformers, {setting}", *_columns(runs, rate), "failed" if error else "-"))
    table(("", "runs, s", "tokens/s", "x peer"), rows)
    equal = sum(a == b for a, b in zip(comparison.tokens, comparison.peer_tokens, strict=False))
    targets = []
    if best is not None:
        print(f"{equal} of {len(requests.prompts)} outputs equal; in float16 sums in another order may differ early")
        rate = max(one["tokens_per_s"] for one in ours)
        targets.append(verdict("best of ours over the best of the peer", rate / best, TARGET, at_most=False))
    return {
        "requests": len(requests.prompts),
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": total,
        "ours": ours,
        "transformers": {"version": transformers.__version__, "runs": peers, "equal_outputs": equal},
        "targets": targets,
    }


def _columns(runs: Sequence[float], rate: float | None) -> tuple[str, str]:
    return " ".join(f"{seconds:.2f}" for seconds in runs), "-" if rate is None else f"{rate:.0f}"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--num-requests", type=int, help="(default: 128, on a CPU 8)")
    options.add_argument("--max-output", type=int, help="tokens (default: 128, on a CPU 12)")
    options.add_argument("--repeats", type=int, default=2, help="runs of each (default: %(default)s)")
    options.add_argument("--peer-timeout", type=float, default=60.0, help="seconds of a run (default: %(default)s)")
    run_benchmark(options, benchmark)
