"""What a cache remembers of eviction while tokens are generated; `sparsekv.eviction` acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsekv.policies.base import Policy
from sparsekv.policies.budget import Budget


@dataclass
class DecodeEviction:
    """Eviction while tokens are generated.

    Parameters
    ----------
    policy, budget
        What to keep; the budget counts all stored entries.
    every : int >= 1
        Evict once that many tokens came since the last time (1: after every token, as StreamingLLM). The cache then
        holds between `budget` and `budget + every` entries per head.
    """

    policy: Policy
    budget: Budget
    every: int = 64
    rounds: Any = None  # `remembered.Rounds`, for policies that remember scores and cut all layers together
    since: dict[int, int] = field(default_factory=dict)  # tokens since the last eviction, per layer

    def reset(self) -> None:
        """Forget what was evicted: the cache begins anew."""
        self.since = {}
        if self.rounds is not None:
            self.rounds.reset()
