"""vLLM's offline engine, run by the interpreter of an environment that has it: `cpu_vllm.py` talks to it.

Reads lines of JSON from stdin and answers each with one on stdout: first the engine's arguments, then, as often as
wanted, prompts as token ids and the number of tokens each is to get. All that vLLM writes goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    import vllm

    llm = vllm.LLM(**json.loads(sys.stdin.readline()))
    answer({"version": vllm.__version__})
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        answer({"seconds": seconds, "outputs": [list(output.outputs[0].token_ids) for output in outputs]})


if __name__ == "__main__":
    main()
