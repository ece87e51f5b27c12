"""Curricula: which compression_ratio each training step uses. Imports no torch.

    ratio(step, total_steps)    the fraction of entries to REMOVE at an optimizer step, in [0, 1)
    observe(metric)             held-out perplexity UNDER EVICTION at the present ratio; the adaptive one listens

All of them take keep ratios, the fraction that STAYS, in (0, 1], for their ratios: `initial_keep_ratio` or
`start_keep_ratio` for start_ratio, `min_keep_ratio` or `end_keep_ratio` for end_ratio (adaptive: max_ratio),
`keep_ratio`, `keep_ratios` (`keep_ratios.py`).

ratio
  |            ______   LinearCurriculum(start_ratio, end_ratio, warmup_steps)
  |        __/
  |    __/
  |__/
  +--------------------> step
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparsekv.errors import ConfigError, unknown
from sparsekv.registry import Registry
from sparsekv.training.adaptive_curriculum import AdaptiveCurriculum
from sparsekv.training.curriculum import Curriculum, checked_ratio
from sparsekv.training.keep_ratios import as_removed, takes_keep_ratios

__all__ = [
    "CURRICULA",
    "AdaptiveCurriculum",
    "CosineCurriculum",
    "Curriculum",
    "FixedCurriculum",
    "LinearCurriculum",
    "SpreadCurriculum",
    "StepCurriculum",
    "is_fixed",
    "make_curriculum",
]

CURRICULA: Registry[type[Curriculum]] = Registry("curriculum")
CURRICULA.register("adaptive", AdaptiveCurriculum)

_GOLDEN = (math.sqrt(5) - 1) / 2


@CURRICULA.register("fixed", aliases=("constant",))
@takes_keep_ratios
class FixedCurriculum(Curriculum):
    """The same `ratio`, a float in [0, 1), at every step."""

    name = "fixed"

    def __init__(self, ratio: float) -> None:
        self._ratio = checked_ratio("fixed", "ratio", ratio)

    def ratio(self, step: int, total_steps: int) -> float:
        """The ratio."""
        return self._ratio


def is_fixed(curriculum: Curriculum, ratio: float | None = None) -> bool:
    """Whether the ratio is the same at every step; with a `ratio`, whether it is that."""
    return isinstance(curriculum, FixedCurriculum) and ratio in (None, curriculum.ratio(0, 1))


@dataclass(frozen=True)
class _Ramp(Curriculum):
    """From `start_ratio` at step 0 to `end_ratio` after `warmup_steps`, where it stays."""

    start_ratio: float = 0.0
    end_ratio: float = 0.5
    warmup_steps: float | None = None

    def __post_init__(self) -> None:
        name = self.name
        checked_ratio(name, "start_ratio", self.start_ratio)
        checked_ratio(name, "end_ratio", self.end_ratio)
        if self.warmup_steps is not None:
            _check_steps(name, "warmup_steps", self.warmup_steps)

    def _progress(self, step: int, total_steps: int) -> float:
        """How far the ramp is, in [0, 1]."""
        length = total_steps if self.warmup_steps is None else _in_steps(self.warmup_steps, total_steps)
        return 1.0 if step >= length else max(step, 0) / length


@CURRICULA.register("linear")
@takes_keep_ratios
@dataclass(frozen=True)
class LinearCurriculum(_Ramp):
    """A straight line from one ratio to another, which may be lower.

    Parameters
    ----------
    start_ratio, end_ratio : float in [0, 1)
    warmup_steps : int >= 0, float in (0, 1), or None
        Optimizer steps until `end_ratio` is reached; a fraction is one of all steps; None is all of them.

    Raises
    ------
    ConfigError
        If a ratio is outside [0, 1) or the steps are negative.
    """

    name = "linear"

    def ratio(self, step: int, total_steps: int) -> float:
        """start + (end - start) * step / warmup_steps, then end."""
        done = self._progress(step, total_steps)
        return self.end_ratio if done == 1 else self.start_ratio + (self.end_ratio - self.start_ratio) * done


@CURRICULA.register("cosine")
@takes_keep_ratios
@dataclass(frozen=True)
class CosineCurriculum(_Ramp):
    """Half a cosine from one ratio to another: slow at both ends. Parameters as for LinearCurriculum."""

    name = "cosine"

    def ratio(self, step: int, total_steps: int) -> float:
        """start + (end - start) * (1 - cos(pi * step / warmup_steps)) / 2, then end."""
        done = self._progress(step, total_steps)
        if done == 1:
            return self.end_ratio
        return self.start_ratio + (self.end_ratio - self.start_ratio) * (1 - math.cos(math.pi * done)) / 2


@CURRICULA.register("spread")
@takes_keep_ratios
@dataclass(frozen=True)
class SpreadCurriculum(_Ramp):
    """A ramp to the lower end of a range, then every ratio of it in turn, so that one model serves them all.

    The range opens with the ramp: at progress p the ratio is drawn from [start + (end - start) * p, the same plus
    (top - end) * p] by multiples of the golden ratio, which fill it evenly and depend on the step alone.

    Parameters
    ----------
    start_ratio, end_ratio, warmup_steps : as for LinearCurriculum
    top_ratio : float in [end_ratio, 1)
        Upper end of the range.
    full_every : int >= 0
        Every so many steps nothing is evicted, so that the full cache is served as well; 0: never so.

    Raises
    ------
    ConfigError
        If a ratio is outside [0, 1), top_ratio is below end_ratio, or full_every is negative or a fraction.
    """

    top_ratio: float = 0.9
    full_every: int = 0
    name = "spread"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.full_every, bool) or not isinstance(self.full_every, int) or self.full_every < 0:
            raise ConfigError(
                f"curriculum spread: full_every must be a whole number >= 0, got {self.full_every!r}"
            )
        if checked_ratio("spread", "top_ratio", self.top_ratio) < self.end_ratio:
            raise ConfigError(
                f"curriculum spread: top_ratio must be at least end_ratio {self.end_ratio}, got {self.top_ratio}"
            )

    def ratio(self, step: int, total_steps: int) -> float:
        """The ramp, plus a place in the range; 0 every `full_every` steps."""
        if self.full_every and (step + 1) % self.full_every == 0:
            return 0.0
        done = self._progress(step, total_steps)
        place = (step * _GOLDEN) % 1.0
        ramp = self.start_ratio + (self.end_ratio - self.start_ratio) * done
        return ramp + (self.top_ratio - self.end_ratio) * done * place


@CURRICULA.register("step", aliases=("steps",))
@takes_keep_ratios
@dataclass(frozen=True)
class StepCurriculum(Curriculum):
    """Stairs: from each milestone on, its ratio.

    Parameters
    ----------
    milestones : increasing steps (whole numbers, or fractions of all steps), or a mapping step -> ratio
    ratios : floats in [0, 1), one per milestone; not with a mapping
    start_ratio : float in [0, 1)
        Before the first milestone.

    Raises
    ------
    ConfigError
        If the lengths differ, the steps do not increase, or a ratio is outside [0, 1).
    """

    milestones: Sequence[float] | Mapping[float, float]
    ratios: Sequence[float] | None = None
    start_ratio: float = 0.0
    name = "step"

    def __post_init__(self) -> None:
        milestones: Any = self.milestones
        ratios: Any = self.ratios
        if isinstance(milestones, Mapping):
            if ratios is not None:
                raise ConfigError(
                    "curriculum step: milestones is a mapping to ratios already; give no ratios"
                )
            milestones, ratios = [_number(key) for key in milestones], list(milestones.values())
        for field, value in (("milestones", milestones), ("ratios", ratios)):
            if not isinstance(value, (list, tuple)) or not value:
                raise ConfigError(f"curriculum step: {field} must be a list of numbers, got {value!r}")
        if len(milestones) != len(ratios or ()):
            raise ConfigError(
                f"curriculum step: {len(milestones)} milestones but {len(ratios or ())} ratios; give one each"
            )
        for value in milestones:
            _check_steps("step", "milestones", value)
        kinds = {0 < value < 1 for value in milestones if value != 0}
        if len(kinds) > 1 or any(a >= b for a, b in pairwise(milestones)):
            raise ConfigError(
                f"curriculum step: milestones must increase, all in steps or all fractions, got {list(milestones)}"
            )
        object.__setattr__(self, "milestones", tuple(milestones))
        object.__setattr__(self, "ratios", tuple(checked_ratio("step", "ratios", r) for r in ratios or ()))
        checked_ratio("step", "start_ratio", self.start_ratio)

    def ratio(self, step: int, total_steps: int) -> float:
        """The ratio of the last milestone that `step` has reached."""
        reached = self.start_ratio
        for milestone, ratio in zip(self.milestones, self.ratios or (), strict=True):
            if step >= _in_steps(milestone, total_steps):
                reached = ratio
        return reached


def make_curriculum(name: str, **args: Any) -> Curriculum:
    """A curriculum by name.

    Parameters
    ----------
    name : "fixed", "linear", "cosine", "spread", "step" or "adaptive"
    args : the parameters of its class, keep ratios too

    Raises
    ------
    ConfigError
        For an unknown name or parameter, a ratio outside [0, 1), or one that is given in both spellings.
    """
    chosen = CURRICULA.get(name)
    allowed = list(inspect.signature(chosen).parameters)
    given = as_removed(chosen, args)
    for key in given:
        if key not in allowed:
            raise unknown(f"argument of curriculum {name}", key, allowed)
    try:
        return chosen(**given)
    except TypeError as error:
        # every name is known by now: what is left is a parameter without a default
        raise ConfigError(f"curriculum {name}: {str(error).partition('() ')[2] or error}") from None


def _check_steps(name: str, field: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    part = isinstance(value, float) and (0 < value < 1 or (value >= 0 and value.is_integer()))
    if not (whole or part):
        raise ConfigError(
            f"curriculum {name}: {field} must be steps (0, 1, 2, ...) or a fraction of all steps in (0, 1), "
            f"got {value!r}"
        )


def _in_steps(value: float, total_steps: int) -> float:
    """Steps that `value` means: itself, or that fraction of all."""
    return value * total_steps if 0 < value < 1 else value


def _number(key: Any) -> Any:
    """A mapping's key: JSON has only text for it."""
    if isinstance(key, str):
        try:
            return int(key) if key.isdigit() else float(key)
        except ValueError:
            return key
    return key
