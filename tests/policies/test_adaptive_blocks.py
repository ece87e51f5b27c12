"""Adaptive block dropout: what is measured, by hand and against full attention, and who leaves more often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress_reference import layer_contexts, token_ids
from test_attention_scores import OneHead

from sparsekv.errors import ConfigError
from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
from sparsekv.policies.attention_scores import attention_over_uniform, attention_weights
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget


def one_head(looks_at: dict[int, float], n: int = 24, seed: int = 0, q: int | None = None) -> LayerContext:
    """One head whose queries give entry k a logit of looks_at[k] (0 elsewhere)."""
    keys = torch.zeros(1, 1, n, 2)
    for column, logit in looks_at.items():
        keys[0, 0, column, 0] = logit
    hidden = torch.tensor([1.0, 0.0]).expand(1, q or n, 2)
    rotary = torch.ones(1, q or n, 2), torch.zeros(1, q or n, 2)
    return LayerContext(OneHead(), 0, hidden, keys, keys, rotary, torch.arange(q or n), seed=seed)


def leaving(policy: AdaptiveBlockDropout, looks_at: dict[int, float], times: int = 400) -> torch.Tensor:
    """How often each entry left, at ratio 1/3, over as many row seeds."""
    gone = torch.zeros(24)
    for seed in range(times):
        gone += ~policy.keep_layer(one_head(looks_at, seed=seed), Budget(tokens=16))[0, 0]
    return gone / times


# ---- what is measured ----


def test_density_by_hand() -> None:
    """The last query alone: entry 9 gets e^2 / (23 + e^2) of it; uniform is 1/24."""
    policy = AdaptiveBlockDropout(8, sink_weight=0, window=1)
    worth = policy.worth(one_head({9: 2.0}), torch.tensor([0, 8, 16, 24]))
    e2 = torch.tensor(2.0).exp()
    share = torch.tensor([8 / (23 + e2), (7 + e2) / (23 + e2), 8 / (23 + e2)])
    torch.testing.assert_close(worth[0, 0], (share * 24 / 8).log())


def test_sink_share_by_hand() -> None:
    """Zero keys: query q gives each of the n_sink = 2 sinks 1 / (q + 1); samples 4 and 12 of blocks of 8."""
    policy = AdaptiveBlockDropout(8, sink_weight=3.0, samples=1, n_sink=2)
    worth = policy.worth(one_head({}), torch.tensor([2, 8, 16, 24]))
    picked = torch.tensor([2 + 3, 8 + 4, 16 + 4])
    torch.testing.assert_close(worth[0, 0], -3.0 * 2 / (picked + 1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_measures_against_the_whole_attention_matrix(tiny_model: Any, family: str) -> None:
    ctx = layer_contexts(tiny_model(family), token_ids(70, rows=2))[2]
    full = attention_weights(
        ctx.module, ctx.hidden_states, ctx.keys, ctx.position_embeddings, torch.arange(70)
    ).mean(2)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 2, 70))
    edges = torch.tensor([4, 16, 32, 48, 60])
    policy = AdaptiveBlockDropout(16, window=None, samples=16, sink_weight=0.7)
    worth = policy.worth(ctx, edges)
    ratio = attention_over_uniform(ctx, None)
    for i, (start, end) in enumerate([(4, 16), (16, 32), (32, 48), (48, 60)]):
        density = ratio[..., start:end].mean(-1).log()
        share = full[:, :, start:end, :4].sum(-1).mean(-1)
        torch.testing.assert_close(worth[..., i], density - 0.7 * share, atol=1e-5, rtol=1e-4)


def test_where_hidden_states_are_gone_density_decides() -> None:
    """Only the last 6 of 24 tokens are new: the sink share of the last block alone is known, and stands for all."""
    ctx = one_head({}, q=6)
    worth = AdaptiveBlockDropout(8, samples=8, n_sink=1).worth(ctx, torch.tensor([1, 8, 16, 24]))
    share = (1 / torch.arange(19.0, 25.0)).mean()
    torch.testing.assert_close(worth[0, 0], -share.expand(3))


# ---- who leaves ----


def test_blocks_that_get_attention_leave_less_often() -> None:
    looks_at = dict.fromkeys(range(8, 16), 1.5)
    policy = AdaptiveBlockDropout(8, n_sink=0, n_recent=0, window=1)
    gone = leaving(policy, looks_at)
    blocks = gone.view(3, 8)
    assert (blocks == blocks[:, :1]).all() and blocks[:, 0].sum() == pytest.approx(1)
    # Its density is e^1.5 = 4.48 times the others'. It leaves if both others are picked before it to stay: 1 of
    # 2 + 4.48, then 1 of 1 + 4.48, in two orders.
    expected = 2 / (2 + 4.48) / (1 + 4.48)
    assert float(blocks[1, 0]) == pytest.approx(expected, abs=0.05)  # over 4 sigma
    assert blocks[0, 0] > 5 * blocks[1, 0] and blocks[2, 0] > 5 * blocks[1, 0]


def test_blocks_that_look_at_the_sinks_leave_more_often() -> None:
    ctx = one_head({0: 0.0})
    ctx.keys[0, 0, 0] = torch.tensor([0.0, 5.0])  # the sink is seen by queries with a second channel
    hidden = torch.zeros(1, 24, 2)
    hidden[0, 8:16, 1] = 1.0
    ctx.hidden_states = hidden
    policy = AdaptiveBlockDropout(8, sink_weight=2.0, window=4, n_sink=1, n_recent=0)
    worth = policy.worth(ctx, torch.tensor([1, 8, 16, 24]))[0, 0]
    assert worth[1] < worth[0] - 1 and worth[1] < worth[2] - 1
    gone = torch.zeros(24)
    for seed in range(300):
        ctx.seed = seed
        gone += ~policy.keep_layer(ctx, Budget(tokens=16))[0, 0]
    assert gone[0] == 0 and gone[12] > 2 * gone[20] and gone[12] > 2 * gone[4]


def test_temperature() -> None:
    looks_at = dict.fromkeys(range(8, 16), 1.0) | dict.fromkeys(range(16, 24), -1.0)
    cold = leaving(AdaptiveBlockDropout(8, temperature=0, n_sink=0, n_recent=0), looks_at, 20)
    assert cold.tolist() == [0.0] * 16 + [1.0] * 8
    hot = leaving(AdaptiveBlockDropout(8, temperature=1e6, n_sink=0, n_recent=0), looks_at, 400)
    assert (hot - 1 / 3).abs().max() < 0.12  # 5 sigma


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0, 0.95),
    size=st.integers(1, 30),
    n_sink=st.integers(0, 5),
    n_recent=st.none() | st.integers(0, 9),
    share=st.sampled_from(["layer", "head"]),
    seed=st.integers(0, 4),
)
def test_counts_are_exact_and_the_ends_stay(
    ratio: float, size: int, n_sink: int, n_recent: int | None, share: Any, seed: int
) -> None:
    ctx = context_of_two_heads(seed)
    policy = AdaptiveBlockDropout(size, n_sink=n_sink, n_recent=n_recent, share=share)
    total = max(1, int(48 * (1 - ratio)))
    if total < n_sink + (n_recent or 0):
        with pytest.raises(ConfigError, match="is under n_sink="):
            policy.keep_layer(ctx, Budget(ratio))
        return
    kept = policy.keep_layer(ctx, Budget(ratio))
    assert kept.shape == (1, 2, 48) and (kept.sum(-1) == total).all()
    assert kept[..., :n_sink].all() and kept[..., 48 - (n_recent or 0) :].all()
    assert share == "head" or torch.equal(kept[:, 0], kept[:, 1])


CONTEXTS: dict[str, LayerContext] = {}


def context_of_two_heads(seed: int) -> LayerContext:
    import toy

    if not CONTEXTS:
        CONTEXTS["one"] = layer_contexts(toy.tiny_model("llama"), token_ids(48))[1]
    CONTEXTS["one"].seed = seed
    return CONTEXTS["one"]


def test_whole_blocks_leave_and_draws_depend_on_seeds_and_layer() -> None:
    policy = AdaptiveBlockDropout(8, n_sink=0, n_recent=0)
    seen = set()
    for seed in range(10):
        ctx = context_of_two_heads(seed)
        kept = policy.keep_layer(ctx, Budget(0.5))
        assert torch.equal(kept, policy.keep_layer(ctx, Budget(0.5)))
        assert set(kept[0, 0].view(6, 8).sum(1).tolist()) == {0, 8}
        seen.add(tuple(kept[0, 0].tolist()))
    assert len(seen) > 4
    ctx = context_of_two_heads(0)
    base = policy.score_layer(ctx, Budget(0.5))
    ctx.layer_idx = 2
    assert not torch.equal(policy.score_layer(ctx, Budget(0.5)), base)
    ctx.layer_idx = 1
    other = AdaptiveBlockDropout(8, n_sink=0, n_recent=0, seed=1).score_layer(ctx, Budget(0.5))
    assert not torch.equal(other, base)


def test_a_row_draws_in_a_batch_what_it_draws_alone(tiny_model: Any) -> None:
    ids = token_ids(48, rows=3)
    policy = AdaptiveBlockDropout(6, n_sink=1, n_recent=2)
    model = tiny_model("llama")
    together = policy.keep_layer(layer_contexts(model, ids)[0], Budget(0.5))
    for i in range(3):
        assert torch.equal(
            policy.keep_layer(layer_contexts(model, ids[i : i + 1])[0], Budget(0.5))[0], together[i]
        )


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="temperature must be a number >= 0, got -1"):
        AdaptiveBlockDropout(temperature=-1)
    with pytest.raises(
        ConfigError, match=r"unknown share of adaptive_block_dropout 'all'; allowed: layer, head"
    ):
        AdaptiveBlockDropout(share="all")
    with pytest.raises(ConfigError, match="samples must be a whole number >= 1, got 0"):
        AdaptiveBlockDropout(samples=0)
    with pytest.raises(ConfigError, match="adaptive_block_dropout needs a budget"):
        AdaptiveBlockDropout().keep_layer(one_head({}), Budget())
