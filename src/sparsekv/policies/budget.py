"""How many entries stay: the only place in the project that rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsekv.errors import ConfigError, unknown

Scope = Literal["head", "layer", "model"]
SCOPES: tuple[Scope, ...] = ("head", "layer", "model")


def removed_fraction(keep_ratio: float) -> float:
    """The compression_ratio that leaves `keep_ratio` of the entries: 0.9 -> 0.1, without 0.09999999999999998."""
    return round(1 - keep_ratio, 12)


@dataclass(frozen=True)
class Budget:
    """A target for eviction: a fraction to remove, or a number of entries to keep.

    Parameters
    ----------
    compression_ratio : float in [0, 1), optional
        Fraction of the context's entries to REMOVE.
    tokens : int >= 1, optional
        Entries to keep per kv head (a mean over heads where `scope` is wider). A budget larger than the context
        keeps everything.
    scope : "head", "layer" or "model"
        Over what the count is fixed: every kv head the same, every layer the same, or only the model's total.
        Position-only policies keep the same columns in every head, so for them the three are one.

    With neither ratio nor tokens, a policy's own sizes decide.

    Raises
    ------
    ConfigError
        If both are given, or one is out of range.
    """

    compression_ratio: float | None = None
    tokens: int | None = None
    scope: Scope = "head"

    def __post_init__(self) -> None:
        ratio, tokens = self.compression_ratio, self.tokens
        if ratio is not None and tokens is not None:
            raise ConfigError(
                f"compression_ratio={ratio} and budget tokens={tokens} are both given; give one"
            )
        if ratio is not None and not (
            isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 <= ratio < 1
        ):
            raise ConfigError(f"compression_ratio must be in [0, 1) (the fraction removed), got {ratio!r}")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise ConfigError(f"budget tokens must be a whole number >= 1, got {tokens!r}")
        if self.scope not in SCOPES:
            raise unknown("budget scope", self.scope, SCOPES)

    @property
    def given(self) -> bool:
        """False if a policy's own sizes decide."""
        return self.compression_ratio is not None or self.tokens is not None

    def n_kept(self, n: int) -> int:
        """Entries to keep of `n`: kvpress's rule `max(1, int(n * (1 - ratio)))`, or `min(tokens, n)`.

        Raises
        ------
        ConfigError
            If the budget has neither a ratio nor tokens.
        """
        if n <= 0:
            return 0
        if self.tokens is not None:
            return min(self.tokens, n)
        if self.compression_ratio is not None:
            return max(1, int(n * (1 - self.compression_ratio)))
        raise ConfigError("the budget has neither compression_ratio nor tokens")


def as_budget(budget: Budget | float | int | None) -> Budget:
    """A Budget from what people write: a ratio in [0, 1) as a float, a number of entries as an int, or None.

    Raises
    ------
    ConfigError
        For neither, and for 0, which as a number of entries would keep nothing and as a ratio everything.
    """
    if isinstance(budget, Budget):
        return budget
    if budget is None:
        return Budget()
    if isinstance(budget, int) and not isinstance(budget, bool):
        if budget == 0:
            raise ConfigError(
                "budget 0 is no number of entries (at least 1); 0.0 is the ratio that removes nothing"
            )
        return Budget(tokens=budget)
    return Budget(compression_ratio=float(budget))
