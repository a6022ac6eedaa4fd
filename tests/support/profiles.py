"""Parts of what the Hypothesis profile (tests/conftest.py) says a generated test draws."""

import math

from hypothesis import settings


def share(part: float) -> settings:
    """Settings of a test that draws this part of the profile's scenarios."""
    return settings(max_examples=math.ceil(part * settings().max_examples))
