"""LaCache's ladder: counts of the released code, drawn patterns, exact budgets, what streaming keeps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenContext, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.ladder import Ladder, ladders


def row_of(n: int, layers: int, compressible: tuple[int, ...] | None = None) -> TokenRow:
    ids = torch.zeros(1, n, dtype=torch.long)
    return TokenContext(ids, torch.ones_like(ids).bool(), layers, 2, compressible=compressible).rows()[0]


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join(".#"[int(x)] for x in layer) for layer in mask]


def test_one_ladder_with_overlap() -> None:
    assert drawn(ladders(3, None, 6, *Ladder(span=3, overlap=1).shape_for(6))) == [
        "##.",
        "##.",
        "##.",
        ".##",
        ".##",
        ".##",
    ]


def test_ladders_without_overlap_leave_a_remainder_at_the_recent_end() -> None:
    assert drawn(ladders(7, None, 6, *Ladder(span=2).shape_for(6))) == [
        "#..#..#",
        "#..#..#",
        ".#..#.#",
        ".#..#.#",
        "..#..##",
        "..#..##",
    ]


@pytest.mark.parametrize(
    ("depth", "span", "overlap", "width", "kept"),
    [
        (32, 16, 0, 2, 1),
        (24, 9, 7, 9, 5),
        (32, 8, 4, 7, 2),
        (32, 9, 3, 5, 2),
        (28, 14, 0, 2, 1),
        (30, None, 0, 2, 1),
    ],
)
def test_width_and_count_of_the_published_settings(
    depth: int, span: int | None, overlap: int, width: int, kept: int
) -> None:
    assert Ladder(span=span, overlap=overlap).shape_for(depth) == (width, kept)


def test_a_policy_row_literal() -> None:
    # 4 layers, S = 2: W = 2, R = 1. 12 entries, half: 2 sinks, 2 recent (half of the 4 left), middle 8 -> 2.
    # To free 6: t = 1 (4 ladders of 2) frees 4, t = 2 (2 ladders of 3) 4, t = 3 (2 ladders of 4) 6.
    kept = Ladder(n_sink=2).keep_row(row_of(12, 4), Budget(tokens=6))
    assert kept.shape == (4, 1, 12)
    assert drawn(kept[:, 0]) == [
        "###...#...##",
        "##.#...#..##",
        "##..#...#.##",
        "##...#...###",
    ]


def test_the_last_ladder_is_partial_when_the_count_asks_for_it() -> None:
    # D = 6, S = 2: W = 3, R = 1, each ladder frees 2; to free 3 of 6 the second frees one.
    assert drawn(ladders(6, 3, 6, 3, 1)) == ["#..##.", "#..##.", ".#.##.", ".#..##", "..#.##", "..#.##"]


def test_a_middle_too_short_for_a_ladder() -> None:
    # m = 2 < W = 3: a run of one that moves from the first to the last entry with depth
    assert drawn(ladders(2, 1, 4, 3, 2)) == ["#.", "#.", ".#", ".#"]
    assert drawn(ladders(3, 0, 2, 2, 1)) == ["...", "..."]


def test_depth_counts_compressible_layers_only() -> None:
    kept = Ladder(n_sink=0, n_recent=0).keep_row(row_of(4, 5, compressible=(1, 3)), Budget(tokens=2))
    assert drawn(kept[:, 0]) == ["####", "#.#.", "####", ".#.#", "####"]


def test_one_layer_keeps_every_second_entry() -> None:
    kept = Ladder(n_sink=1, n_recent=1).keep_row(row_of(8, 1), Budget())
    assert drawn(kept[:, 0]) == ["##.#.#.#"]


@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(1, 300),
    ratio=st.floats(0, 0.99),
    depth=st.integers(1, 12),
    n_sink=st.integers(0, 6),
    data=st.data(),
)
def test_budget_exact_in_every_layer(
    n: int, ratio: float, depth: int, n_sink: int, data: st.DataObject
) -> None:
    span = data.draw(st.one_of(st.none(), st.integers(1, depth - 1))) if depth > 1 else None
    policy = Ladder(span=span, n_sink=n_sink, n_recent=data.draw(st.one_of(st.none(), st.integers(0, 5))))
    total = max(1, int(n * (1 - ratio)))
    fixed = n_sink + (policy.n_recent or 0)
    if total < min(fixed, n):
        with pytest.raises(ConfigError, match="n_sink"):
            policy.keep_row(row_of(n, depth), Budget(compression_ratio=ratio))
        return
    kept = policy.keep_row(row_of(n, depth), Budget(compression_ratio=ratio))[:, 0]
    assert kept.sum(-1).tolist() == [total] * depth
    assert bool(kept[:, :n_sink].all())
    if policy.n_recent:
        assert bool(kept[:, -policy.n_recent :].all())


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 200), depth=st.integers(2, 16), data=st.data())
def test_deeper_layers_keep_later_entries_and_together_all(m: int, depth: int, data: st.DataObject) -> None:
    span = data.draw(st.integers(1, depth - 1))
    overlap = data.draw(st.integers(0, span - 1))
    try:
        width, count = Ladder(span=span, overlap=overlap).shape_for(depth)
    except ConfigError:
        assert math.ceil(span / (span - overlap)) >= 1 + math.ceil((depth - span) / (span - overlap))
        return
    mask = ladders(m, None, depth, width, count)
    assert bool(mask.any(dim=0).all())  # every entry lives in some layer
    assert mask.sum(-1).unique().numel() == 1
    mean = [float(layer.nonzero().float().mean()) for layer in mask]
    assert all(a <= b for a, b in pairwise(mean))
    if m >= width:
        assert mean[0] < mean[-1]
    for entry in mask.T[:width]:  # each entry is kept in one contiguous range of layers
        layers = entry.nonzero().flatten().tolist()
        assert layers == list(range(layers[0], layers[-1] + 1))


def test_iterative_compaction_reaches_far_beyond_the_slots() -> None:
    slots, every, depth = 128, 8, 8
    policy, budget = Ladder(), Budget(tokens=slots)
    stored, seen = [torch.arange(slots) for _ in range(depth)], slots
    while seen < 2000:
        new = torch.arange(seen, seen + every)
        seen += every
        stored = [torch.cat([old, new]) for old in stored]
        kept = policy.keep_row(row_of(slots + every, depth), budget)[:, 0]
        stored = [old[mask] for old, mask in zip(stored, kept, strict=True)]
        assert {s.numel() for s in stored} == {slots}
    for layer in stored:
        assert layer[:4].tolist() == [0, 1, 2, 3] and layer[-8:].tolist() == list(range(1992, 2000))
        age = seen - 1 - layer[4:]
        assert int((age > slots).sum()) >= 32  # a window of 124 keeps none of these
        # the density falls off with age: more entries in each half of the span than in the next
        counts = [int(((age >= lo) & (age < lo + 64)).sum()) for lo in (0, 64, 128, 192)]
        assert counts == sorted(counts, reverse=True) and counts[0] > 1.5 * counts[2]
    union = torch.cat(stored).unique().numel()
    assert union > 1.3 * slots  # the layers keep different entries


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ladder(span=4, overlap=4), "overlap=4 must be under span=4"),
        (lambda: Ladder(span=0), "span must be a whole number >= 1, got 0"),
        (lambda: Ladder(n_sink=-2), "n_sink must be a whole number >= 0"),
        (lambda: Ladder(span=6).shape_for(6), "span=6, overlap=0 on 6 layers"),
        (lambda: Ladder(overlap=3).shape_for(6), "span=3, overlap=3 on 6 layers"),
        (
            lambda: Ladder(span=8, overlap=4).shape_for(10),
            "span=8 and overlap=4 on 10 layers keep all 2 entries",
        ),
        (
            lambda: Ladder(n_sink=9).keep_row(row_of(40, 4), Budget(tokens=8)),
            "budget of 8 entries .* n_sink=9",
        ),
        (
            lambda: Ladder(n_sink=4, n_recent=5).keep_row(row_of(40, 4), Budget(tokens=8)),
            r"budget of 8 entries .* n_sink=4 \+ n_recent=5",
        ),
    ],
)
def test_mistakes(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
