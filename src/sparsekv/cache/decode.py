"""What a cache remembers of eviction while tokens are generated; `sparsekv.eviction` acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    since: dict[int, int] = field(default_factory=dict)  # tokens since the last eviction, per layer
