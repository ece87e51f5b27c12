"""Anchors with random others, and anchors with a scorer's best entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpress_reference import layer_contexts, token_ids
from test_anchors import SMALL, TEXT, ids_of, row

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.anchors import AnchorConfig, Anchors, DynamicAnchors, PlaceAnchorConfig
from sparsekv.policies.attention_scores import H2O
from sparsekv.policies.base import LayerContext, keep_top
from sparsekv.policies.budget import Budget
from toy import toy_tokenizer

ANCHORS = {0, 1, 3, 6, 7, 10, 12}
"""Of TEXT under SMALL; 2 4 5 8 9 11 are others."""


def kept(policy: Anchors, seed: int = 0, budget: Budget | None = None) -> list[int]:
    chosen = policy.keep_row(row(seed=seed), budget or Budget())[0, 0]
    return chosen.nonzero().flatten().tolist()


@pytest.mark.parametrize(("fraction", "n_others"), [(0.0, 0), (0.1, 1), (0.5, 3), (0.7, 4), (1.0, 6)])
def test_a_fraction_of_the_others_stays(fraction: float, n_others: int) -> None:
    draws = set()
    for seed in range(40):
        chosen = kept(Anchors(SMALL, random_fraction=fraction), seed)
        assert set(chosen) >= ANCHORS and len(chosen) == 7 + n_others
        assert chosen == kept(Anchors(SMALL, random_fraction=fraction), seed)
        draws.add(tuple(chosen))
    assert len(draws) > 3 if 0 < fraction < 1 else len(draws) == 1
    assert len(draws) == 1 or {c for d in draws for c in d} == set(range(13))


@pytest.mark.parametrize(("fill", "by_rule"), [("recent", {9, 11}), ("uniform", {4, 9})])
def test_a_fraction_of_what_fills_a_budget_is_drawn(fill: Any, by_rule: set[int]) -> None:
    """7 anchors and 4 of the 6 others, of which half is drawn; the rule alone takes the rest."""
    draws = set()
    for seed in range(60):
        chosen = kept(Anchors(SMALL, fill=fill, random_fraction=0.5), seed, Budget(tokens=11))
        assert len(chosen) == len(set(chosen)) == 11 and set(chosen) >= ANCHORS | by_rule
        draws.add(tuple(chosen))
    assert len(draws) == 6, "two of the other four"
    assert len({tuple(kept(Anchors(SMALL, fill=fill), s, Budget(tokens=11))) for s in range(9)}) == 1
    every = {
        tuple(kept(Anchors(SMALL, fill=fill, random_fraction=1.0), s, Budget(tokens=11))) for s in range(200)
    }
    assert len(every) == 15, "any four of the six"
    for tokens in (7, 13, 20):  # no room, just enough, more than there is
        assert len(kept(Anchors(SMALL, fill=fill, random_fraction=0.5), 1, Budget(tokens=tokens))) == min(
            tokens, 13
        )


def test_a_fraction_is_in_0_to_1() -> None:
    with pytest.raises(ConfigError, match=r"random_fraction must be in \[0, 1\], got 1.5"):
        Anchors(random_fraction=1.5)


def context(tiny_model: Any, n: int = 60, rows: int = 1) -> LayerContext:
    return layer_contexts(tiny_model("llama"), token_ids(n, rows=rows))[1]


def test_fixed_anchors_then_the_best(tiny_model: Any) -> None:
    ctx = context(tiny_model)
    policy = DynamicAnchors(PlaceAnchorConfig(sink_size=3, recent_size=5), "h2o")
    for ratio in (0.3, 0.6, 0.8):
        chosen = policy.keep_layer(ctx, Budget(ratio))[0]
        assert (chosen.sum(-1) == int(60 * (1 - ratio))).all()
        scores = H2O().score_layer(ctx, Budget(ratio))[0]
        for head in range(2):
            best = scores[head].argsort(descending=True).tolist()
            fixed = [0, 1, 2, 55, 56, 57, 58, 59]
            rest = [k for k in best if k not in fixed][: int(60 * (1 - ratio)) - 8]
            assert set(chosen[head].nonzero().flatten().tolist()) == {*fixed, *rest}
    assert not torch.equal(chosen[0], chosen[1])


def test_more_anchors_than_the_budget(tiny_model: Any) -> None:
    policy = DynamicAnchors(PlaceAnchorConfig(sink_size=2, recent_size=40))
    chosen = policy.keep_layer(context(tiny_model), Budget(tokens=10))[0]
    assert chosen.nonzero()[:, 1].view(2, 10).tolist() == [[0, 1, *range(52, 60)]] * 2
    with pytest.raises(ConfigError, match=r"dynamic_anchors: a budget of 1 entries .* is under sink_size=2"):
        policy.keep_layer(context(tiny_model), Budget(tokens=1))


def test_budgets_over_a_layer_leave_anchors_in_every_head(tiny_model: Any) -> None:
    policy = DynamicAnchors(PlaceAnchorConfig(sink_size=2, recent_size=4), "knorm")
    ctx = context(tiny_model)
    budget = Budget(0.6, scope="layer")
    chosen = keep_top(policy.score_layer(ctx, budget)[:, None], budget)[0, 0]
    assert int(chosen.sum()) == 48 and chosen[:, [0, 1, 56, 57, 58, 59]].all()


def test_anchors_of_the_text(tiny_model: Any) -> None:
    """Each row by its own text: TEXT has its anchors, and the letters of another text have none but the ends."""
    tokenizer = toy_tokenizer()
    ids = torch.cat([ids_of(tokenizer, TEXT), ids_of(tokenizer, "abcdefghijklm")])
    ctx = layer_contexts(tiny_model("llama"), ids)[0]
    ctx.ids, ctx.tokenizer = ids, tokenizer
    chosen = DynamicAnchors(SMALL).keep_layer(ctx, Budget(tokens=8))
    assert (chosen.sum(-1) == 8).all()
    for head in range(2):
        assert set(chosen[0, head].nonzero().flatten().tolist()) > ANCHORS
        assert chosen[1, head, [0, 1, 12]].all()
    scores = H2O().score_layer(ctx, Budget())[1, 0].clone()
    scores[[0, 1, 12]] = torch.inf
    assert set(chosen[1, 0].nonzero().flatten().tolist()) == set(scores.topk(8).indices.tolist())


def test_by_name() -> None:
    made = make_policy("dynamic_anchors", n_sink=2, recent_size=9, method="snapkv")
    assert made == DynamicAnchors(PlaceAnchorConfig(sink_size=2, recent_size=9), "snapkv")
    assert not made.reads_text and make_policy("dynamic_anchors", use_punctuation=True).reads_text
    assert make_policy("anchors").reads_text and make_policy("anchors", random_fraction=0.25) == Anchors(
        random_fraction=0.25
    )


def test_mistakes(tiny_model: Any) -> None:
    ctx = context(tiny_model, 30)
    with pytest.raises(ConfigError, match="dynamic_anchors needs a budget"):
        DynamicAnchors().keep_layer(ctx, Budget())
    with pytest.raises(ConfigError, match="this layer was given none; set use_special=False"):
        DynamicAnchors(AnchorConfig(sink_size=1)).keep_layer(ctx, Budget(0.5))
    with pytest.raises(ConfigError, match="method 'sink_recent' has no scores"):
        DynamicAnchors(method="sink_recent").keep_layer(ctx, Budget(0.5))
    with pytest.raises(ConfigError, match=r"unknown method 'h2p' \(did you mean 'h2o'\?\)"):
        DynamicAnchors(method="h2p").keep_layer(ctx, Budget(0.5))
