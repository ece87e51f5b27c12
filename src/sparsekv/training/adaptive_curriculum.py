"""The curriculum that listens: held-out perplexity under eviction decides the ratio. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsekv.errors import ConfigError
from sparsekv.training.curriculum import Curriculum, check_keys, checked_ratio
from sparsekv.training.keep_ratios import takes_keep_ratios


@takes_keep_ratios
class AdaptiveCurriculum(Curriculum):
    """Searches the largest ratio at which held-out perplexity stays within a tolerance of a FIXED baseline.

    An observation is safe if `metric <= baseline * (1 + tolerance)`. Safe ones raise the ratio. An unsafe one brings it
    back to the largest ratio that is still believed safe, and the gap between the two is halved until it is
    `min_step`. There the ratio waits; after `retry_after` further safe observations the unsafe ratio is tried again,
    since the model goes on learning. A ratio that was safe once and now is not is struck off with all above it, so the
    ratio comes down as far as it must, to 0 if need be. The baseline never moves: a model that gets worse cannot
    lower the bar for itself.

    Deterministic: the same observations give the same ratios.

    Parameters
    ----------
    start_ratio : float in [0, 1)
        Where the search starts.
    max_ratio : float in [0, 1)
        The ratio never exceeds it.
    tolerance : float >= 0
        How much perplexity may rise over the baseline, as a fraction of it.
    baseline : float > 0, optional
        Perplexity with the full cache before training. Without it the first observation is taken for it, and until
        then the ratio is 0: that observation is made with the full cache.
    step, min_step : float in (0, 1)
        The largest raise, and the resolution of the search.
    patience : int >= 1
        Safe observations in a row that a raise needs; more than one for a noisy metric.
    retry_after : int >= 1
        Safe observations at the largest safe ratio after which more is tried.

    Raises
    ------
    ConfigError
        If a value is out of its range, or `start_ratio` is above `max_ratio`.
    """

    name = "adaptive"
    adaptive = True

    def __init__(
        self,
        start_ratio: float = 0.1,
        max_ratio: float = 0.9,
        tolerance: float = 0.05,
        baseline: float | None = None,
        step: float = 0.05,
        min_step: float = 0.01,
        patience: int = 1,
        retry_after: int = 3,
    ) -> None:
        self.start_ratio = checked_ratio("adaptive", "start_ratio", start_ratio)
        self.max_ratio = checked_ratio("adaptive", "max_ratio", max_ratio)
        if self.start_ratio > self.max_ratio:
            raise ConfigError(
                f"curriculum adaptive: start_ratio {start_ratio} is above max_ratio {max_ratio}"
            )
        self.tolerance = _positive("tolerance", tolerance, or_zero=True)
        self.step, self.min_step = (
            checked_ratio("adaptive", n, v) for n, v in (("step", step), ("min_step", min_step))
        )
        if not 0 < self.min_step <= self.step:
            raise ConfigError(
                f"curriculum adaptive: 0 < min_step <= step is needed, got {min_step} and {step}"
            )
        self.patience, self.retry_after = (
            _count(n, v) for n, v in (("patience", patience), ("retry_after", retry_after))
        )
        self.baseline = None if baseline is None else _positive("baseline", baseline)
        self._state: dict[str, Any] = {
            "baseline": self.baseline,
            "ratio": self.start_ratio,
            "safe": [],  # ratios that were safe and not contradicted since, increasing
            "unsafe": None,  # the ratio that was not, if one bounds the search
            "raise": self.step,  # the next raise, where no unsafe ratio is known
            "good": 0,  # safe observations in a row at this ratio
            "waited": 0,  # of those, the ones since the search was done
        }

    @property
    def needs_baseline(self) -> bool:
        """True until the baseline is known."""
        return self._state["baseline"] is None

    @property
    def safe_ratio(self) -> float:
        """The largest ratio that was safe when it was last tried, with none below it unsafe since; 0 if none."""
        return self._state["safe"][-1] if self._state["safe"] else 0.0

    def ratio(self, step: int, total_steps: int) -> float:
        """The ratio under trial; it depends on what was observed, not on the step."""
        return 0.0 if self.needs_baseline else self._state["ratio"]

    def observe(self, metric: float) -> None:
        """Judge the present ratio by held-out perplexity under eviction; NaN and infinity are unsafe.

        Raises
        ------
        ConfigError
            If the first one, the baseline, is not a positive finite number.
        """
        state = self._state
        if state["baseline"] is None:
            state["baseline"] = _positive("baseline", metric)
        elif metric <= state["baseline"] * (1 + self.tolerance):
            self._was_safe()
        else:
            self._was_unsafe()

    def _was_safe(self) -> None:
        state = self._state
        ratio = state["ratio"]
        state["safe"] = [*(r for r in state["safe"] if r < ratio), ratio]
        state["good"] += 1
        if state["good"] < self.patience:
            return
        bound = state["unsafe"]
        if bound is not None and bound - ratio <= self.min_step * 1.001:  # found; the factor is for rounding
            state["waited"] += 1
            if state["waited"] < self.retry_after:
                return
            state["unsafe"] = bound = None
            state["raise"] = self.min_step
        raised = min(ratio + state["raise"], self.max_ratio)
        if bound is None:
            state["raise"] = min(2 * state["raise"], self.step)
        else:
            raised = min(raised, max((ratio + bound) / 2, ratio + self.min_step))
        self._move(raised)

    def _was_unsafe(self) -> None:
        state = self._state
        ratio = state["ratio"]
        state["safe"] = [r for r in state["safe"] if r < ratio]
        # Also where there is nowhere lower to go, at 0: what was good before is no longer in a row with what comes.
        state.update({"unsafe": ratio, "raise": self.step, "good": 0, "waited": 0})
        self._move(self.safe_ratio)

    def _move(self, ratio: float) -> None:
        if ratio != self._state["ratio"]:
            self._state.update(ratio=round(ratio, 12), good=0, waited=0)

    def state_dict(self) -> dict[str, Any]:
        """Everything the search remembers."""
        return {**self._state, "safe": list(self._state["safe"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        check_keys(self, state, self._state)
        self._state = {**state, "safe": list(state["safe"])}


def _positive(field: str, value: Any, or_zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not or_zero):
        allowed = ">= 0" if or_zero else "> 0"
        raise ConfigError(f"curriculum adaptive: {field} must be a number {allowed}, got {value!r}")
    return float(value)


def _count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"curriculum adaptive: {field} must be a whole number >= 1, got {value!r}")
    return value
