"""Soft scores of other methods: the budget met in expectation, the method's own order, gradients that move it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpress_reference import layer_contexts, token_ids

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.soft_scores import SoftScores
from sparsekv.policies.training_presses import EvictionAugPress

STEP = {"knorm": 0.5, "keydiff": 0.5, "snapkv": 3, "expected_attention_plain": 3, "h2o": 3, "tova": 3}
"""How far a key is moved, as a multiple of its length: knorm wants a shorter key, and a long way would pass 0."""

METHODS = ["knorm", "keydiff", "snapkv", "expected_attention_plain", "h2o", "tova"]


def context(tiny_model: Any, n: int = 90) -> LayerContext:
    return layer_contexts(tiny_model("llama"), token_ids(n))[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_weights_sum_to_the_budget_in_the_methods_own_order(
    method: str, temperature: float, tiny_model: Any
) -> None:
    ctx, inner = context(tiny_model), make_policy(method)
    policy, budget = SoftScores(inner, temperature), Budget(compression_ratio=0.6)
    weights = policy.weigh_layer(ctx, budget).exp()
    assert weights.shape == ctx.keys.shape[:3]
    torch.testing.assert_close(
        weights.sum(-1), torch.full_like(weights[..., 0], budget.n_kept(90)), rtol=1e-3, atol=0
    )
    scores = inner.score_layer(ctx, budget)
    order = scores.argsort(dim=-1, stable=True)
    assert (weights.gather(-1, order).diff(dim=-1) >= -1e-6).all()
    by_layer = policy.weigh_layer(ctx, Budget(compression_ratio=0.6, scope="layer")).exp()
    assert float(by_layer.sum()) == pytest.approx(2 * budget.n_kept(90), rel=1e-3)
    assert torch.equal(policy.keep_layer(ctx, budget), inner.keep_layer(ctx, budget))
    assert torch.equal(policy.score_layer(ctx, budget), scores)
    assert not policy.weigh_layer(ctx, Budget(compression_ratio=0.0)).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_model_can_learn_to_score_an_entry_higher(method: str, tiny_model: Any) -> None:
    """A step along the gradient of one entry's weight raises that entry in the method's own hard scores."""
    ctx, budget, at = context(tiny_model), Budget(compression_ratio=0.5), 20
    inner = make_policy(method)
    keys = ctx.keys.detach().clone().requires_grad_()
    moved = LayerContext(**{**vars(ctx), "keys": keys})
    weight = SoftScores(inner, 1.0).weigh_layer(moved, budget)[0, :, at].sum()
    (grad,) = torch.autograd.grad(weight, keys)
    assert grad[0, :, at].norm() > 1e-6
    after = LayerContext(
        **{**vars(ctx), "keys": (keys + STEP[method] * keys[0, :, at].norm() * grad / grad.norm()).detach()}
    )

    def rank(one: LayerContext) -> torch.Tensor:
        scores = inner.score_layer(one, budget)
        return (scores < scores[..., at : at + 1]).sum(-1).float().mean()

    assert rank(after) > rank(ctx) + 5


def test_what_is_drawn_is_soft_where_it_can_be() -> None:
    plain = EvictionAug(("knorm", "random", "sink_recent"))  # type: ignore[arg-type]
    soft = EvictionAug(("knorm", "random", "sink_recent"), soft_scores=True, temperature=0.5)  # type: ignore[arg-type]
    for seed in range(12):
        drawn = soft.draw(seed)
        assert drawn.name == plain.draw(seed).name
        if drawn.name == "knorm":
            assert isinstance(drawn, SoftScores) and drawn.temperature == 0.5
        else:
            assert drawn == plain.draw(seed)
    assert {soft.draw(seed).name for seed in range(12)} == {"knorm", "random", "sink_recent"}
    press = EvictionAugPress(["knorm", "tova"], soft_scores=True)
    assert all(isinstance(one, SoftScores) for one in press.policy.policies)
    with pytest.raises(ConfigError, match="none of random, sink_recent has scores with a gradient"):
        EvictionAug(("random", "sink_recent"), soft_scores=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adakv_snapkv has no scores with a gradient"):
        SoftScores(make_policy("adakv_snapkv"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature must be a number over 0"):
        SoftScores(make_policy("knorm"), 0.0)  # type: ignore[arg-type]
