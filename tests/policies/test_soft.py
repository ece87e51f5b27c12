"""Soft thresholds: the sigmoid by hand, the budget met in expectation, gradients checked, and the hard choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress_reference import layer_contexts, token_ids
from test_attention_scores import OneHead

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.attention_scores import attention_over_uniform, observed_attention
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.soft import SoftThreshold, threshold_for


def context(
    tiny_model: Any, n: int = 60, layer: int = 1, family: str = "llama", rows: int = 1
) -> LayerContext:
    return layer_contexts(tiny_model(family), token_ids(n, rows=rows))[layer]


class Relevance(torch.nn.Module):
    """Logits [B, T, 2]: the first two channels of the hidden state, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        return hidden[..., :2] * self.scale

    def extra_of(self, ctx: LayerContext) -> None:
        """No features beside the hidden state."""


def with_relevance(ctx: LayerContext) -> LayerContext:
    ctx.module.relevance = Relevance()
    return ctx


# ---- the score ----


def test_attention_over_uniform_by_hand() -> None:
    """Zero keys: attention is uniform, so every entry gets what uniform attention gives it, in any window."""
    hidden, keys = torch.randn(1, 6, 2), torch.zeros(1, 1, 9, 2)
    rotary = torch.ones(1, 6, 2), torch.zeros(1, 6, 2)
    ctx = LayerContext(OneHead(), 0, hidden, keys, keys, rotary, torch.arange(3, 9))
    for window in (None, 4, 1):
        seen = attention_over_uniform(ctx, window, block_size=4)
        torch.testing.assert_close(seen, torch.ones(1, 1, 9))


def test_attention_over_uniform_against_full_attention(tiny_model: Any) -> None:
    ctx = context(tiny_model)
    for window in (None, 7):
        n = window or 60
        cos, sin = ctx.position_embeddings
        mean = observed_attention(ctx.module, ctx.hidden_states[:, -n:], ctx.keys, (cos[:, -n:], sin[:, -n:]))
        uniform = torch.zeros(60)
        for k in range(60):
            uniform[k] = torch.tensor([1 / (q + 1) for q in range(60 - n, 60) if q >= k]).mean()
        torch.testing.assert_close(attention_over_uniform(ctx, window), mean / uniform)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_the_differentiable_sum_is_the_same_value(tiny_model: Any, family: str) -> None:
    ctx = context(tiny_model, layer=2, family=family)
    args = ctx.module, ctx.hidden_states, ctx.keys, ctx.position_embeddings, 16
    keys = ctx.keys.clone().requires_grad_()
    soft = observed_attention(args[0], args[1], keys, *args[3:], differentiable=True)
    torch.testing.assert_close(soft, observed_attention(*args))
    assert soft.requires_grad and not observed_attention(args[0], args[1], keys, *args[3:]).requires_grad


def test_gradients_of_the_blockwise_sum_are_those_of_the_whole_matrix(tiny_model: Any) -> None:
    ctx = context(tiny_model, n=40)
    hidden = ctx.hidden_states.clone().requires_grad_()
    keys = ctx.keys.clone().requires_grad_()
    weight = torch.randn(1, 2, 40)
    inputs = [hidden, keys, ctx.module.q_proj.weight]
    found = []
    for block in (7, 40):  # blocks, computed again in the backward pass; and all queries at once
        seen = observed_attention(
            ctx.module, hidden, keys, ctx.position_embeddings, block, differentiable=True
        )
        found.append(torch.autograd.grad((seen * weight).sum(), inputs))
    for one, other in zip(*found, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # and finite differences along a random direction of the keys, in fp64
    module = ctx.module.double()
    direction = torch.randn_like(keys).double()

    def value(step: float) -> float:
        moved = keys.detach().double() + step * direction
        seen = observed_attention(
            module, hidden.detach().double(), moved, tuple(x.double() for x in ctx.position_embeddings)
        )
        return float((seen.double() * weight).sum())

    slope = (value(1e-3) - value(-1e-3)) / 2e-3
    assert slope == pytest.approx(float((found[0][1].double() * direction).sum()), rel=1e-2)


# ---- weights ----


def test_a_fixed_threshold_by_hand(tiny_model: Any) -> None:
    ctx = with_relevance(context(tiny_model, n=12))
    policy = SoftThreshold(0.5, 0.25, on="relevance", n_sink=2, n_recent=3)
    weights = policy.weigh_layer(ctx, Budget())
    logits = 2.0 * ctx.hidden_states[..., :2].transpose(1, 2)
    expected = torch.log(1 / (1 + torch.exp(-(logits - 0.25) / 0.5)))
    torch.testing.assert_close(weights[..., 2:9], expected[..., 2:9])
    assert weights.shape == (1, 2, 12) and not weights[..., :2].any() and not weights[..., 9:].any()
    kept = policy.keep_layer(ctx, Budget())
    assert (
        torch.equal(kept[..., 2:9], logits[..., 2:9] > 0.25) and kept[..., :2].all() and kept[..., 9:].all()
    )


@pytest.mark.parametrize("on", ["attention", "relevance"])
@pytest.mark.parametrize("temperature", [0.01, 0.4, 1.0, 8.0])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_weights_sum_to_the_budget(tiny_model: Any, on: Any, temperature: float, ratio: float) -> None:
    ctx = with_relevance(context(tiny_model, rows=2))
    policy = SoftThreshold(temperature, on=on, n_sink=2, n_recent=4)
    per_head = policy.weigh_layer(ctx, Budget(ratio)).exp().sum(-1)
    torch.testing.assert_close(per_head, torch.full((2, 2), 60 * (1 - ratio)), atol=0.05, rtol=0)
    per_layer = policy.weigh_layer(ctx, Budget(ratio, scope="layer")).exp().sum((1, 2))
    torch.testing.assert_close(per_layer, torch.full((2,), 120 * (1 - ratio)), atol=0.1, rtol=0)


def test_cold_weights_are_the_hard_choice(tiny_model: Any) -> None:
    ctx = context(tiny_model)
    policy = SoftThreshold(1e-5, n_sink=2, n_recent=4)
    for scope in ("head", "layer"):
        budget = Budget(0.6, scope=scope)
        kept = policy.keep_layer(ctx, budget)
        assert int(kept.sum()) == 2 * 24
        assert (
            int(((policy.weigh_layer(ctx, budget).exp() > 0.5) ^ kept).sum()) <= 2
        )  # those at the threshold


@settings(max_examples=80, deadline=None)
@given(
    scores=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    data=st.data(),
    temperature=st.floats(0.05, 20),
)
def test_the_threshold_meets_the_count(scores: list[float], data: Any, temperature: float) -> None:
    n_kept = data.draw(st.integers(0, len(scores) - 1))
    values = torch.tensor(scores)
    at = threshold_for(values, n_kept, temperature)
    total = float(((values - at) / temperature).sigmoid().sum())
    assert total == pytest.approx(n_kept, abs=0.02 if temperature > 0.1 else 0.6)


def test_nothing_fades_under_a_ratio_of_zero(tiny_model: Any) -> None:
    ctx = context(tiny_model)
    assert not SoftThreshold().weigh_layer(ctx, Budget(0.0)).any()
    assert SoftThreshold().keep_layer(ctx, Budget(0.0)).all()


def test_gradients_reach_keys_queries_and_hidden_states(tiny_model: Any) -> None:
    ctx = context(tiny_model)
    ctx.keys = ctx.keys.clone().requires_grad_()
    ctx.hidden_states = ctx.hidden_states.clone().requires_grad_()
    SoftThreshold(window=None, n_recent=4).weigh_layer(ctx, Budget(0.5))[0, 0, 20].backward()
    assert ctx.keys.grad is not None and ctx.hidden_states.grad is not None
    assert (
        ctx.keys.grad[0, 0].abs().sum() > 0 and not ctx.keys.grad[0, 1].any()
    )  # the other head's are its own
    assert ctx.hidden_states.grad[0, 20:].abs().sum() > 0 and not ctx.hidden_states.grad[0, :20].any()
    assert ctx.module.q_proj.weight.grad.abs().sum() > 0
    # towards the queries that look at it: moving key 20 along its gradient raises its score
    policy = SoftThreshold(window=None, n_recent=4)
    with torch.no_grad():
        before = policy.score_layer(ctx, Budget(0.5))[0, 0, 20]
        ctx.keys = ctx.keys + 0.05 * ctx.keys.grad
        assert policy.score_layer(ctx, Budget(0.5))[0, 0, 20] > before


def test_gradients_reach_the_predictor_with_the_sign_expected(tiny_model: Any) -> None:
    ctx = with_relevance(context(tiny_model, n=20))
    policy = SoftThreshold(0.7, 0.1, on="relevance", n_sink=1, n_recent=1)
    weights = policy.weigh_layer(ctx, Budget())
    weights.sum().backward()
    hidden = ctx.hidden_states[..., :2].transpose(1, 2)[..., 1:-1]
    slope = (1 - torch.sigmoid((2 * hidden - 0.1) / 0.7)) / 0.7  # d log sigmoid(x / T) / dx
    torch.testing.assert_close(ctx.module.relevance.scale.grad, (slope * hidden).sum())


# ---- the hard choice ----


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_hard_counts_are_exact(tiny_model: Any, ratio: float) -> None:
    ctx = context(tiny_model, n=90)
    total = max(1, int(90 * (1 - ratio)))
    kept = SoftThreshold(n_sink=3, n_recent=5).keep_layer(ctx, Budget(ratio))
    assert (kept.sum(-1) == total).all() and kept[..., :3].all() and kept[..., -5:].all()
    scores = attention_over_uniform(ctx, 64)[..., 3:85]
    inside = kept[..., 3:85]
    for head in range(2):
        if inside[0, head].any() and not inside[0, head].all():
            assert scores[0, head][inside[0, head]].min() >= scores[0, head][~inside[0, head]].max()


def test_a_head_under_the_threshold_keeps_its_best_entry(tiny_model: Any) -> None:
    ctx = with_relevance(context(tiny_model, n=20))
    kept = SoftThreshold(1.0, 1e6, on="relevance", n_sink=0, n_recent=0).keep_layer(ctx, Budget())
    best = ctx.hidden_states[..., :2].transpose(1, 2).argmax(-1)
    assert kept.sum(-1).tolist() == [[1, 1]] and torch.equal(kept.int().argmax(-1), best)


def test_what_the_framework_reads() -> None:
    assert SoftThreshold.soft and SoftThreshold().scored and not SoftThreshold(threshold=0.5).scored
    assert not SoftThreshold().ratio_free
    assert replace(SoftThreshold(), temperature=0.2) == SoftThreshold(0.2)


def test_mistakes(tiny_model: Any) -> None:
    ctx = context(tiny_model, n=20)
    with pytest.raises(ConfigError, match="temperature must be a number over 0, got 0"):
        SoftThreshold(0)
    with pytest.raises(ConfigError, match="threshold must be a finite number, got 'x'"):
        SoftThreshold(threshold="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'relevanc' \(did you mean 'relevance'\?\)"):
        SoftThreshold(on="relevanc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model has no relevance predictors"):
        SoftThreshold(on="relevance").score_layer(ctx, Budget(0.5))
    with pytest.raises(ConfigError, match="soft_threshold needs a budget"):
        SoftThreshold().weigh_layer(ctx, Budget())
    with pytest.raises(ConfigError, match=r"threshold=0.5 and compression_ratio=0.3 are both given"):
        SoftThreshold(threshold=0.5).weigh_layer(ctx, Budget(0.3))
    with pytest.raises(ConfigError, match=r"is under n_sink=4 \+ n_recent=8"):
        SoftThreshold(n_recent=8).weigh_layer(ctx, Budget(0.5))
    with pytest.raises(ConfigError, match="scope 'model' needs the scores of every layer; give a threshold"):
        SoftThreshold().weigh_layer(ctx, Budget(0.5, scope="model"))
    ctx.module.relevance = Relevance()
    ctx.hidden_states = ctx.hidden_states[:, 5:]
    with pytest.raises(ConfigError, match=r"soft_threshold.*those of some of the 20 stored entries are gone"):
        SoftThreshold(on="relevance").score_layer(ctx, Budget(0.5))
    assert SoftThreshold(on="relevance").whole_context and not SoftThreshold().whole_context
    assert architecture.num_kv_heads(ctx.module.config) == 2
