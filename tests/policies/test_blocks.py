"""Block dropout: layouts by hand, exact counts, what always stays, and draws that no batching changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenContext, TokenRow
from sparsekv.policies.blocks import (
    BlockDropout,
    Middle,
    VariableBlockDropout,
    drop_ranks,
    grid_edges,
    middle_of,
)
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import row_generator


def row(n: int, seed: int = 0, layers: int = 2, heads: int = 3) -> TokenRow:
    ids = torch.zeros(1, n, dtype=torch.long)
    return TokenContext(ids, torch.ones_like(ids).bool(), layers, heads, seeds=(seed,)).rows()[0]


def runs(kept: torch.Tensor) -> list[tuple[int, int]]:
    """The evicted runs [first, end) of one head."""
    gone, found, start = (~kept).tolist(), [], None
    for i, out in enumerate([*gone, False]):
        if out and start is None:
            start = i
        elif not out and start is not None:
            found.append((start, i))
            start = None
    return found


# ---- the arithmetic, by hand ----


def test_drop_ranks_by_hand() -> None:
    # segments [0,2) [2,5) [5,6); the middle one leaves first, its last entry first of all
    edges = torch.tensor([0, 2, 5, 6])
    assert drop_ranks(edges, torch.tensor([1, 2, 0])).tolist() == [5, 4, 2, 1, 0, 3]
    both = drop_ranks(edges, torch.tensor([[[0, 1, 2]], [[2, 1, 0]]]))
    assert both.tolist() == [[[1, 0, 4, 3, 2, 5]], [[5, 4, 3, 2, 1, 0]]]


def test_grid_is_absolute_and_cut_at_the_borders() -> None:
    assert grid_edges(2, 17, 4).tolist() == [0, 2, 6, 10, 14, 15]  # columns 2 4 8 12 16 17
    assert grid_edges(4, 8, 4).tolist() == [0, 4]
    assert grid_edges(5, 5, 4).tolist() == [0]


@pytest.mark.parametrize(
    ("n", "budget", "n_sink", "n_recent", "expected"),
    [
        (100, Budget(0.5), 4, 10, Middle(4, 90, 50)),
        (100, Budget(0.5), 4, None, Middle(4, 77, 50)),  # 50 - 4 = 46 left, half of it recent
        (1000, Budget(0.5), 4, None, Middle(4, 936, 500)),  # 64 recent
        (100, Budget(0.9), 4, None, Middle(4, 97, 91)),  # int(100 * (1 - 0.9)) is 9, 5 left, 3 recent
        (10, Budget(0.0), 4, 64, Middle(4, 4, 0)),
        (100, Budget(tokens=14), 4, 10, Middle(4, 90, 86)),
    ],
)
def test_the_middle_by_hand(n: int, budget: Budget, n_sink: int, n_recent: Any, expected: Middle) -> None:
    assert middle_of("m", budget, n, n_sink, n_recent) == expected


def test_the_drawn_order_decides_which_blocks_leave() -> None:
    """20 tokens, 2 sinks, 3 recent, blocks of 4: columns 2-3, 4-7, 8-11, 12-15, 16; 10 leave."""
    for seed in range(8):
        kept = BlockDropout(4, 2, 3).keep_row(row(20, seed), Budget(0.5))
        order = torch.rand(1, 1, 5, dtype=torch.float64, generator=row_generator(0, seed)).argsort().flatten()
        left, gone = 10, set()
        for block in order.tolist():
            first, end = [(2, 4), (4, 8), (8, 12), (12, 16), (16, 17)][block]
            take = min(left, end - first)
            gone |= set(range(end - take, end))
            left -= take
        assert kept.shape == (1, 1, 20)
        assert set((~kept[0, 0]).nonzero().flatten().tolist()) == gone


def test_variable_layout_by_hand() -> None:
    policy = VariableBlockDropout(3, 5)
    sizes = torch.randint(3, 6, (7,), generator=row_generator(1, 2)).tolist()
    edges = policy.layout(20, row_generator(1, 2)).tolist()
    expected = [0]
    while expected[-1] + sizes[len(expected) - 1] < 20:
        expected.append(expected[-1] + sizes[len(expected) - 1])
    assert edges == [*expected, 20]
    assert VariableBlockDropout(4, 4).layout(10, row_generator(0, 0)).tolist() == [0, 4, 8, 10]
    assert VariableBlockDropout(16, 128).layout(9, row_generator(0, 0)).tolist() == [0, 9]


def test_variable_lengths_are_all_equally_likely() -> None:
    policy = VariableBlockDropout(2, 4)
    sizes = torch.cat([policy.layout(999, row_generator(0, s)).diff()[:-1] for s in range(40)])
    counts = torch.bincount(sizes, minlength=5)
    assert counts[:2].sum() == 0 and counts.shape == (5,)
    assert (counts[2:].float() / sizes.numel() - 1 / 3).abs().max() < 0.02  # 13,000 of them: 5 sigma


# ---- invariants ----

POLICIES = st.one_of(
    st.builds(
        BlockDropout,
        block_size=st.integers(1, 40),
        n_sink=st.integers(0, 6),
        n_recent=st.none() | st.integers(0, 12),
        seed=st.integers(0, 3),
        share=st.sampled_from(["all", "layer", "head"]),
    ),
    st.builds(
        lambda lo, more, **rest: VariableBlockDropout(lo, lo + more, **rest),
        st.integers(1, 20),
        st.integers(0, 30),
        n_sink=st.integers(0, 6),
        n_recent=st.none() | st.integers(0, 12),
        seed=st.integers(0, 3),
        share=st.sampled_from(["all", "layer", "head"]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(policy=POLICIES, n=st.integers(1, 200), ratio=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_counts_are_exact_and_the_ends_stay(policy: Any, n: int, ratio: float, seed: int) -> None:
    total = max(1, int(n * (1 - ratio)))
    n_recent = policy.n_recent or 0
    if total < min(n, policy.n_sink + n_recent):
        with pytest.raises(ConfigError, match=r"is under n_sink="):
            policy.keep_row(row(n, seed), Budget(ratio))
        return
    kept = policy.keep_row(row(n, seed), Budget(ratio))
    assert kept.shape == {"all": (1, 1, n), "layer": (2, 1, n), "head": (2, 3, n)}[policy.share]
    assert (kept.sum(-1) == total).all()
    assert kept[..., : policy.n_sink].all() and kept[..., n - n_recent :].all()
    if policy.n_recent is None:
        left = max(0, total - policy.n_sink)
        assert kept[..., n - min(64, left - left // 2) :].all()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 30), n=st.integers(20, 150), ratio=st.floats(0.05, 0.9), seed=st.integers(0, 9))
def test_only_one_block_leaves_in_part(size: int, n: int, ratio: float, seed: int) -> None:
    kept = BlockDropout(size, 0, 0).keep_row(row(n, seed), Budget(ratio))[0, 0]
    cut = []
    for first in range(0, n, size):
        block = kept[first : first + size]
        if block.any() and not block.all():
            cut.append(block.tolist())
    assert len(cut) <= 1
    assert all(block == sorted(block, reverse=True) for block in cut), "its beginning stays"


@pytest.mark.parametrize("policy", [BlockDropout(8, 2, 3), VariableBlockDropout(3, 9, 2, 3, share="head")])
def test_a_padded_batch_draws_what_each_row_draws_alone(policy: Any) -> None:
    pads, seeds, n = (0, 7, 31), (5, 6, 7), 60
    ids = torch.zeros(3, n, dtype=torch.long)
    mask = torch.stack([torch.arange(n) >= pad for pad in pads])
    together = policy.select(TokenContext(ids, mask, 2, 3, seeds=seeds), Budget(0.5)).kept_at(n)
    for i, (pad, seed) in enumerate(zip(pads, seeds, strict=True)):
        alone = policy.keep_row(row(n - pad, seed), Budget(0.5))
        assert torch.equal(together[i, ..., pad:], alone) and not together[i, ..., :pad].any()
    same = policy.select(TokenContext(ids, torch.ones_like(mask), 2, 3, seeds=(5, 5, 6)), Budget(0.5))
    assert torch.equal(same.evicted_at[0], same.evicted_at[1])
    assert not torch.equal(same.evicted_at[0], same.evicted_at[2])


def test_sharing_and_seeds() -> None:
    one = row(400, layers=4, heads=3)
    for share, different in (("all", 1), ("layer", 4), ("head", 12)):
        kept = BlockDropout(8, share=share).keep_row(one, Budget(0.5)).reshape(-1, 400)
        assert len({tuple(head.tolist()) for head in kept}) == different
    draws = {
        tuple(BlockDropout(8, seed=s).keep_row(row(400, seed=r), Budget(0.5))[0, 0].tolist())
        for s in range(5)
        for r in range(5)
    }
    assert len(draws) == 25


def test_every_block_leaves_equally_often() -> None:
    gone = torch.zeros(160)
    for seed in range(600):
        gone += ~BlockDropout(16, 0, 0).keep_row(row(160, seed), Budget(0.5))[0, 0]
    assert (gone / 600 - 0.5).abs().max() < 0.1  # 5 sigma


def test_runs_of_blocks_are_seen_as_whole_blocks() -> None:
    kept = BlockDropout(16, 0, 0).keep_row(row(160, 1), Budget(0.5))[0, 0]
    assert all(first % 16 == 0 and end % 16 == 0 for first, end in runs(kept)) and runs(kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockDropout(0), "block_dropout: block_size must be a whole number >= 1, got 0"),
        (lambda: BlockDropout(n_sink=-1), "n_sink must be a whole number >= 0, got -1"),
        (lambda: BlockDropout(n_recent=2.5), "n_recent must be a whole number >= 0, got 2.5"),
        (
            lambda: BlockDropout(share="heads"),
            r"unknown share of block_dropout 'heads' \(did you mean 'head'\?\)",
        ),
        (lambda: VariableBlockDropout(9, 8), "max_block=8 must be at least min_block=9"),
        (lambda: BlockDropout().keep_row(row(9), Budget()), "block_dropout needs a budget"),
        (
            lambda: BlockDropout(n_recent=64).keep_row(row(100), Budget(0.5)),
            r"a budget of 50 entries \(compression_ratio=0.5 of 100 tokens\) is under n_sink=4 \+ n_recent=64",
        ),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
