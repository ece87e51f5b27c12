"""Intervals against distributions worked out by hand, and against what was simulated."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsekv.errors import ConfigError
from sparsekv.evaluation.bootstrap import Floats, Means, average, estimate, paired_means


def first_minus_second(m: Floats) -> Any:
    return m[..., 0] - m[..., 1]


def test_two_rows_have_three_resamples() -> None:
    """Rows that differ by 100 and 0: the mean difference is 0, 50 or 100 with 1, 2 and 1 chances of 4."""
    means = paired_means(np.array([[100.0, 0.0], [30.0, 30.0]]), 20_000, 0, "t")
    assert means.observed.tolist() == [65.0, 15.0] and means.resampled.shape == (20_000, 2)
    values, counts = np.unique(first_minus_second(means.resampled), return_counts=True)
    assert values.tolist() == [0.0, 50.0, 100.0]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.015)
    # The same rows for both: (mean, mean) is one of three pairs, never a mixture.
    assert {tuple(row) for row in means.resampled} == {(100.0, 0.0), (65.0, 15.0), (30.0, 30.0)}
    found = estimate(means, first_minus_second)
    assert (found.value, found.interval) == (50.0, [0.0, 100.0])
    # The middle 40 % of 0 (a quarter), 50 (a half) and 100 (a quarter) is 50 at both ends.
    assert estimate(means, first_minus_second, confidence=0.4).interval == [50.0, 50.0]


def test_the_interval_is_that_of_all_resamples_enumerated() -> None:
    """Six rows: all 6^6 draws with replacement, worked out one by one."""
    difference = np.array([0.0, 100.0, -50.0, 25.0, 0.0, 60.0])
    scores = np.stack([difference + 10, np.full(6, 10.0)], axis=1)
    exact = np.array([difference[list(draw)].mean() for draw in itertools.product(range(6), repeat=6)])
    means = paired_means(scores, 40_000, 3, "t")
    drawn = first_minus_second(means.resampled)
    assert drawn.mean() == pytest.approx(difference.mean(), abs=0.4)
    assert (
        drawn.std() == pytest.approx(math.sqrt(difference.var() / 6), rel=0.02) == pytest.approx(exact.std())
    )
    assert estimate(means, first_minus_second).interval == pytest.approx(
        list(np.quantile(exact, [0.025, 0.975])), abs=1.7
    )


def correlated(rng: np.random.Generator, n_rows: int, gap: float) -> Floats:
    """Scores of two settings on rows whose difficulty they share; expected difference `gap`."""
    hard = rng.normal(50, 25, size=n_rows)
    return np.stack([hard + gap + rng.normal(0, 8, n_rows), hard + rng.normal(0, 8, n_rows)], axis=1)


def test_95_percent_of_the_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    gaps, runs, inside = (3.0, -1.0, 0.0), 400, 0
    for run in range(runs):
        tasks = [
            paired_means(correlated(rng, 60, gap), 400, run, str(index)) for index, gap in enumerate(gaps)
        ]
        found = estimate(average(tasks), first_minus_second)
        inside += found.low <= np.mean(gaps) <= found.high
    assert 0.92 <= inside / runs <= 0.975


def test_pairing_makes_the_interval_narrower_where_rows_are_shared() -> None:
    rng = np.random.default_rng(1)
    scores = correlated(rng, 100, 4.0)
    paired = estimate(paired_means(scores, 2000, 0, "t"), first_minus_second)
    apart = [paired_means(scores[:, [i]], 2000, 0, f"setting {i}") for i in range(2)]  # rows of their own
    unpaired = estimate(
        Means(*(np.concatenate([getattr(m, name) for m in apart], -1) for name in ("observed", "resampled"))),
        first_minus_second,
    )
    widths = [found.high - found.low for found in (paired, unpaired)]
    assert paired.value == pytest.approx(unpaired.value)
    theory = [2 * 1.96 * math.sqrt(variance / 100) for variance in (128.0, 2 * 25**2 + 128)]
    assert widths == pytest.approx(theory, rel=0.2) and widths[1] > 2.5 * widths[0]


def test_draws_depend_on_seed_task_and_number_of_rows_alone() -> None:
    scores = np.random.default_rng(2).uniform(0, 100, (20, 3))
    one = paired_means(scores, 50, 7, "vt")
    assert (one.resampled == paired_means(scores, 50, 7, "vt").resampled).all()
    assert np.allclose(one.resampled[:, :1], paired_means(scores[:, :1], 50, 7, "vt").resampled)
    for seed, task in ((8, "vt"), (7, "cwe")):
        assert (one.resampled != paired_means(scores, 50, seed, task).resampled).any()


def test_tasks_count_alike_however_many_rows_they_have() -> None:
    many, few = (
        paired_means(np.full((90, 1), 10.0), 5, 0, "a"),
        paired_means(np.full((10, 1), 30.0), 5, 0, "b"),
    )
    both = average([many, few])
    assert both.observed.tolist() == [20.0] and both.resampled == pytest.approx(np.full((5, 1), 20.0))


def test_what_can_not_be_told_is_none() -> None:
    one_row = paired_means(np.array([[5.0, 1.0]]), 10, 0, "t")
    found = estimate(one_row, first_minus_second)
    assert (found.value, found.interval) == (4.0, None)
    assert (
        estimate(average([one_row, paired_means(np.eye(2), 10, 0, "u")]), first_minus_second).interval is None
    )
    zero = paired_means(np.zeros((4, 2)), 10, 0, "t")
    assert estimate(zero, lambda m: m[..., 0] / m[..., 1]) == estimate(zero, lambda m: m[..., 0] / 0)
    assert estimate(zero, lambda m: m[..., 0] / m[..., 1]).value is None
    # A share that is defined for what was seen, but not in every resample, has no interval.
    rare = paired_means(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), 200, 0, "t")
    share = estimate(rare, lambda m: m[..., 0] / m[..., 1])
    assert share.value == pytest.approx(3.0) and share.interval is None
    with pytest.raises(ConfigError, match="t has no rows"):
        paired_means(np.zeros((0, 2)), 10, 0, "t")


@given(arrays(np.float64, (7, 2), elements=st.floats(0, 100)), st.floats(-50, 50), st.integers(0, 5))
def test_intervals_turn_and_shift_with_the_scores(scores: Floats, shift: float, seed: int) -> None:
    means = paired_means(scores, 100, seed, "t")
    found = estimate(means, first_minus_second)
    swapped = estimate(means, lambda m: m[..., 1] - m[..., 0])
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    moved = estimate(paired_means(scores + np.array([shift, 0.0]), 100, seed, "t"), first_minus_second)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)
    assert found.low - 1e-9 <= found.high and np.ptp(scores, axis=0).sum() + 1e-9 >= found.high - found.low
