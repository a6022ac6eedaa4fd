"""Output tokens per second of the whole engine against vLLM's offline one, one compute thread each, side by side.

OPT-125m's shape and a Llama's (12 layers of 768, 4 of 12 heads for keys and values) with the same random weights; 32
requests of 128 prompt tokens and 64 output tokens, greedy, batches of up to 16, no prefixes shared. vLLM runs in
processes of its own, by the interpreter of an environment of its own, which `make real-vllm` installs. The two take
turns, and vLLM's processes, one of which keeps a core busy even when there is nothing to do, are stopped while it is
not their turn. Medians and the ratios of pairs are what counts. vLLM takes about a minute to start, for each model and
dtype.

With --profile our engine alone is run, and where its time goes is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _cpu import BATCH, OUTPUT, PROMPT, Tokens, compare, engine_run, make_prompts, take_turns

from fastserve import LLM
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.runtime.kernels import torch_kernels
from fastserve.runtime.models.layers import Linear
from fastserve.runtime.worker import Worker, worker
from harness.studies.model_folder import write_model_folder

ROOT = Path(__file__).parents[1]
POLICIES = ("fastserve-fcfs", "vllm")
MODELS: dict[str, dict[str, Any]] = {
    "opt": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50_272, "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32_000, "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
LAST_LINES = 20


class Vllm:
    """vLLM in processes of its own, which stand still but for their turns.

    Raises ConfigError, with the last lines that it wrote, where it cannot be started or ends.
    """

    def __init__(self, python: Path, model: Path, dtype: str) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with it)
        variables = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
            "VLLM_CACHE_ROOT": str(python.parents[1] / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [python, Path(__file__).parent / "_vllm_offline.py"],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        settings = {
            "model": str(model),
            "dtype": dtype,
            "max_num_seqs": BATCH,
            "max_num_batched_tokens": 2048,  # Ours.
            "max_model_len": 2 * (PROMPT + OUTPUT),
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
        }
        try:
            self.version = self._ask(settings)["version"]
        except BaseException:
            self.close()
            raise

    def run(self, prompts: Tokens) -> tuple[float, Tokens]:
        """Its turn."""
        answer = self._ask({"prompts": prompts, "max_tokens": OUTPUT})
        return answer["seconds"], answer["outputs"]

    def close(self) -> None:
        """End all processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, content: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            os.killpg(self._process.pid, signal.SIGCONT)
            print(json.dumps(content), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline())
            os.killpg(self._process.pid, signal.SIGSTOP)
        except (OSError, ValueError):
            self._log.seek(0)
            last = "".join(f"\n  {line.rstrip()}" for line in self._log.readlines()[-LAST_LINES:])
            raise ConfigError(f"vLLM cannot be run by {self._process.args[0]}; it ended with:{last}") from None
        return answer


class Stopwatch:
    """What the parts of our engine's iterations take, of those with prompts and of those without."""

    def __init__(self) -> None:
        self.seconds: dict[str, Counter[str]] = {"prompts": Counter(), "decodes": Counter()}
        self._kind = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, all that engines of this process compute counts."""
        with ExitStack() as stack:
            for part, owner, name in (
                ("matrix products", Linear, "library"),
                ("attention", torch_kernels, "paged_attention"),
                ("storing keys and values", torch_kernels, "store_kv"),
                ("sampling", worker, "sample"),
                ("all", Worker, "_compute"),
            ):
                stack.enter_context(mock.patch.object(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if part == "all":
                self._kind = "decodes" if all(len(one.token_ids) == 1 for one in arguments[1]) else "prompts"
            began = time.perf_counter()
            result = function(*arguments)
            self.seconds[self._kind][part] += time.perf_counter() - began
            return result

        return call

    def print(self, label: str, run_s: float) -> None:
        """A line for each kind of iteration, and one for the engine around them."""
        for kind, parts in self.seconds.items():
            whole = parts.pop("all")
            parts["other layers"] = whole - parts.total()
            run_s -= whole
            shares = ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in parts.most_common())
            print(f"{label}, {kind}: {whole:.2f} s, of which {shares}")
        print(f"{label}, engine: {run_s:.2f} s", flush=True)


def main() -> None:
    """Print both throughputs and their ratio for each model, dtype and policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="interpreter that has vLLM"
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if not arguments.profile and not arguments.vllm_python.is_file():
            raise ConfigError(
                f"no vLLM to compare with: {arguments.vllm_python} does not exist; "
                "`make real-vllm` installs one there, --vllm-python names another"
            )
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.model:
                model = Path(folder) / name
                write_model_folder(MODELS[name], model)
                for dtype in arguments.dtype:
                    measure(f"{name} {dtype}", model, dtype, arguments)
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(label: str, model: Path, dtype: str, arguments: argparse.Namespace) -> None:
    """All competitors on one model in one dtype."""
    with ExitStack() as stack:
        engines: dict[str, LLM] = {}
        for policy in POLICIES:
            shared = engines[POLICIES[0]].worker if engines else None
            llm = LLM(model, policy=policy, dtype=dtype, num_gpu_blocks=512, max_batch_size=BATCH, worker=shared)
            engines[policy] = stack.enter_context(llm)
        runs = {policy: engine_run(llm) for policy, llm in engines.items()}
        prompts = make_prompts(llm.model_config.vocab_size)
        if arguments.profile:
            stopwatch = Stopwatch()
            run = runs[POLICIES[0]]
            run(prompts[:BATCH])
            with stopwatch.watching():
                seconds, _ = run(prompts)
            stopwatch.print(label, seconds)
            return
        vllm = stack.enter_context(Vllm(arguments.vllm_python, model, dtype))
        name = f"vLLM {vllm.version}"
        compare(label, take_turns({name: vllm.run} | runs, prompts, arguments.repeats), POLICIES, name)


if __name__ == "__main__":
    main()
