"""The controller reaches its target for any distribution of scores, and holds memory between rounds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import keep_top
from sparsekv.policies.budget import Budget
from sparsekv.relevance.threshold import ByQuantile, ThresholdController, keep_above_quantile

L, H = 3, 2


def drawn(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """log r of very different distributions."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(shape, generator=generator)
    return {
        "uniform": lambda: u.clamp_min(1e-6).log(),
        "constant": lambda: torch.full(shape, -0.7),
        "two values": lambda: torch.where(u < 0.2, -0.1, -3.0),
        "heavy tail": lambda: -(u.clamp(1e-6, 1 - 1e-6) ** -3.0),
        "saturated": lambda: torch.nn.functional.logsigmoid(torch.full(shape, 40.0)),
        "layers apart": lambda: u.log().clamp_min(-20) - 30 * torch.arange(shape[0]).view(-1, 1, 1),
    }[kind]()


KINDS = ("uniform", "constant", "two values", "heavy tail", "saturated", "layers apart")


def segments(scores: torch.Tensor) -> list[list[torch.Tensor]]:
    return [list(layer) for layer in scores]


def count(kept: list[list[torch.Tensor]]) -> int:
    return sum(int(head.sum()) for layer in kept for head in layer)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 60),
    st.floats(0, 0.99),
    st.integers(0, 99),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_the_target_is_met_exactly_whatever_the_scores(kind, n, ratio, seed, n_layers, heads):
    scores = drawn(kind, (n_layers, heads, n), seed)
    controller = ThresholdController(Budget(ratio))
    kept = controller.cut(segments(scores), n)
    wanted = max(1, int(n * (1 - ratio))) * n_layers * heads
    if kept is None:
        assert wanted == n * n_layers * heads
        return
    assert count(kept) == wanted
    assert all(bool(head.any()) for layer in kept for head in layer), "no head is emptied"
    assert controller.rows[0].q == pytest.approx(1 - wanted / (n * n_layers * heads))
    # nothing that leaves scores above the quantile, nothing that stays below it but a head's best
    quantile = controller.rows[0].log_quantile
    for layer, of_layer in zip(scores, kept, strict=True):
        for head, stays in zip(layer, of_layer, strict=True):
            assert not bool((head[~stays] > quantile).any())
            low = head[stays] < quantile
            assert not bool(low.any()) or (int(stays.sum()) == 1 and bool((head <= head[stays]).all()))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 50), st.floats(0.05, 0.95), st.integers(0, 99))
def test_without_ties_it_is_the_top_of_all_layers(n, ratio, seed):
    noise = torch.randperm(L * H * n, generator=torch.Generator().manual_seed(seed)).float()
    scores = -(noise + 1).view(L, H, n) / 7
    kept = ThresholdController(Budget(ratio)).cut(segments(scores), n)
    wanted = keep_top(scores[None], Budget(ratio, scope="model"))[0]
    if kept is None:
        assert bool(wanted.all())
    else:
        assert torch.equal(torch.stack([torch.stack(layer) for layer in kept]), wanted)


def test_equal_scores_go_by_age():
    kept = ThresholdController(Budget(tokens=3)).cut(segments(torch.full((2, 2, 8), -1.0)), 8)
    for layer in kept:
        for head in layer:
            assert head.tolist() == [False] * 5 + [True] * 3
    # on the threshold only: two better ones are older, of the equals the newest fill up
    scores = torch.tensor([-0.5, -2.0, -2.0, -0.1, -2.0, -2.0])
    found, quantile = keep_above_quantile(scores, [6], 4)
    assert quantile == -2.0 and found.tolist() == [True, False, False, True, True, True]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.integers(0, 160),
    st.integers(0, 99),
    st.sampled_from([1, 3]),
)
def test_ragged_segments_of_any_sizes(sizes, n_kept, seed, levels):
    """Few levels: many ties. Protected entries may even be infinite."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 3, (sum(sizes),), generator=generator).float()
    scores[scores == levels + 2] = torch.inf
    kept, _ = keep_above_quantile(scores, sizes, n_kept)
    assert int(kept.sum()) == min(max(n_kept, len(sizes)), sum(sizes))
    for part, of_part in zip(kept.split(sizes), scores.split(sizes), strict=True):
        assert bool(part.any()) and float(of_part[part].max()) == float(of_part.max())
    again, _ = keep_above_quantile(scores.clone(), sizes, n_kept)
    assert torch.equal(kept, again), "deterministic"


@pytest.mark.parametrize("sizes", [[3, 3], [2, 4]])
def test_every_segment_keeps_its_best_also_among_infinite_scores(sizes):
    scores = torch.full((6,), math.inf)
    scores[0] = 0.0
    kept, quantile = keep_above_quantile(scores, sizes, 3)
    assert quantile == math.inf and int(kept.sum()) == 3
    assert all(part[-1] for part in kept.split(sizes)), "the newest of equals is the best"
    with_empty, _ = keep_above_quantile(torch.tensor([1.0, 2, 5, 4]), [0, 2, 0, 2], 3)
    assert with_empty.tolist() == [False, True, True, True]
    lowest, _ = keep_above_quantile(torch.tensor([9.0, 8, 7, 1, 3, 2]), [3, 3], 1)
    assert lowest.tolist() == [True, False, False, False, True, False], "one per segment, whatever is asked"


def test_beta_moves_a_layers_threshold_by_hand():
    """r of both layers: .9 .6 .3; with beta = 2 for layer 1 its r counts half: .45 .3 .15. Four places of six."""
    r = torch.tensor([0.9, 0.6, 0.3]).log()
    controller = ThresholdController(Budget(tokens=2), betas=(1.0, 2.0))
    kept = controller.cut([[r], [r]], 3)
    assert [kept[0][0].tolist(), kept[1][0].tolist()] == [[True, True, True], [True, False, False]]
    quantile = math.exp(controller.rows[0].log_quantile)
    assert quantile == pytest.approx(0.3)
    tau = controller.thresholds(2)
    torch.testing.assert_close(tau, torch.tensor([0.3, 0.6]))
    # the same where the scores have the factor in them already, as those of `atskv` have
    ranked = ThresholdController(Budget(tokens=2))
    assert ranked.cut([[r], [r - math.log(2)]], 3)[1][0].tolist() == [True, False, False]
    torch.testing.assert_close(ranked.thresholds(2, betas=(1.0, 2.0)), tau)
    # r > tau, but for the equals on the threshold, which age decides
    assert (r[kept[1][0]].exp() > tau[1]).all() and not (r[~kept[1][0]].exp() > tau[1] + 1e-6).any()


def test_thresholds_are_those_that_decided_also_where_a_beta_is_below_one():
    """r / beta passes 1 there; and where only what always stays is left, nothing else can pass."""
    draw = torch.Generator().manual_seed(0)
    r = 0.8 + 0.2 * torch.rand(2, 20, generator=draw)
    controller = ThresholdController(Budget(compression_ratio=0.5), betas=(0.5, 0.52))
    kept = controller.cut([[layer.log()] for layer in r], 20)
    for layer, (stays,), tau in zip(r, kept, controller.thresholds(2), strict=True):
        others = layer < layer.max()  # the best of a head stays in any case
        assert (layer[stays & others] > tau - 1e-6).all() and (layer[~stays] <= tau + 1e-6).all()
    assert kept[0][0].sum() > 10 > kept[1][0].sum() > 1
    always = torch.tensor([-0.1, 1e6, 1e6 + 1])
    for betas in ((0.5, 0.52), (2.0, 3.0), ()):
        controller = ThresholdController(Budget(tokens=1), betas=betas)
        controller.cut([[always], [always]], 3)
        assert controller.thresholds(2).isinf().all()


def test_bytes_and_entries_both_limit():
    controller = ThresholdController(Budget(tokens=10), max_bytes=64 * 7 + 5, entry_bytes=64)
    assert controller.allowed(100, 1) == 7 and controller.allowed(100, 3) == 7
    assert controller.allowed(4, 1) == 4, "a budget above the context keeps everything"
    alone = ThresholdController(max_bytes=640, entry_bytes=64)
    kept = alone.cut(segments(drawn("uniform", (2, 2, 9), 0)), 9)
    assert count(kept) == 10
    assert ThresholdController(max_bytes=1, entry_bytes=64).cut(segments(torch.zeros(2, 2, 9)), 9) is not None
    assert count(ThresholdController(max_bytes=1, entry_bytes=64).cut(segments(torch.zeros(2, 2, 9)), 9)) == 4


def test_bounds_spread_an_excess_over_rounds():
    controller = ThresholdController(Budget(0.875), bounds=(0.0, 0.5))
    scores, sizes = segments(drawn("uniform", (2, 2, 100), 1)), []
    for _ in range(6):
        kept = controller.cut(scores, 100)
        if kept is None:
            break
        sizes.append(count(kept))
        scores = [[h[k] for h, k in zip(a, b, strict=True)] for a, b in zip(scores, kept, strict=True)]
    assert sizes == [200, 100, 50, 48] and controller.rows[0].rounds == 4
    assert controller.rows[0].q == 0.0, "within the limit nothing leaves"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([Budget(0.75), Budget(0.5), Budget(0.9), Budget(tokens=64)]),
    st.sampled_from(KINDS),
    st.integers(1, 64),
    st.integers(0, 99),
    st.sampled_from([1, 2, 5]),
)
def test_memory_stays_within_budget_while_decoding(budget, kind, every, seed, step):
    """After every step the limit holds, before eviction it is passed by one step's tokens at most; rounds are rare."""
    controller = ThresholdController(budget)
    context, n_steps = 300, 120
    fresh = drawn(kind, (L, H, context + n_steps * step), seed)
    scores = segments(fresh[..., :context])
    kept = controller.cut(scores, context)
    scores = [[h[k] for h, k in zip(a, b, strict=True)] for a, b in zip(scores, kept, strict=True)]
    n_segments, before = L * H, controller.rows[0].rounds
    for i in range(n_steps):
        seen = context + (i + 1) * step
        new = fresh[..., seen - step : seen]
        scores = [
            [torch.cat([h, n]) for h, n in zip(a, b, strict=True)] for a, b in zip(scores, new, strict=True)
        ]
        in_use = sum(len(h) for layer in scores for h in layer)
        limit = controller.allowed(seen, n_segments)
        assert in_use <= limit + step * n_segments
        kept = controller.cut(scores, seen, every=every)
        if kept is not None:
            scores = [[h[k] for h, k in zip(a, b, strict=True)] for a, b in zip(scores, kept, strict=True)]
        stored = sum(len(h) for layer in scores for h in layer)
        assert stored <= limit
        target = 1 - limit / (seen * n_segments)
        assert 1 - stored / (seen * n_segments) == pytest.approx(target, abs=0.02)
    rounds = controller.rows[0].rounds - before
    if every == 1:
        assert rounds >= 0.5 * n_steps * step / (step + 1)
    if every >= 8 and step == 1:
        assert rounds <= n_steps / 2, "hysteresis: not at every step"


def test_rows_have_states_of_their_own_and_the_state_can_be_saved():
    controller = ThresholdController(Budget(0.5))
    controller.cut(segments(drawn("uniform", (L, H, 20), 0)), 20, row=0)
    controller.cut(segments(drawn("heavy tail", (L, H, 30), 1)), 30, row=1)
    first, second = controller.rows[0], controller.rows[1]
    assert first.in_use == 120 and second.allowed == 90 and first.log_quantile != second.log_quantile
    saved = json.loads(json.dumps(controller.state_dict()))
    other = ThresholdController(Budget(0.5))
    other.load_state_dict(saved)
    assert other.rows == controller.rows and torch.equal(other.thresholds(L, 1), controller.thresholds(L, 1))
    other.reorder(torch.tensor([1, 1, 0]))
    assert other.rows == {0: second, 1: second, 2: first}
    more = segments(drawn("two values", (L, H, 40), 2))
    for a, b in zip(controller.cut(more, 40), other.cut(more, 40), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "decisions need no state"


def test_a_choice_over_layers_waits_for_the_last():
    scores = drawn("uniform", (L, H, 30), 3)
    choice = ByQuantile(L, ThresholdController(Budget(0.7)))
    assert choice.after_layer(scores[0]) == {} and choice.after_layer(scores[1]) == {}
    found = choice.after_layer(scores[2])
    wanted = keep_top(scores[None], Budget(0.7, scope="model"))[0]
    assert torch.equal(torch.stack([found[place] for place in range(L)]), wanted)
    whole = ByQuantile(1, ThresholdController(Budget(0.0))).after_layer(scores[0])
    assert bool(whole[0].all())


def test_a_score_that_is_no_number_is_never_chosen_by():
    scores = torch.zeros(L, H, 10)
    scores[1, 0, 3] = math.nan
    with pytest.raises(ConfigError, match="compressible layer 1 are NaN"):
        ThresholdController(Budget(0.5)).cut(segments(scores), 10)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({}, "needs a budget"),
        ({"max_bytes": 100}, "max_bytes needs entry_bytes"),
        ({"max_bytes": 0, "entry_bytes": 4}, "max_bytes must be a whole number >= 1"),
        (
            {"budget": Budget(0.5), "bounds": (0.5, 0.2)},
            "bounds must be .low, high. with 0 <= low <= high <= 1",
        ),
        ({"budget": Budget(0.5), "hysteresis": 1.0}, r"hysteresis must be in \[0, 1\)"),
        ({"budget": Budget(0.5), "betas": (1.0, 0.0)}, "betas must be numbers over 0"),
    ],
)
def test_mistakes_are_told(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ThresholdController(**settings_)


def test_betas_for_another_number_of_layers_are_told():
    with pytest.raises(ConfigError, match="2 betas for 3 layers"):
        ThresholdController(Budget(0.5), betas=(1.0, 1.0)).cut(segments(torch.zeros(3, 1, 10)), 10)
