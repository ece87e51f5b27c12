"""The functional form: the published figures, small cases by hand, and its agreement with UniformMiddle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.positional import UniformMiddle
from sparsekv.policies.simple_evict import SimpleEvictConfig, build_simple_keep_token_idx


def test_defaults_keep_the_two_ends() -> None:
    idx = build_simple_keep_token_idx(total_len=4096, block_n=128, cfg=SimpleEvictConfig())
    assert idx.dtype == torch.long
    assert idx.tolist() == [*range(256), *range(3584, 4096)]
    assert torch.equal(idx, build_simple_keep_token_idx(4096))


def test_uniform_middle_of_512() -> None:
    cfg = SimpleEvictConfig(middle_strategy="uniform", middle_budget_tokens=512)
    idx = build_simple_keep_token_idx(total_len=4096, block_n=128, cfg=cfg)
    assert idx.numel() == 1280 and idx.tolist() == sorted(set(idx.tolist()))
    middle = idx[(idx >= 256) & (idx < 3584)]
    # 4 of the 26 blocks 2..27: offsets 3, 9, 16, 22
    assert middle.tolist() == [c for b in (5, 11, 18, 24) for c in range(b * 128, (b + 1) * 128)]


@pytest.mark.parametrize("budget", [0, 512])
def test_stride_overrides_the_budget(budget: int) -> None:
    cfg = SimpleEvictConfig(middle_strategy="uniform", middle_budget_tokens=budget, uniform_stride=2)
    idx = build_simple_keep_token_idx(total_len=4096, block_n=128, cfg=cfg)
    assert idx.numel() == 2432
    middle = idx[(idx >= 256) & (idx < 3584)]
    assert middle.tolist() == [c for b in range(2, 27, 2) for c in range(b * 128, (b + 1) * 128)]


def test_short_contexts_keep_everything() -> None:
    for total in (0, 1, 255, 256, 700, 768):
        assert build_simple_keep_token_idx(total).tolist() == list(range(total))
    assert build_simple_keep_token_idx(769).tolist() == [*range(256), *range(257, 769)]


def test_a_budget_that_is_no_multiple_of_the_block_cuts_the_last_block() -> None:
    cfg = SimpleEvictConfig(2, 2, "uniform", middle_budget_tokens=5)
    # middle 2..17, blocks of 4: (2,3) (4-7) (8-11) (12-15) (16,17); two of the five: 1 and 3, five tokens
    assert build_simple_keep_token_idx(20, 4, cfg).tolist() == [0, 1, 4, 5, 6, 7, 12, 18, 19]


def test_a_budget_beyond_the_middle_keeps_all_of_it() -> None:
    cfg = SimpleEvictConfig(2, 2, "uniform", middle_budget_tokens=999)
    assert build_simple_keep_token_idx(20, 4, cfg).tolist() == list(range(20))


@settings(max_examples=50, deadline=None)
@given(
    total=st.integers(1, 300),
    sink=st.integers(0, 20),
    recent=st.integers(0, 20),
    middle=st.integers(1, 200),
    block=st.integers(1, 40),
    stride=st.integers(0, 4),
)
def test_agrees_with_the_policy(
    total: int, sink: int, recent: int, middle: int, block: int, stride: int
) -> None:
    cfg = SimpleEvictConfig(sink, recent, "uniform", middle, stride)
    policy = UniformMiddle(n_sink=sink, n_recent=recent, block_size=block, stride=stride)
    ids = torch.zeros(1, total, dtype=torch.long)
    row = TokenContext(ids, torch.ones_like(ids).bool()).rows()[0]
    mask = policy.keep_row(row, Budget() if stride else Budget(tokens=sink + recent + middle))
    assert build_simple_keep_token_idx(total, block, cfg).tolist() == mask[0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"middle_strategy": "unifrom"}, "unknown middle_strategy 'unifrom' .did you mean 'uniform'"),
        ({"sink_tokens": -1}, "sink_tokens must be a whole number >= 0, got -1"),
        ({"uniform_stride": 2}, "need middle_strategy='uniform', got 'none'"),
        ({"middle_budget_tokens": 512}, "need middle_strategy='uniform', got 'none'"),
    ],
)
def test_mistakes(args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimpleEvictConfig(**args)  # type: ignore[arg-type]


def test_a_block_has_at_least_one_token() -> None:
    with pytest.raises(ConfigError, match="block_n must be a whole number >= 1, got 0"):
        build_simple_keep_token_idx(100, 0)
