"""Checks on many random values, which are the same in each run."""

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st


def over(
    strategy: st.SearchStrategy[Any], count: int, seed: int = 0
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Runs a check on `count` random values: others for each seed."""

    def decorate(check: Callable[[Any], None]) -> Callable[[], None]:
        settings = hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(seed)(settings(hypothesis.given(strategy)(check)))

    return decorate
