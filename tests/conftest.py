"""Settings for all tests."""

import sys

import pytest


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Threads of several test processes must not fight over two cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
