"""The paired bootstrap: how far a difference of averages may be off because other rows could have been asked.

Several settings answered the same rows of a task. A resample draws as many rows as there are, with replacement,
the same ones for every setting; tasks are resampled apart. Whatever is said of the settings (a difference, a ratio, an
average over tasks) is said of each resample too, and the middle of those values is the interval (percentile bootstrap;
Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). Pairing leaves out what all settings share:
how hard the rows are. Knows arrays; nothing of methods or models.

Shape letters: N rows, S settings, R resamples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv.errors import ConfigError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Any]
"""From means [..., S] to values [...]: the same function is asked of the means and of their resamples."""


@dataclass(frozen=True)
class Means:
    """Mean scores, and what they would have been with other rows.

    Parameters
    ----------
    observed : float [S]
    resampled : float [R, S]; NaN where there were too few rows (under 2) to tell
    """

    observed: Floats
    resampled: Floats


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; None where it is not defined (a share of zero) or can't be told (one row)."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def paired_means(scores: Floats, resamples: int, seed: int, stream: str) -> Means:
    """Means over the rows of one task, and over `resamples` draws of them.

    Parameters
    ----------
    scores : float [N, S], N >= 1
        Column s holds setting s's scores; row n is the same row for all.
    resamples : int >= 1
        R.
    seed, stream : the draws depend on these two and N alone, so that a task draws the same beside any other tasks and
        settings. `stream` is the task's name.
    """
    n_rows, n_settings = scores.shape
    if n_rows < 1:
        raise ConfigError(f"{stream} has no rows to compare")
    observed = scores.mean(axis=0)
    if n_rows < 2:
        return Means(observed, np.full((resamples, n_settings), np.nan))
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    # How often each row was drawn is all that a mean needs, so no row is copied.
    counts = generator.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=resamples)
    return Means(observed, counts @ scores / n_rows)


def average(tasks: Sequence[Means]) -> Means:
    """The average over tasks, each with the same weight; resample r takes each task's resample r."""
    return Means(
        np.mean([task.observed for task in tasks], axis=0),
        np.mean([task.resampled for task in tasks], axis=0),
    )


def estimate(means: Means, statistic: Statistic, confidence: float = 0.95) -> Estimate:
    """What `statistic` says of the means, with the interval that holds `confidence` of what it says of the resamples.

    No interval where it is undefined in any resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(means.observed))
        drawn = np.asarray(statistic(means.resampled), dtype=np.float64)
    if not np.isfinite(value):
        return Estimate(None, None, None)
    if not np.isfinite(drawn).all():
        return Estimate(value, None, None)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))
