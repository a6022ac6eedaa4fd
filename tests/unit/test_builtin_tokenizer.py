"""The built-in tokenizer: what the script makes, like others to clients, and light enough for simulations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from fastserve.core.countable_tokens import StandIns, countable_tokens
from fastserve.core.errors import ConfigError
from fastserve.core.presets import PRESETS
from fastserve.core.tokenizer import BUILTIN, BuiltinTokenizer, load_tokenizer, tokenizer_directory
from support.profiles import share

TOKENIZER = BuiltinTokenizer()
MESSAGES = [
    {"role": "system", "content": "Sei kurz."},
    {"role": "user", "content": "Käfer 東京 <|end|>\n"},
    {"role": "assistant", "content": ""},
]


def test_the_script_makes_what_is_shipped(tmp_path: Path) -> None:
    from tools.make_tokenizer import make_tokenizer

    make_tokenizer(tmp_path / "made")
    folders = (tmp_path / "made", BUILTIN)
    made, shipped = ({path.name: path.read_text(encoding="utf-8") for path in each.iterdir()} for each in folders)
    assert made.keys() == shipped.keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert all(json.loads(made[name]) == json.loads(shipped[name]) for name in made)


@share(0.5)
@given(st.text())
@example("0 1 12 1000 -5\r\n\t 東京 👍🏽 \0")
def test_every_text_has_tokens_and_comes_back(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert bool(tokens) == bool(text)


def test_numbers_are_tokens_of_their_own_id() -> None:
    assert [TOKENIZER.encode(f" {number}") for number in range(1000)] == [[number] for number in range(1000)]
    assert countable_tokens(TOKENIZER.backend_tokenizer) == list(range(1000))


def test_its_ids_fit_every_preset() -> None:
    assert len(TOKENIZER) <= min(config.vocab_size for config in PRESETS.values())


def test_transformers_reads_the_same_from_its_directory() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    assert (len(theirs), theirs.eos_token_id) == (len(TOKENIZER), TOKENIZER.eos_token_id)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert theirs.encode(text) == TOKENIZER.encode(text)
    assert theirs([text, "a"]).input_ids == TOKENIZER([text, "a"]).input_ids
    assert theirs.get_vocab() == TOKENIZER.get_vocab()
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == TOKENIZER.decode(
        TOKENIZER.encode(text), skip_special_tokens=True
    )


def test_loading_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from fastserve.core.tokenizer import load_tokenizer; tokenizer = load_tokenizer('builtin')\n"
        "tokenizer.apply_chat_template([], add_generation_prompt=True); tokenizer.encode('a')\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_says_where_clients_find_it() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "fastserve.cli", "tokenizer"], capture_output=True, text=True, check=True
    )
    assert Path(said.stdout.strip()).samefile(BUILTIN)


def test_ids_beyond_it_are_shown_as_tokens_that_can_be_counted() -> None:
    stand_ins = StandIns(TOKENIZER.backend_tokenizer, 50_272)
    generated = [5, 40_000, 40_001, 3757, 3758, 50_271, 50_271, 7]
    assert [stand_ins.shown(token) for token in generated] == [5, 0, 1, 3757, 758, 271, 271, 7]
    beyond = list(map(stand_ins.shown, range(len(TOKENIZER), 50_272, 7)))
    assert TOKENIZER.encode(TOKENIZER.decode(beyond)) == beyond
    # A model whose vocabulary is the tokenizer's needs none.
    assert StandIns(TOKENIZER.backend_tokenizer, len(TOKENIZER)).shown(50_000) == 50_000


def test_which_tokenizer_is_meant(tmp_path: Path) -> None:
    with_one, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_one, without):
        folder.mkdir()
    (with_one / "tokenizer.json").touch()
    assert tokenizer_directory(with_one, None) == with_one
    assert tokenizer_directory(without, None) is None
    assert tokenizer_directory("opt-125m", None) == tokenizer_directory(None, None) == BUILTIN
    assert tokenizer_directory(with_one, "builtin") == BUILTIN
    assert tokenizer_directory(with_one, "none") is None
    assert tokenizer_directory(without, with_one) == with_one
    with pytest.raises(ConfigError, match=r"tokenizer 'nowhere' is not a directory; give one .* or builtin or none"):
        tokenizer_directory(None, "nowhere")
    with pytest.raises(ConfigError, match="tokenizer 'none': text needs one"):
        load_tokenizer("none")
