"""Soft scores of other methods: the budget met in expectation, the method's own order, gradients that move it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from kvpress_reference import layer_contexts, token_ids

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.base import LayerContext, LayerPolicy
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
    with pytest.raises(ConfigError, match="eviction_aug: soft_scores must be true or false, got 'off'"):
        EvictionAugPress(["knorm"], soft_scores="off")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adakv_snapkv has no scores with a gradient"):
        SoftScores(make_policy("adakv_snapkv"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature must be a number over 0"):
        SoftScores(make_policy("knorm"), 0.0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Given(LayerPolicy):
    """Scores [1, 1, T] as they are given."""

    scores: tuple[float, ...]
    positive: bool
    name: str = "given"
    scopes: ClassVar = ("head",)
    needs_budget: ClassVar[bool] = True
    whole_context: ClassVar[bool] = True

    @property
    def positive_scores(self) -> bool:  # type: ignore[override]
        return self.positive

    def scores_with_gradient(self, ctx: Any, budget: Budget) -> torch.Tensor:
        return torch.tensor(self.scores)[None, None]


def soft_weights(scores: list[float], positive: bool) -> torch.Tensor:
    keys = torch.zeros(1, 1, len(scores), 4)
    ctx = LayerContext(None, 0, keys[:, 0], keys, keys, (keys, keys), torch.arange(0))  # type: ignore[arg-type]
    return SoftScores(Given(tuple(scores), positive)).weigh_layer(ctx, Budget(0.5))[0, 0].exp()


def test_one_score_that_underflows_does_not_change_the_scale() -> None:
    """By the log, if the method's scores are positive by nature: a 0 among them is the least, no other scale."""
    scores = [2.0**-k for k in range(8)]
    even = soft_weights(scores, True)
    steps = torch.logit(even.double()).diff()
    torch.testing.assert_close(steps, steps[:1].expand(7), atol=1e-4, rtol=1e-4)
    steps = torch.logit(soft_weights([*scores, 0.0], True).double()).diff()
    torch.testing.assert_close(steps[:7], steps[:1].expand(7), atol=1e-4, rtol=1e-4)
    assert steps[7] < steps[0] < 0
    plain = torch.logit(soft_weights(scores, False).double()).diff()
    torch.testing.assert_close(plain[1:] / plain[:-1], torch.full((6,), 0.5).double(), atol=1e-3, rtol=1e-3)


def test_which_methods_scores_are_positive(tiny_model: Any) -> None:
    """What a method says holds on a model, and the softened method says what its own does."""
    ctx, budget = context(tiny_model), Budget(0.5)
    positive = ["snapkv", "tova", "h2o", "expected_attention_plain", "critical_snapkv", "cur", "cap"]
    for method in [*positive, "knorm", "keydiff", "compactor", "leverage", "non_causal_attn"]:
        inner = make_policy(method)
        assert inner.positive_scores == (method in positive), method
        assert bool((inner.score_layer(ctx, budget) > 0).all()) == inner.positive_scores, method
    soft = SoftScores(Given((1.0,), True))
    assert soft.scopes == ("head",) and soft.needs_budget and soft.whole_context and soft.positive_scores
    assert not SoftScores(make_policy("knorm")).positive_scores
    with pytest.raises(ConfigError, match="scope must be head, got layer"):
        soft.check_scope(Budget(0.5, scope="layer"))
