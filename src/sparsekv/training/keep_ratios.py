"""Ratios of curricula, said as what stays instead of what goes: `min_keep_ratio=0.3` is `end_ratio=0.7`. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any, TypeVar

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import removed_fraction
from sparsekv.training.curriculum import Curriculum

Class = TypeVar("Class", bound=Curriculum)

KEEP_RATIOS: dict[str, tuple[str, ...]] = {
    "initial_keep_ratio": ("start_ratio",),
    "start_keep_ratio": ("start_ratio",),
    "min_keep_ratio": ("end_ratio", "max_ratio"),
    "end_keep_ratio": ("end_ratio", "max_ratio"),
    "keep_ratio": ("ratio",),
    "keep_ratios": ("ratios",),
}
"""A keep ratio, the fraction that STAYS, and the ratios it may stand for, the first that the curriculum has."""


def takes_keep_ratios(curriculum: type[Class]) -> type[Class]:
    """The class itself; keyword arguments of it may be keep ratios."""
    made: Any = curriculum.__init__

    @wraps(made)
    def init(self: Class, *args: Any, **given: Any) -> None:
        made(self, *args, **as_removed(curriculum, given))

    curriculum.__init__ = init  # type: ignore[assignment, method-assign]
    return curriculum


def as_removed(curriculum: type[Curriculum], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a curriculum with keep ratios converted; what the curriculum does not have stays as it is.

    Raises
    ------
    ConfigError
        For a keep ratio outside (0, 1], or a ratio that is given in two spellings by keyword.
    """
    name, parameters = curriculum.name, inspect.signature(curriculum).parameters
    ours: dict[str, Any] = {}
    for key, value in given.items():
        field = next((target for target in KEEP_RATIOS.get(key, ()) if target in parameters), key)
        if field in ours:
            raise ConfigError(f"curriculum {name}: {field} is given twice (also as {key})")
        ours[field] = value if field == key else _removed(name, key, value)
    return ours


def _removed(name: str, key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_removed(name, key, each) for each in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(
            f"curriculum {name}: {key} must be in (0, 1] (the fraction that stays), got {value!r}"
        )
    return removed_fraction(value)
