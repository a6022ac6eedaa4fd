from dataclasses import dataclass
from typing import Any, Literal

import pytest

from fastserve.core.errors import ConfigError
from fastserve.core.options import build_options


@dataclass(frozen=True)
class Options:
    size: int = 1
    share: float = 0.5
    limit: float | None = 1.0
    mode: Literal["a", "b"] = "a"
    on: bool = False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": "3"}, Options(size=3)),
        ({"share": "2"}, Options(share=2.0)),
        ({"limit": "none"}, Options(limit=None)),
        ({"limit": "0.25"}, Options(limit=0.25)),
        ({"mode": "b"}, Options(mode="b")),
        ({"on": "true"}, Options(on=True)),
        ({"size": 3, "limit": None}, Options(size=3, limit=None)),
    ],
)
def test_text_becomes_typed(given: dict[str, Any], expected: Options) -> None:
    assert build_options(Options, given, "policy 'x'") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sise": "3"}, "unknown option 'sise' for policy 'x'; valid options: size, share, limit, mode, on"),
        ({"size": "3.5"}, "option size must be of type int, got '3.5'"),
        ({"size": 3.5}, "option size must be of type int, got 3.5"),
        ({"share": "much"}, "option share must be of type float, got 'much'"),
        ({"share": "none"}, "option share must be of type float, got 'none'"),
        ({"mode": "c"}, "option mode must be one of a, b, got 'c'"),
        ({"on": "perhaps"}, "option on must be of type bool, got 'perhaps'"),
        ({"size": True}, "option size must be of type int, got True"),
    ],
)
def test_errors_name_the_value_and_what_is_valid(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_options(Options, given, "policy 'x'")
    assert message in str(caught.value)
