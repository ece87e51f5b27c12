"""`atskv` in a prefill and in batches: targets, ragged caches against masked forwards, every route alike."""

from __future__ import annotations

import math

import pytest
import torch
from scored import ALL, T, decode, kept_of, scored_model, token_ids

from oracle import masked_logits, stepped_logits
from sparsekv import compress
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.probe import Request, prefill
from sparsekv.relevance import ATSKV, Served, serve_as
from toy import tiny_model, toy_tokenizer


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.8])
def test_the_target_is_met_on_every_context_and_the_cache_is_ragged(family, ratio):
    model = scored_model(family)
    for seed in range(4):
        ids = token_ids(T + seed, seed=seed)
        cache = compress(model, ids, make_policy("atskv", n_sink=1, n_recent=3), ratio)
        n = ids.shape[1]
        assert cache.achieved_compression[0] == pytest.approx(1 - max(1, int(n * (1 - ratio))) / n)
        counts = cache.stored_counts()[:, 0]
        assert (len(counts.unique()) > 1) == (ratio > 0)
        same = compress(
            model, ids, make_policy("relevance", n_sink=1, n_recent=3), Budget(ratio, scope="model")
        )
        assert torch.equal(kept_of(cache), kept_of(same)), "without betas: the top of the whole model"
        if ratio == 0.0:
            assert cache.intact


@pytest.mark.parametrize("features", [("hidden",), ALL])
def test_masked_forward_equals_the_ragged_cache(features):
    model, tokenizer = scored_model(features=features), toy_tokenizer()
    ids = token_ids(T + 5)
    cache = compress(model, ids[:, :T], "atskv", 0.6, tokenizer=tokenizer)
    stored_bytes = 2 * int(cache.stored_counts().sum()) * 16 * 4
    assert cache.nbytes <= 1.05 * stored_bytes + 4 * 8 * 6
    masked = masked_logits(model, ids, None, cache.selection().extend(T + 5), 5)
    assert (masked - stepped_logits(model, cache, ids, None, [2, 1, 2])).abs().max() <= 1e-4
    assert (masked - masked_logits(model, ids, None, None, 5)).abs().max() > 1e-2


@pytest.mark.parametrize("phase", ["prefill", "both"])
@pytest.mark.parametrize("features", [("hidden",), ALL])
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(phase, features):
    model, tokenizer = scored_model(features=features), toy_tokenizer()
    ids, mask = token_ids(T, rows=3), torch.ones(3, T, dtype=torch.long)
    for row, pad in enumerate((0, 9, 30)):
        mask[row, :pad] = 0
    options = {"phase": phase, "tokenizer": tokenizer}
    cache = compress(model, ids, make_policy("atskv", n_recent=4), 0.6, attention_mask=mask, **options)
    for row, pad in enumerate((0, 9, 30)):
        alone = compress(model, ids[row : row + 1, pad:], make_policy("atskv", n_recent=4), 0.6, **options)
        assert torch.equal(kept_of(cache)[row, ..., pad:], kept_of(alone)[0])
        assert not kept_of(cache)[row, ..., :pad].any()
        n = T - pad
        assert cache.achieved_compression[row] == pytest.approx(1 - int(n * 0.4) / n)


def test_the_probe_the_press_and_the_remembered_route_choose_alike():
    from sparsekv import PolicyPress

    model = scored_model(features=ALL)
    tokenizer, ids = toy_tokenizer(), token_ids(T)
    for policy, budget in (
        (ATSKV(), Budget(0.7)),
        (ATSKV(target=0.7), Budget()),
        (ATSKV(threshold=0.5), Budget()),
    ):
        direct = kept_of(compress(model, ids, policy, budget, tokenizer=tokenizer))
        both = kept_of(compress(model, ids, policy, budget, tokenizer=tokenizer, phase="both"))
        read = prefill(model, ids, [Request("a", policy, budget)], tokenizer=tokenizer)
        forked = kept_of(read.cache.fork([read.selections["a"]]))
        assert torch.equal(direct, both) and torch.equal(direct, forked)
        assert 0.2 < direct.float().mean() < 0.95
    press = PolicyPress(ATSKV(target=0.7))
    assert press.policy.spans_layers(press.budget())


def test_a_layer_with_a_larger_beta_keeps_less():
    model, ids = scored_model(), token_ids(T)
    plain = compress(model, ids, make_policy("atskv", n_recent=4), 0.6).stored_counts()[:, 0].sum(-1)
    policy = make_policy("atskv", n_recent=4, betas=[1.0, 1.0, 1.3])
    moved = compress(model, ids, policy, 0.6).stored_counts()[:, 0].sum(-1)
    assert moved[2] < plain[2] and moved.sum() == plain.sum() and moved[0] >= plain[0]
    by_file = serve_as(scored_model(), Served(betas=(1.0, 1.0, 1.3)))
    assert torch.equal(
        compress(by_file, ids, make_policy("atskv", n_recent=4), 0.6).stored_counts()[:, 0].sum(-1), moved
    )
    with pytest.raises(ConfigError, match="betas are for 2 layers, the model has 3"):
        compress(model, ids, make_policy("atskv", betas=(1.0, 2.0)), 0.6)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_short_contexts_and_small_budgets(n):
    """One token, budgets above the context, budgets under what always stays: sinks first, then the newest."""
    model, ids = scored_model(), token_ids(n)
    assert compress(model, ids, "atskv", n + 7).intact
    assert compress(model, ids, "atskv", 0.0).intact
    cache = compress(model, ids, make_policy("atskv"), 3)
    assert int(cache.stored_counts().sum()) == 6 * min(3, n)
    if n > 3:
        assert kept_of(cache)[..., :1].all(), "the first sink is in every head"
    both = compress(model, ids, "atskv", 0.5, phase="both")
    logits, _ = decode(model, both, torch.cat([ids, ids], 1), [1] * n)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("phase", ["prefill", "both"])
def test_broken_activations_stop_before_anything_leaves(phase):
    model = scored_model()
    ids = token_ids(T)
    model.model.layers[1].input_layernorm.weight.data[3] = math.nan
    with pytest.raises(ConfigError, match=r"relevance scores in layer 1 are NaN or infinite"):
        compress(model, ids, "atskv", 0.5, phase=phase)


def test_what_cannot_be_is_told():
    model, ids = scored_model(), token_ids(T)
    with pytest.raises(ConfigError, match="scope must be head or model, got layer"):
        compress(model, ids, "atskv", Budget(0.5, scope="layer"))
    with pytest.raises(ConfigError, match=r"budget tokens=8 is under n_sink=4 \+ n_recent=10"):
        compress(model, ids, make_policy("atskv", n_sink=4, n_recent=10), 8)
    for args, message in (
        ({"target": 1.0}, r"compression_ratio must be in \[0, 1\)"),
        ({"betas": [0.0]}, "betas must be numbers over 0"),
        ({"hysteresis": 2}, r"hysteresis must be in \[0, 1\)"),
        ({"n_sink": -1}, "n_sink must be a whole number"),
        ({"tresholds": 1}, r"unknown argument of atskv 'tresholds' \(did you mean 'threshold'\?\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_policy("atskv", **args)
    with pytest.raises(ConfigError, match="has no relevance predictors"):
        compress(tiny_model("llama"), ids, "atskv", 0.5, phase="both")
    with pytest.raises(ConfigError, match="handcrafted features, which read the text"):
        compress(scored_model(features=ALL), ids, "atskv", 0.5, phase="both")
