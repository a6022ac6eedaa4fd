"""lm-eval, as it is, scores with our server."""

import subprocess

from support.clients import command_of


def test_it_is_the_version_that_is_pinned() -> None:
    version = subprocess.run(
        [command_of("python"), "-c", "from importlib.metadata import version; print(version('lm_eval'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert version == "0.4.13"
