"""Numbers of tokens of texts: by a real tokenizer, or by an approximation that says it is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.core.tokenizer import load_tokenizer
from harness.workload.traces.lengths import IntArray

_BYTES_PER_TOKEN = 4
_BATCH = 1000


@dataclass(frozen=True)
class TokenCounter:
    """A function that counts the tokens of texts, and its description for meta.json."""

    description: str
    count: Callable[[Sequence[str]], IntArray]


def token_counter(tokenizer: str | None) -> TokenCounter:
    """Count with the Hugging Face tokenizer in directory `tokenizer`, special tokens included, or approximate.

    The approximation is one token per 4 bytes of UTF-8, rounded up. It is close to the usual subword vocabularies on
    English prose, and better than counting characters on other scripts. Raises ConfigError if the tokenizer cannot be
    loaded.
    """
    if tokenizer is None:
        return TokenCounter(
            f"token counts APPROXIMATED as UTF-8 bytes / {_BYTES_PER_TOKEN} (no tokenizer)", _approximate
        )
    loaded = load_tokenizer(tokenizer)

    def count(texts: Sequence[str]) -> IntArray:
        lengths = [
            len(ids) for at in range(0, len(texts), _BATCH) for ids in loaded(list(texts[at : at + _BATCH])).input_ids
        ]
        return np.array(lengths, dtype=np.int64)

    return TokenCounter(f"tokens counted with {tokenizer}", count)


def _approximate(texts: Sequence[str]) -> IntArray:
    # "replace": JSON can hold lone surrogates, which UTF-8 cannot.
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    return -(-np.array(sizes, dtype=np.int64) // _BYTES_PER_TOKEN)
