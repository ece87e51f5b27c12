"""What a curriculum is. The curricula themselves are in `curricula.py`. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from sparsekv.errors import ConfigError


class Curriculum(ABC):
    """The compression ratio over training.

    Stateless ones depend on `step` and `total_steps` alone, so resuming needs nothing of them.
    """

    name = ""
    adaptive = False
    """True if `observe` changes `ratio`: then training must measure held-out perplexity as it goes."""

    @property
    def needs_baseline(self) -> bool:
        """True if the first `observe` must come before the first step, with the full cache."""
        return False

    @abstractmethod
    def ratio(self, step: int, total_steps: int) -> float:
        """The compression_ratio, in [0, 1), of the step that follows `step` finished ones of `total_steps`."""

    def observe(self, metric: float) -> None:  # noqa: B027  (most curricula have nothing to learn from it)
        """Hear of the held-out perplexity under eviction at the present ratio."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the step; plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        ConfigError
            If the state is that of another curriculum.
        """
        check_keys(self, state, {})


def checked_ratio(name: str, field: str, value: Any) -> float:
    """`value` if it is a compression ratio.

    Raises
    ------
    ConfigError
        With the curriculum's `name` and the `field`, if it is not in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(
            f"curriculum {name}: {field} must be in [0, 1) (the fraction removed), got {value!r}"
        )
    return float(value)


def check_keys(curriculum: Curriculum, state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise a ConfigError unless a saved state has the keys of `like`."""
    if set(state) != set(like):
        raise ConfigError(
            f"curriculum {curriculum.name}: the saved state is that of another curriculum "
            f"(it has {', '.join(sorted(state)) or 'nothing'}, not {', '.join(sorted(like)) or 'nothing'})"
        )
