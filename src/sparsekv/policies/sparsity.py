"""A loss on how sparse attention is: which kinds there are. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsekv.errors import ConfigError, unknown

SparsityKind = Literal["entropy", "l1"]
SPARSITY_KINDS: tuple[SparsityKind, ...] = ("entropy", "l1")


@dataclass(frozen=True)
class Sparsity:
    """A loss that rewards attention on few entries.

    Parameters
    ----------
    kind : "entropy" or "l1"
        Of each query's weights p: their entropy, or the ratio ||p||_1 / ||p||_2 (Hoyer 2004, "Non-negative matrix
        factorization with sparseness constraints", section 3.1). The plain l1 norm of a softmax is always 1.
    weight : float >= 0
        Factor in the training loss.
    """

    kind: SparsityKind = "entropy"
    weight: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in SPARSITY_KINDS:
            raise unknown("sparsity kind", self.kind, SPARSITY_KINDS)
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ConfigError(f"sparsity weight must be a number >= 0, got {weight!r}")
