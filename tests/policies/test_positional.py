"""Masks of the position-only policies, written out by hand, and what must hold at any length and budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenContext, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.ladder import Ladder
from sparsekv.policies.picks import blocks_between, drawn, evenly, row_generator, spread_blocks
from sparsekv.policies.positional import Full, Random, SinkRecent, SlidingWindow, UniformMiddle
from sparsekv.selection import NEVER


def row_of(n: int, *, layers: int = 1, heads: int = 1, seed: int = 0) -> TokenRow:
    ids = torch.arange(n)[None]
    return TokenContext(ids, torch.ones_like(ids).bool(), layers, heads, seeds=(seed,)).rows()[0]


def kept(policy: TokenPolicy, n: int, budget: Budget | None = None) -> list[int]:
    mask = policy.keep_row(row_of(n), budget or Budget())
    assert mask.shape == (1, 1, n)
    return mask[0, 0].nonzero().flatten().tolist()


# ---- literal masks ----


def test_full_keeps_everything_under_any_budget() -> None:
    assert kept(Full(), 5, Budget(compression_ratio=0.9)) == [0, 1, 2, 3, 4]


def test_sink_recent_literal() -> None:
    # int(10 * 0.6) = 6: two sinks, the last four
    assert kept(SinkRecent(n_sink=2), 10, Budget(compression_ratio=0.4)) == [0, 1, 6, 7, 8, 9]
    assert kept(SinkRecent(n_sink=2, n_recent=3), 10) == [0, 1, 7, 8, 9]
    assert kept(SinkRecent(n_sink=0), 6, Budget(tokens=2)) == [4, 5]
    assert kept(SinkRecent(n_sink=4), 8, Budget(tokens=4)) == [0, 1, 2, 3]
    assert kept(SinkRecent(n_sink=2, n_recent=0), 5) == [0, 1]


def test_context_shorter_than_the_sinks() -> None:
    assert kept(SinkRecent(n_sink=4, n_recent=2), 3) == [0, 1, 2]
    assert kept(SinkRecent(n_sink=4), 3, Budget(tokens=8)) == [0, 1, 2]
    assert kept(UniformMiddle(n_sink=4, n_recent=3), 3, Budget(tokens=8)) == [0, 1, 2]
    assert kept(SinkRecent(n_sink=4), 0, Budget(tokens=8)) == []


def test_uniform_middle_by_budget_literal() -> None:
    # 2 sinks, 4 recent; of the middle 2..19 (blocks 0:2-3 1:4-7 2:8-11 3:12-15 4:16-19) 6 tokens: 2 of the
    # five, the middles of two halves: floor(5/4) = 1 and floor(15/4) = 3; the second is cut to two tokens.
    policy = UniformMiddle(n_sink=2, n_recent=4, block_size=4)
    assert kept(policy, 24, Budget(tokens=12)) == [0, 1, 4, 5, 6, 7, 12, 13, 20, 21, 22, 23]


def test_uniform_middle_default_recent_is_half_of_the_rest() -> None:
    # 11 - 2 sinks = 9: 5 recent (27..31) and 4 of the middle 2..26 (7 blocks, the middle one is block 3)
    policy = UniformMiddle(n_sink=2, block_size=4)
    assert kept(policy, 32, Budget(tokens=11)) == [0, 1, 12, 13, 14, 15, 27, 28, 29, 30, 31]


def test_uniform_middle_by_stride_uses_absolute_blocks() -> None:
    # Blocks of 4: every second one is 0, 2, 4; cut by the sink (0..1) and the recent window (18..19).
    policy = UniformMiddle(n_sink=2, n_recent=2, block_size=4, stride=2)
    assert kept(policy, 20) == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    # Absolute: a longer sink moves no block.
    longer = UniformMiddle(n_sink=5, n_recent=2, block_size=4, stride=2)
    assert kept(longer, 20) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 16, 17, 18, 19]


def test_sliding_window_literal() -> None:
    policy = SlidingWindow(window=3)
    at = policy.evicted_at_row(row_of(5), Budget())
    assert at.dtype == torch.int32 and at[0, 0].tolist() == [3, 4, 5, 6, 7]
    assert kept(policy, 5) == [3, 4]  # window - 1 earlier entries for the query at column 5
    ctx = TokenContext(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool))
    visible = policy.select(ctx).visible(0, torch.arange(5))[0, 0].int()
    assert visible.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_sliding_window_from_a_budget_stores_that_many() -> None:
    assert kept(SlidingWindow(), 10, Budget(tokens=3)) == [7, 8, 9]
    assert kept(SlidingWindow(), 10, Budget(compression_ratio=0.5)) == [5, 6, 7, 8, 9]
    # A token budget larger than the context is still a window for later tokens.
    at = SlidingWindow().evicted_at_row(row_of(3), Budget(tokens=5))
    assert at[0, 0].tolist() == [6, 7, 8]
    # Ratio 0 is the plain model, for ever.
    at = SlidingWindow().evicted_at_row(row_of(3), Budget(compression_ratio=0.0))
    assert at[0, 0].tolist() == [NEVER] * 3


def test_a_huge_window_does_not_overflow() -> None:
    assert SlidingWindow(window=NEVER).evicted_at_row(row_of(3), Budget())[0, 0].tolist() == [NEVER] * 3


# ---- random ----


def test_random_is_independent_per_layer_and_head_and_exact() -> None:
    mask = Random(n_sink=2, seed=1).keep_row(row_of(100, layers=3, heads=2), Budget(compression_ratio=0.7))
    assert mask.shape == (3, 2, 100)
    assert mask.sum(-1).tolist() == [[30, 30]] * 3
    assert bool(mask[..., :2].all())
    assert len({tuple(head.tolist()) for head in mask.reshape(6, 100)}) == 6


def test_random_keeps_every_position_about_as_often() -> None:
    mask = Random().keep_row(row_of(20, layers=100, heads=40), Budget(tokens=5)).float()
    share = mask.mean(dim=(0, 1))  # 4000 draws with p = 1/4: standard deviation 0.0068
    assert float((share - 0.25).abs().max()) < 0.035


def test_random_draw_depends_on_the_seeds_only() -> None:
    def draw(n_rows: int, seeds: tuple[int, ...], policy_seed: int = 0) -> torch.Tensor:
        ids = torch.zeros(n_rows, 30, dtype=torch.long)
        ctx = TokenContext(ids, torch.ones_like(ids).bool(), 2, 2, seeds=seeds)
        return Random(seed=policy_seed).select(ctx, Budget(tokens=10)).evicted_at

    together, alone = draw(3, (5, 6, 7)), draw(1, (6,))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, draw(1, (6,), policy_seed=1))
    before = torch.random.get_rng_state()
    draw(1, (6,))
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is left alone


def test_row_generator_does_not_mix_up_the_two_seeds() -> None:
    draws = {float(torch.rand(1, generator=row_generator(a, b))) for a in range(6) for b in range(6)}
    assert len(draws) == 36


# ---- invariants ----

BUDGETED = (Random(n_sink=3), SinkRecent(n_sink=3), UniformMiddle(n_sink=3, block_size=5), SlidingWindow())


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 200), ratio=st.floats(0, 0.99), block=st.integers(1, 40), data=st.data())
def test_every_budget_is_met_exactly(n: int, ratio: float, block: int, data: st.DataObject) -> None:
    total = max(1, int(n * (1 - ratio)))
    policies = (*BUDGETED, UniformMiddle(n_sink=3, n_recent=data.draw(st.integers(0, 20)), block_size=block))
    for policy in policies:
        fixed = getattr(policy, "n_sink", 0) + (getattr(policy, "n_recent", None) or 0)
        if total < min(fixed, n):
            with pytest.raises(ConfigError, match=f"budget of {total} entries"):
                policy.keep_row(row_of(n), Budget(compression_ratio=ratio))
            continue
        mask = policy.keep_row(row_of(n, layers=2, heads=2), Budget(compression_ratio=ratio))
        assert mask.sum(-1).unique().tolist() == [total], policy
        if policy.name != "sliding_window":
            assert bool(mask[..., : min(3, n)].all()), policy


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(8, 40), min_size=2, max_size=4), tokens=st.integers(6, 50))
def test_a_padded_row_gets_what_it_gets_alone(lengths: list[int], tokens: int) -> None:
    total = max(lengths)
    ids, mask = torch.zeros(len(lengths), total, dtype=torch.long), torch.zeros(len(lengths), total).bool()
    for i, n in enumerate(lengths):
        ids[i, total - n :] = torch.arange(n) + 1
        mask[i, total - n :] = True
    seeds = tuple(range(10, 10 + len(lengths)))
    budget = Budget(tokens=tokens)
    for policy in (*BUDGETED, Full(), Ladder()):
        batch = policy.select(TokenContext(ids, mask, 3, 2, seeds=seeds), budget).evicted_at
        for i, n in enumerate(lengths):
            real, one = slice(total - n, total), slice(i, i + 1)
            ctx = TokenContext(ids[one, real], mask[one, real], 3, 2, seeds=seeds[one])
            alone = policy.select(ctx, budget).evicted_at[0]
            in_batch = batch[i, ..., total - n :]
            shift = torch.where(alone == NEVER, 0, total - n)
            assert torch.equal(in_batch, (alone + shift).expand_as(in_batch)), policy
            assert bool((batch[i, ..., : total - n] == 0).all()), policy


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(8, 40), arrivals=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_applied_to_stored_entries_again_and_again(budget: int, arrivals: list[int]) -> None:
    for policy in (SinkRecent(), UniformMiddle(block_size=4), SlidingWindow()):
        stored, seen = list(range(budget)), budget
        for new in arrivals:
            stored, seen = stored + list(range(seen, seen + new)), seen + new
            stored = [stored[i] for i in kept(policy, len(stored), Budget(tokens=budget))]
            assert len(stored) == budget
        if policy.name == "sink_recent":  # eviction in steps is eviction at once
            assert stored == list(range(4)) + list(range(seen - budget + 4, seen))
        if policy.name == "sliding_window":
            assert stored == list(range(seen - budget, seen))


# ---- arithmetic ----


def test_evenly_literal() -> None:
    assert evenly(4, 26).tolist() == [3, 9, 16, 22]
    assert evenly(1, 5).tolist() == [2]
    assert evenly(9, 4).tolist() == [0, 1, 2, 3]
    assert evenly(0, 4).tolist() == []


@given(n=st.integers(1, 300), k=st.integers(1, 300))
def test_evenly_spread_means_gaps_that_differ_by_at_most_one(n: int, k: int) -> None:
    ranks = evenly(k, n)
    assert ranks.numel() == min(k, n) and int(ranks[0]) >= 0 and int(ranks[-1]) < n
    gaps = ranks.diff().tolist()
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_blocks_between_are_cut_at_the_borders() -> None:
    assert blocks_between(3, 13, 5) == [(3, 5), (5, 10), (10, 13)]
    assert blocks_between(5, 10, 5) == [(5, 10)]
    assert blocks_between(7, 7, 5) == []


@given(
    start=st.integers(0, 50), length=st.integers(0, 200), block=st.integers(1, 60), want=st.integers(0, 300)
)
def test_spread_blocks_meet_the_count_in_few_pieces(start: int, length: int, block: int, want: int) -> None:
    columns = spread_blocks(start, start + length, block, want)
    assert columns.numel() == min(want, length) == columns.unique().numel()
    if columns.numel():
        assert start <= int(columns.min()) and int(columns.max()) < start + length
        assert bool((columns.diff() > 0).all())
        touched = {int(c) // block for c in columns}
        # whole blocks: at most the two border blocks are short, and one is cut
        assert len(touched) <= -(-columns.numel() // block) + 2


def test_drawn_without_repetition() -> None:
    picks = drawn((4, 10), 7, row_generator(0, 0))
    assert picks.shape == (4, 7) and all(len(set(p.tolist())) == 7 for p in picks)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (SinkRecent(n_recent=8), Budget(tokens=20), "n_recent=8 and budget tokens=20 are both given"),
        (
            SinkRecent(n_recent=8),
            Budget(compression_ratio=0.0),
            "n_recent=8 and compression_ratio=0.0 are both",
        ),
        (SinkRecent(), Budget(), "needs a budget .* or n_recent; neither is given"),
        (SinkRecent(n_sink=12), Budget(tokens=10), "budget of 10 entries .* is under n_sink=12"),
        (SinkRecent(n_sink=12), Budget(compression_ratio=0.9), r"budget of 9 entries .* under n_sink=12"),
        (Random(), Budget(), "random needs a budget"),
        (Random(n_sink=11), Budget(tokens=10), "budget of 10 entries .* n_sink=11"),
        (UniformMiddle(), Budget(), "needs a budget .* or stride and n_recent"),
        (UniformMiddle(n_sink=4, n_recent=9), Budget(tokens=12), r"12 entries .* n_sink=4 \+ n_recent=9"),
        (
            UniformMiddle(n_recent=9, stride=2),
            Budget(tokens=12),
            "stride=2 and budget tokens=12 are both given",
        ),
        (SlidingWindow(window=5), Budget(tokens=5), "window=5 and budget tokens=5 are both given"),
        (SlidingWindow(), Budget(), "sliding_window needs a budget .* or window"),
    ],
)
def test_contradictions_name_both_sides(policy: TokenPolicy, budget: Budget, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        policy.keep_row(row_of(96), budget)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkRecent(n_sink=-1), r"sink_recent: n_sink must be a whole number >= 0, got -1"),
        (lambda: SinkRecent(n_recent=2.5), "n_recent must be a whole number"),  # type: ignore[arg-type]
        (lambda: SlidingWindow(window=0), "window must be a whole number >= 1, got 0"),
        (lambda: UniformMiddle(block_size=0), "block_size must be a whole number >= 1"),
        (lambda: UniformMiddle(stride=2), "n_recent .beside stride=2."),
        (lambda: Random(n_sink=True), "n_sink must be a whole number >= 0, got True"),
    ],
)
def test_bad_sizes(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
