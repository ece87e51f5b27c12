"""What a training step measures, summed until it is logged. Imports no torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping


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

    def read(self) -> dict[str, float]:
        """Means since the last call, and tokens_per_s of this process; then everything starts anew."""
        now = time.perf_counter()
        found = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        if self._tokens:
            found["tokens_per_s"] = self._tokens / max(now - self._since, 1e-9)
        self._sums.clear()
        self._counts.clear()
        self._tokens, self._since = 0, now
        return found
