"""What a training step measures, summed until it is logged. Imports no torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

Heard = tuple[dict[str, float], dict[str, float], int]
"""Sums, counts and tokens of one process."""


class Meter:
    """Weighted means of what was added since the last `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Sums over `counts[name]` things each."""
        for name, value in sums.items():
            self._sums[name] += float(value)
            self._counts[name] += float(counts[name])

    def add_mean(self, name: str, value: float) -> None:
        """One value of something that is averaged over micro-batches."""
        self.add({name: value}, {name: 1.0})

    def add_tokens(self, count: int) -> None:
        """Tokens that went through the student's forward."""
        self._tokens += count

    def read(self, gather: Callable[[list[Any]], list[Heard]] | None = None) -> dict[str, float]:
        """Means since the last call, and tokens_per_s; then everything starts anew.

        Parameters
        ----------
        gather : joins the lists of all processes, which all have to call this; None: of this process alone
        """
        now = time.perf_counter()
        heard: list[Heard] = [(dict(self._sums), dict(self._counts), self._tokens)]
        if gather is not None:
            heard = gather(heard)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for own_sums, own_counts, _ in heard:
            for name, value in own_sums.items():
                sums[name] += value
                counts[name] += own_counts[name]
        found = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        tokens = sum(count for _, _, count in heard)
        if tokens:
            found["tokens_per_s"] = tokens / max(now - self._since, 1e-9)
        self._sums.clear()
        self._counts.clear()
        self._tokens, self._since = 0, now
        return found
