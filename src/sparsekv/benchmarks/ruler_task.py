"""What a RULER task is asked for, and what it answers with."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from sparsekv.benchmarks.base import row_rng
from sparsekv.benchmarks.data import NOISE_HAYSTACK
from sparsekv.benchmarks.fit import Draft, TokenCounter
from sparsekv.benchmarks.haystack import Haystack, load_haystack
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.benchmarks.squad import Squad, load_squad

T = TypeVar("T")


class Sources:
    """What the rows of one `load` share: the configuration, the token counts and the files, read once."""

    def __init__(self, spec: BenchmarkConfig, count: TokenCounter, seed: int) -> None:
        self.spec = spec
        self.count = count
        self.seed = seed
        self._memo: dict[Hashable, Any] = {}

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when this key was first asked for."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @cached_property
    def haystack(self) -> Haystack | None:
        """The essay of `spec.haystack`, or None for noise."""
        return None if self.spec.haystack == NOISE_HAYSTACK else load_haystack(self.spec.haystack)

    @cached_property
    def squad(self) -> Squad:
        """The questions and documents of `spec.squad`."""
        return load_squad(self.spec.squad)


@dataclass(frozen=True)
class Row:
    """One row to draft.

    Attributes:
        stream: part of every seed; the task's name, or another where tasks are to share their draws.
        index: number of the row, from 0.
        context_length: the length asked for, in tokens.
        max_new_tokens: the answer's limit, already taken off `limit`.
        limit: most tokens the prompt may have.
        sources: what all rows share.
    """

    stream: str
    index: int
    context_length: int
    max_new_tokens: int
    limit: int
    sources: Sources

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose; the length is not in its seed, so that rows of different
        lengths ask about the same needles."""
        return row_rng(self.sources.seed, self.stream, self.index, purpose)


class RulerTask(Protocol):
    """One task of the family.

    Attributes:
        max_new_tokens: RULER's limit of the answer, in tokens.
        metric: RULER's metric.
    """

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def metric(self) -> str: ...

    def draft(self, row: Row) -> Draft:
        """Everything of a row but the amount of filler."""
        ...
