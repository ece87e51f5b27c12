"""DefensiveKV against the formulas of arXiv 2510.13334, entry by entry, and what it guards against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpress_reference import layer_contexts, token_ids
from torch import Tensor
from window_reference import eager_weights, pooled_by_hand

from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.policies.defensive_kv import (
    DefensiveKV,
    LayerDefensiveKV,
    defended,
    projected_value_norms,
)

T, W, K = 70, 6, 3


def reference(weights: Tensor, values: Tensor, o_proj: Tensor, n_kept: int, first_stage: float) -> Tensor:
    """Scores [H, T - W] of a row; inf = first stage. weights [Hq, T, T], values [H, T, D], o_proj [hidden, Hq * D]."""
    heads, total, width = values.shape
    groups = weights.shape[0] // heads
    n = total - W
    own = float(weights[:, -W:, n:].sum(-1).mean())
    out = torch.zeros(heads, n)
    for h in range(heads):
        rows = [weights[h * groups + g, total - W + w, :n] for g in range(groups) for w in range(W)]
        worst = [0.0] * n
        for row in rows:
            smooth = pooled_by_hand(row.tolist(), K, "mean")
            scale = float(row.sum()) / sum(smooth)
            worst = [max(a, b * scale) for a, b in zip(worst, smooth, strict=True)]
        prior = sum(worst) / n
        norms = [
            sum(
                float((o_proj[:, (h * groups + g) * width : (h * groups + g + 1) * width] @ values[h, t]).abs().sum())
                for g in range(groups)
            ) / groups
            for t in range(n)
        ]  # fmt: skip
        for t in range(n):
            out[h, t] = max(worst[t], prior) * norms[t] / sum(norms)
        mean = torch.stack(rows).mean(0)
        share = 0.0
        for t in mean.argsort(descending=True).tolist()[: n_kept - W]:
            share += float(mean[t] / mean.sum())
            if share >= first_stage - own:
                break
            out[h, t] = torch.inf
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("first_stage", [0.0, 0.5, 0.9])
def test_scores_and_choice_equal_the_formulas(tiny_model: Any, family: str, first_stage: float) -> None:
    model, ids = tiny_model(family), token_ids(T, rows=2)
    budget = Budget(0.6)
    n_kept = budget.n_kept(T)
    policy = DefensiveKV(window=W, kernel_size=K, first_stage=first_stage)
    weights = eager_weights(model, ids)
    for ctx in layer_contexts(model, ids)[::2]:
        scores, kept = policy.score_layer(ctx, budget), policy.keep_layer(ctx, budget)
        o_proj = ctx.module.o_proj.weight.detach()
        for row in range(2):
            wanted = reference(weights[ctx.layer_idx][row], ctx.values[row], o_proj, n_kept, first_stage)
            first = wanted.isinf()
            assert torch.equal(scores[row, :, : T - W] > 1e36, first)
            if first_stage == 0.9:
                assert bool(first.any())
            torch.testing.assert_close(scores[row, :, : T - W][~first], wanted[~first], atol=1e-6, rtol=2e-4)
            # top of the layer: both windows, then the first stage, then the best scores of either head
            rest = 2 * n_kept - 2 * W
            best = torch.zeros(2 * (T - W), dtype=torch.bool)
            best[wanted.flatten().argsort(descending=True, stable=True)[:rest]] = True
            assert torch.equal(kept[row, :, : T - W], best.view(2, T - W))
            assert bool(kept[row, :, T - W :].all()) and int(kept[row].sum()) == 2 * n_kept


def test_defended_by_hand() -> None:
    """Two queries, no smoothing. Entry 1 was needed once: the mean ranks it under entry 0, the maximum does not."""
    attention = torch.tensor([[0.30, 0.00, 0.02, 0.00], [0.30, 0.50, 0.02, 0.00]])[None, None, None]
    out = defended(attention, 1)
    prior = (0.30 + 0.50 + 0.02 + 0.00) / 4
    torch.testing.assert_close(out, torch.tensor([[[0.30, 0.50, prior, prior]]]))
    assert attention.mean(3).argmax() == 0 and out.argmax() == 1


def test_smoothing_keeps_each_querys_sum() -> None:
    """A spike of 0.6 at the left end: its mean over 3 leaves 0.4 inside, which is scaled back to 0.6."""
    attention = torch.tensor([0.6, 0.0, 0.0, 0.0])[None, None, None, None]
    # pooled 0.2, 0.2, 0, 0; scaled by 0.6 / 0.4: 0.3, 0.3, 0, 0; lifted to their mean 0.15
    torch.testing.assert_close(defended(attention, 3), torch.tensor([[[0.3, 0.3, 0.15, 0.15]]]))


def test_value_norms_by_hand() -> None:
    class Module:
        class o_proj:
            weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -3.0]])  # two query heads of size 2

    values = torch.tensor([[1.0, 1.0], [2.0, 0.0]])[None, None]  # one kv head
    # head 0: |(1, 1)| = 2 and |(2, 0)| = 2; head 1: |(2, -3)| = 5 and |(4, 0)| = 4
    torch.testing.assert_close(projected_value_norms(Module, values), torch.tensor([[[3.5, 3.0]]]))


def test_heads_share_a_layers_budget_and_layers_the_models(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), token_ids(T)
    per_layer = compress(model, ids, DefensiveKV(window=W, first_stage=0), 0.6).stored_counts()[:, 0]
    whole = compress(model, ids, LayerDefensiveKV(window=W, first_stage=0), 0.6).stored_counts()[:, 0]
    n_kept = Budget(0.6).n_kept(T)
    assert per_layer.sum(1).tolist() == [2 * n_kept] * 3 and len(set(per_layer.flatten().tolist())) > 1
    assert int(whole.sum()) == 6 * n_kept and len(set(whole.sum(1).tolist())) > 1
    assert int(whole.min()) >= W


def test_the_layer_variant_is_the_top_of_all_layers_scores(tiny_model: Any) -> None:
    model, ids = tiny_model("qwen2"), token_ids(T)
    policy = LayerDefensiveKV(window=W, first_stage=0.3)
    budget = Budget(0.6)
    scores = torch.stack([policy.score_layer(ctx, budget)[0] for ctx in layer_contexts(model, ids)])
    best = torch.zeros(scores.numel(), dtype=torch.bool)
    best[scores.flatten().argsort(descending=True, stable=True)[: 6 * budget.n_kept(T)]] = True
    kept = compress(model, ids, policy, budget).kept_columns()[0]
    assert torch.equal(kept, best.view(scores.shape))


@pytest.mark.parametrize("name", ["defensive_kv", "layer_defensive_kv"])
@pytest.mark.parametrize(("budget", "n"), [(0.0, T), (10_000, T), (0.9, 1), (2, 3), (9, 12)])
def test_sizes_at_the_edges(tiny_model: Any, name: str, budget: float | int, n: int) -> None:
    cache = compress(tiny_model("llama"), token_ids(n), name, budget)
    whole = budget in (0.0, 10_000) or n == 1
    assert int(cache.stored_counts().sum()) == 6 * (n if whole else int(budget))
    assert cache.intact == whole and int(cache.stored_counts().min()) >= 1


def test_refusals(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), token_ids(T)
    for name, budget, message in (
        ("defensive_kv", Budget(0.5, scope="model"), "scope must be head or layer, got model"),
        ("layer_defensive_kv", Budget(0.5, scope="layer"), "scope must be head or model, got layer"),
        ("defensive_kv", None, "defensive_kv needs a budget"),
    ):
        with pytest.raises(ConfigError, match=message):
            compress(model, ids, name, budget)
    with pytest.raises(ConfigError, match="method 'layer_defensive_kv' needs the whole context at once"):
        compress(model, ids, "layer_defensive_kv", 0.5, chunk=20)
    with pytest.raises(ConfigError, match=r"first_stage must be in \[0, 1\], got 1.5"):
        make_policy("defensive_kv", first_stage=1.5)
    with pytest.raises(ConfigError, match="needs the scores of every layer"):
        LayerDefensiveKV().keep_layer(layer_contexts(model, ids)[0], Budget(0.5))
