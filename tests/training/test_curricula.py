"""Curricula: ratios worked out by hand, and the adaptive search on a loss curve whose answer is known."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.training.curricula import (
    CURRICULA,
    AdaptiveCurriculum,
    CosineCurriculum,
    Curriculum,
    FixedCurriculum,
    LinearCurriculum,
    StepCurriculum,
    make_curriculum,
)

ratios = st.floats(min_value=0, max_value=1, exclude_max=True)


def at(curriculum: Curriculum, *steps: int, total: int = 1000) -> list[float]:
    return [curriculum.ratio(step, total) for step in steps]


def test_linear_by_hand() -> None:
    curriculum = LinearCurriculum(start_ratio=0.0, end_ratio=0.5, warmup_steps=1000)
    assert at(curriculum, 0, 1, 250, 500, 1000, 5000, total=2000) == [0.0, 0.0005, 0.125, 0.25, 0.5, 0.5]
    # downwards, as a fraction of all steps, over all steps, and at once
    assert at(LinearCurriculum(0.8, 0.4, 0.5), 0, 50, 100, 200, total=200) == pytest.approx(
        [0.8, 0.6, 0.4, 0.4]
    )
    assert at(LinearCurriculum(0.2, 0.6), 0, 5, 10, total=10) == pytest.approx([0.2, 0.4, 0.6])
    assert at(LinearCurriculum(0.2, 0.6, 0), 0, 1) == [0.6, 0.6]


def test_cosine_by_hand() -> None:
    curriculum = CosineCurriculum(0.1, 0.7, 100)
    # 1 - cos(pi/3) = 1/2 and 1 - cos(pi/2) = 1, halved
    assert at(curriculum, 0, 50, 100, 101) == pytest.approx([0.1, 0.4, 0.7, 0.7])
    assert CosineCurriculum(0.0, 0.8, 3).ratio(1, 3) == pytest.approx(0.2)


def test_step_by_hand() -> None:
    stairs = StepCurriculum([10, 20, 30], [0.2, 0.5, 0.3])
    assert at(stairs, 0, 9, 10, 19, 20, 29, 30, 99) == [0.0, 0.0, 0.2, 0.2, 0.5, 0.5, 0.3, 0.3]
    assert at(StepCurriculum({0: 0.1, 5: 0.4}), 0, 4, 5) == [0.1, 0.1, 0.4]
    assert at(StepCurriculum({"0": 0.1, "5": 0.4}), 4, 5) == [0.1, 0.4]  # as JSON brings it back
    assert at(StepCurriculum([0.5], [0.6], start_ratio=0.1), 4, 5, total=10) == [0.1, 0.6]


def test_fixed_and_stateless() -> None:
    assert at(FixedCurriculum(0.3), 0, 10_000) == [0.3, 0.3]
    curriculum = FixedCurriculum(0.3)
    curriculum.observe(1e9)
    assert curriculum.ratio(1, 2) == 0.3
    assert curriculum.state_dict() == {}
    curriculum.load_state_dict({})
    with pytest.raises(ConfigError, match="state is that of another curriculum"):
        curriculum.load_state_dict(AdaptiveCurriculum().state_dict())


def test_keep_ratios_are_converted() -> None:
    made = make_curriculum("linear", initial_keep_ratio=0.9, min_keep_ratio=0.3, warmup_steps=100)
    assert made == LinearCurriculum(start_ratio=0.1, end_ratio=0.7, warmup_steps=100)
    assert make_curriculum("fixed", keep_ratio=0.25).ratio(0, 1) == 0.75
    stairs = make_curriculum("step", milestones=[0, 5], keep_ratios=[1.0, 0.4])
    assert at(stairs, 0, 5) == [0.0, 0.6]
    adaptive = make_curriculum("adaptive", initial_keep_ratio=0.9, min_keep_ratio=0.3, baseline=10.0)
    assert isinstance(adaptive, AdaptiveCurriculum)
    assert (adaptive.start_ratio, adaptive.max_ratio) == (0.1, 0.7)


def test_classes_take_keep_ratios_too() -> None:
    kinds: dict[str, Any] = {CURRICULA.get(name).__name__: CURRICULA.get(name) for name in CURRICULA}
    for name in ("LinearCurriculum", "CosineCurriculum", "SpreadCurriculum"):
        made = kinds[name](start_keep_ratio=0.9, end_keep_ratio=0.3, warmup_steps=100)
        assert made == kinds[name](start_ratio=0.1, end_ratio=0.7, warmup_steps=100)
        assert copy.deepcopy(made) == made
    assert kinds["FixedCurriculum"](keep_ratio=0.25).ratio(0, 1) == 0.75
    assert at(kinds["StepCurriculum"]([0, 5], keep_ratios=[1.0, 0.4]), 0, 5) == [0.0, 0.6]
    adaptive = kinds["AdaptiveCurriculum"](initial_keep_ratio=0.9, min_keep_ratio=0.3)
    assert (adaptive.start_ratio, adaptive.max_ratio) == (0.1, 0.7)
    assert list(inspect.signature(LinearCurriculum).parameters) == [
        "start_ratio",
        "end_ratio",
        "warmup_steps",
    ]
    with pytest.raises(ConfigError, match="curriculum cosine: end_ratio is given twice"):
        kinds["CosineCurriculum"](end_ratio=0.7, min_keep_ratio=0.3)
    with pytest.raises(TypeError, match="keep_ratio"):
        kinds["LinearCurriculum"](keep_ratio=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedCurriculum(1.0), r"curriculum fixed: ratio must be in \[0, 1\).*got 1.0"),
        (lambda: LinearCurriculum(start_ratio=-0.1), "linear: start_ratio.*got -0.1"),
        (lambda: LinearCurriculum(end_ratio=math.nan), "end_ratio.*got nan"),
        (lambda: CosineCurriculum(end_ratio=1.5), "cosine: end_ratio.*got 1.5"),
        (lambda: LinearCurriculum(warmup_steps=-1), "warmup_steps must be steps"),
        (lambda: LinearCurriculum(warmup_steps=2.5), "warmup_steps must be steps"),
        (lambda: StepCurriculum([1, 2], [0.5]), "2 milestones but 1 ratios"),
        (lambda: StepCurriculum([2, 1], [0.5, 0.6]), "must increase"),
        (lambda: StepCurriculum([0.5, 10], [0.5, 0.6]), "all in steps or all fractions"),
        (lambda: StepCurriculum([1], [1]), r"ratios must be in \[0, 1\)"),
        (lambda: AdaptiveCurriculum(max_ratio=1.0), "adaptive: max_ratio"),
        (
            lambda: AdaptiveCurriculum(start_ratio=0.5, max_ratio=0.4),
            "start_ratio 0.5 is above max_ratio 0.4",
        ),
        (lambda: AdaptiveCurriculum(step=0.01, min_step=0.02), "min_step <= step"),
        (lambda: AdaptiveCurriculum(tolerance=-1), "tolerance must be a number >= 0, got -1"),
        (lambda: AdaptiveCurriculum(patience=0), "patience must be a whole number >= 1"),
        (lambda: make_curriculum("linaer"), "unknown curriculum 'linaer' .did you mean 'linear'"),
        (lambda: make_curriculum("linear", end_ration=0.3), "did you mean 'end_ratio'"),
        (lambda: make_curriculum("linear", keep_ratio=0.3), "unknown argument of curriculum linear"),
        (lambda: make_curriculum("fixed"), "ratio"),
        (lambda: make_curriculum("fixed", keep_ratio=0.0), r"keep_ratio must be in \(0, 1\]"),
        (lambda: make_curriculum("linear", min_keep_ratio=0.3, end_ratio=0.7), "end_ratio is given twice"),
    ],
)
def test_mistakes_are_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@given(start=ratios, end=ratios, warmup=st.integers(0, 50), step=st.integers(0, 100))
def test_ramps_stay_between_their_ends(start: float, end: float, warmup: int, step: int) -> None:
    for kind in (LinearCurriculum, CosineCurriculum):
        ratio = kind(start, end, warmup).ratio(step, 100)
        assert min(start, end) - 1e-12 <= ratio <= max(start, end) + 1e-12
        assert 0 <= ratio < 1


def perplexity(ratio: float, limit: float, base: float = 10.0, tolerance: float = 0.05) -> float:
    """Flat, then rising; exactly `base * (1 + tolerance)` at the largest safe ratio `limit`."""
    return base * (1 + tolerance * math.exp(8 * (ratio - limit)))


def run(curriculum: AdaptiveCurriculum, limit: float, rounds: int) -> list[float]:
    """Ratios that were tried against a model whose largest safe ratio is `limit`."""
    tried = []
    for _ in range(rounds):
        tried.append(curriculum.ratio(0, 1))
        curriculum.observe(perplexity(tried[-1], limit))
    return tried


@pytest.mark.parametrize("limit", [0.07, 0.333, 0.55, 0.72, 0.888])
def test_adaptive_finds_the_largest_safe_ratio(limit: float) -> None:
    curriculum = AdaptiveCurriculum(max_ratio=0.95, baseline=10.0, tolerance=0.05, step=0.05, min_step=0.01)
    tried = run(curriculum, limit, 60)
    assert len(set(tried)) > 3  # it moves
    assert limit - 0.0101 <= curriculum.safe_ratio <= limit
    late = tried[-20:]
    assert max(late) <= limit + 0.02 and min(late) >= limit - 0.02
    # it trains at a safe ratio more often than it tries an unsafe one
    assert sum(ratio <= limit for ratio in late) >= 12


def test_adaptive_by_hand() -> None:
    curriculum = AdaptiveCurriculum(0.1, 0.9, 0.1, baseline=10.0, step=0.1, min_step=0.05, retry_after=2)
    verdicts = [10.9, 11.0, 11.1, 10.0, 10.5, 10.5, 10.5, 12.0]
    tried = []
    for verdict in verdicts:
        tried.append(curriculum.ratio(0, 1))
        curriculum.observe(verdict)
    # 0.1 ok, 0.2 ok (exactly the limit), 0.3 not: back to 0.2, half way 0.25, found; waits for two, tries 0.3 again:
    # the model has learned, so on by min_step to ... and 12.0 brings it back to 0.3
    assert tried == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.25, 0.25, 0.3, 0.4])
    assert curriculum.ratio(0, 1) == pytest.approx(0.3)
    assert curriculum.safe_ratio == pytest.approx(0.3)


def test_adaptive_comes_down_after_a_regression_and_up_again() -> None:
    curriculum = AdaptiveCurriculum(baseline=10.0, tolerance=0.05)
    run(curriculum, 0.6, 40)
    high = curriculum.safe_ratio
    assert high > 0.58
    tried = run(curriculum, 0.2, 40)
    assert curriculum.safe_ratio <= 0.2 and tried[-1] <= 0.22
    run(curriculum, -1.0, 40)  # the model is worse than the baseline even with the full cache
    assert curriculum.ratio(0, 1) == 0.0
    assert curriculum.safe_ratio == 0.0
    run(curriculum, 0.5, 60)
    assert 0.48 <= curriculum.safe_ratio <= 0.5


def test_adaptive_never_ratchets() -> None:
    """A model that gets a little worse at every look must not drag the bar along with it."""
    curriculum = AdaptiveCurriculum(tolerance=0.05, patience=1)
    assert curriculum.needs_baseline and curriculum.ratio(0, 1) == 0.0
    curriculum.observe(10.0)
    assert not curriculum.needs_baseline
    metric = 10.0
    for _ in range(50):
        metric *= 1.01
        curriculum.observe(metric)
    # 1.01 ** 5 > 1.05: a bar that followed the metric would have let it rise to the end
    assert curriculum.state_dict()["baseline"] == 10.0
    assert curriculum.ratio(0, 1) == 0.0


def test_adaptive_patience_and_bad_metrics() -> None:
    curriculum = AdaptiveCurriculum(0.1, baseline=10.0, patience=3)
    for _ in range(2):
        curriculum.observe(10.0)
    assert curriculum.ratio(0, 1) == 0.1
    curriculum.observe(10.0)
    assert curriculum.ratio(0, 1) == pytest.approx(0.15)
    for bad in (math.nan, math.inf):
        curriculum.observe(bad)
    assert curriculum.ratio(0, 1) == 0.0
    with pytest.raises(ConfigError, match="baseline must be a number > 0, got nan"):
        AdaptiveCurriculum().observe(math.nan)


@given(st.lists(st.floats(8, 14), max_size=60), st.integers(0, 60))
def test_adaptive_state_round_trips_through_json(metrics: list[float], cut: int) -> None:
    """Interrupted anywhere and resumed, it makes the same choices."""
    whole = AdaptiveCurriculum(patience=2)
    first = AdaptiveCurriculum(patience=2)
    for metric in metrics[:cut]:
        whole.observe(metric)
        first.observe(metric)
    resumed = AdaptiveCurriculum(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for metric in metrics[cut:]:
        assert 0 <= whole.ratio(0, 1) <= 0.9
        whole.observe(metric)
        resumed.observe(metric)
        assert resumed.ratio(0, 1) == whole.ratio(0, 1)
        assert resumed.safe_ratio == whole.safe_ratio
    with pytest.raises(ConfigError, match="another curriculum"):
        resumed.load_state_dict({})


def test_every_registered_curriculum_knows_its_name() -> None:
    for name in CURRICULA:
        assert CURRICULA.get(name).name == name
    assert [name for name in CURRICULA if CURRICULA.get(name).adaptive] == ["adaptive"]


def test_spread_fills_its_range_evenly_and_depends_on_the_step_alone() -> None:
    curriculum = make_curriculum("spread", start_ratio=0.1, end_ratio=0.6, top_ratio=0.9, warmup_steps=10)
    assert curriculum.ratio(0, 100) == 0.1
    # half way: the ramp is at 0.35, the range 0.15 wide; 5 * 0.618034 = 3.09017
    assert curriculum.ratio(5, 100) == pytest.approx(0.35 + 0.15 * 0.0901699)
    late = [curriculum.ratio(step, 100) for step in range(10, 110)]
    for quarter in range(4):
        inside = [r for r in late if 0.6 + 0.075 * quarter <= r < 0.6 + 0.075 * (quarter + 1)]
        assert 23 <= len(inside) <= 27
    assert late == [curriculum.ratio(step, 100) for step in range(10, 110)]
    with pytest.raises(ConfigError, match="top_ratio must be at least end_ratio"):
        make_curriculum("spread", end_ratio=0.6, top_ratio=0.5)


def test_spread_runs_with_the_full_cache_every_so_many_steps() -> None:
    arguments = {"start_ratio": 0.1, "end_ratio": 0.6, "top_ratio": 0.9, "warmup_steps": 10}
    plain, mixed = (
        make_curriculum("spread", **arguments),
        make_curriculum("spread", full_every=5, **arguments),
    )
    for step in range(40):
        wanted = 0.0 if step in (4, 9, 14, 19, 24, 29, 34, 39) else plain.ratio(step, 100)
        assert mixed.ratio(step, 100) == wanted
    for wrong in (-1, 2.5, True):
        with pytest.raises(ConfigError, match="full_every must be a whole number"):
            make_curriculum("spread", full_every=wrong)


@pytest.mark.parametrize("start_ratio", [0.0, 0.3])
def test_patience_counts_safe_observations_in_a_row(start_ratio: float) -> None:
    """At ratio 0 an unsafe observation has nowhere to go down to, and still breaks the row."""
    curriculum = AdaptiveCurriculum(start_ratio, step=0.1, patience=2, retry_after=1, baseline=10.0)
    found = []
    for metric in (10.0, 20.0, 10.0, 10.0):
        curriculum.observe(metric)
        found.append(curriculum.ratio(0, 1))
    assert found[:3] == [start_ratio, 0.0, 0.0], "never two in a row"
    assert found[3] > 0
