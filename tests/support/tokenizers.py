"""Small tokenizers, as real ones are made: of words, of bytes, and of pieces with bytes to fall back on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

NUM_WORDS = 497
LINES = ["Ein Käfer läuft über die Straße — 東京へ。", "naïve café, 😀👍🏽 and hello world", "Привет, мир! hello hello"]
END = "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ message['role'] + ' ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def of_words() -> Any:
    """One token a word: w0, w1, …"""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", END, *(f"w{i}" for i in range(NUM_WORDS))])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def of_bytes(vocab_size: int = 350) -> Any:
    """Byte-level BPE, trained on a few lines: most characters beyond ASCII are several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _wrapped(tokenizer)


def of_pieces() -> Any:
    """As Llama 2's: words begin with ▁, and what is in no piece is bytes."""
    pieces = ["▁", "▁he", "llo", "▁wor", "ld", "a", "b", "é", "東"]
    names = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {piece: i for i, piece in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


def _wrapped(tokenizer: tokenizers.Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=END, chat_template=CHAT_TEMPLATE
    )


KINDS: dict[str, Callable[[], Any]] = {"words": of_words, "bytes": of_bytes, "pieces": of_pieces}
