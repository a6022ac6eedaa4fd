"""Make the built-in tokenizer (`fastserve.core.tokenizer.BUILTIN`) in Hugging Face format; always the same files.

It is a byte-level BPE, so every text has tokens. Its ids, in this order:

- the texts " 0" to " 999", each with its number as its id: the tokens of a simulated output, which clients count;
- the 256 bytes;
- the special tokens;
- pieces of English words, learned from `tokenizer_words.txt`. A line of it has a word and its number of occurrences in
  the documentation of this project, of the Python packages it uses, and of Python.

English prose has about 3 characters a token; with vocabularies ten times as large, it has more than 4.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastserve.core.files import atomic_write
from fastserve.core.tokenizer import BUILTIN

NUM_NUMBERS = 1000
NUM_PIECES = 2500
START, END = "<|start|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
_SPACE = "Ġ"
"""The space in byte-level vocabularies."""
_WORDS = Path(__file__).with_name("tokenizer_words.txt")
Merge = tuple[str, str]


def make_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json to `folder`, made if missing. Raises OutputError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "tokenizer.json") as staging:
        staging.write_text(json.dumps(_tokenizer(), ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    with atomic_write(folder / "tokenizer_config.json") as staging:
        staging.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> dict[str, Any]:
    """Make the content of tokenizer.json."""
    numbers = [f"{_SPACE}{number}" for number in range(NUM_NUMBERS)]
    # Each digit is merged with the text before it, from the left.
    of_numbers = [(number[:-1], number[-1]) for number in numbers]
    of_words = _learn(_WORDS.read_text(encoding="utf-8").splitlines())
    pieces = [left + right for left, right in of_words]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*numbers, *alphabet, START, END, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [*of_numbers, *of_words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _learn(lines: list[str]) -> list[Merge]:
    """Learn the merges of words, each after a space, the most frequent merge first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + NUM_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = [line.split() for line in lines]
    tokenizer.train_from_iterator((f"{word} " * int(count) for word, count in words), trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILTIN, metavar="FOLDER", help="where to; default: the package")
    folder = parser.parse_args().out
    make_tokenizer(folder)
    print(f"wrote {folder} (tokenizers {tokenizers.__version__})")


if __name__ == "__main__":
    main()
