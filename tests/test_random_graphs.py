"""Random graphs: whatever the analysis admits leaves the function as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from exercise import exercise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import Step, random_graph, steps

TOLERANCE = 1e-9  # the graphs are badly conditioned on purpose: sums of products of random weights
common = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check(plan: Sequence[Step], seed: int) -> None:
    graph = random_graph(plan, seed)
    if graph.outputs:
        exercise(graph, seed=seed, tolerance=TOLERANCE)


@settings(max_examples=200, **common)  # type: ignore[arg-type]
@given(steps, st.integers(0, 1000))
def test_200_random_graphs(plan: list[Step], seed: int) -> None:
    check(plan, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, **common)  # type: ignore[arg-type]
@given(steps, st.integers(0, 1000))
def test_2000_random_graphs(plan: list[Step], seed: int) -> None:
    check(plan, seed)


def test_copies_that_are_linked_unlike_are_not_mixed() -> None:
    """Found at random: two copies of a channel (a head split) cross over in a gather; a rotation mixed them up."""
    check([(21, 0, 3, 0), (0, 0, 0, 0), (5, 2, 0, 0), (17, 0, 0, 0), (0, 0, 0, 0)], 0)
