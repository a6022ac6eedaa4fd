"""Settings for all tests."""

import ctypes
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings

# How many scenarios a generated test draws. `make soak` asks for the second by --hypothesis-profile, which comes later
# than this and wins. There a failure is reported as found: pytest without the option finds it again, and shrinks it.
settings.register_profile("ci", max_examples=1_000, deadline=None)
settings.register_profile(
    "soak",
    settings.get_profile("ci"),
    max_examples=100_000,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    print_blob=True,
)
settings.load_profile("ci")

# Test processes share few cores, and so do the processes they start: threads that wait for each other's work spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in its background with SIGINT ignored, and nohup with SIGHUP; the processes that tests start
# would inherit that, and wait for ever to be interrupted.
for _signal, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)

# Where no GPU can be, Triton's kernels are tested in its interpreter, which it must be told before anything imports it.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--empty-environment",
        action="store_true",
        help="test the wheel in a fresh environment with dependencies from the package index: minutes",
    )


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Threads of several test processes must not fight over two cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
