"""`atskv` in a prefill, in batches, and while decoding: against masked forwards and choices worked out from outside."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from oracle import masked_logits, positions, stepped_logits
from sparsekv import architecture, compress, prepare
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.probe import Request, prefill
from sparsekv.relevance import (
    ATSKV,
    AttentionStatistics,
    HandcraftedFeatures,
    RelevanceConfig,
    Served,
    attach_relevance,
    relevance_modules,
    serve_as,
)
from sparsekv.relevance.threshold import ThresholdController
from sparsekv.selection import NEVER, Selection
from toy import tiny_model, toy_tokenizer

T, STEPS = 48, 40
ALL = ("hidden", "attention", "handcrafted")


def scored_model(family: str = "llama", features: tuple[str, ...] = ("hidden",), width: int = 0) -> Any:
    """Predictors whose scores differ widely."""
    model = attach_relevance(prepare(tiny_model(family)), RelevanceConfig(width, features=features))
    generator = torch.Generator().manual_seed(2)
    for module in relevance_modules(model).values():
        predictor = module.relevance
        torch.nn.init.normal_(predictor.score.weight, std=0.3, generator=generator)
        if predictor.extra is not None:
            torch.nn.init.normal_(predictor.extra.weight, std=1.0, generator=generator)
    return model


def token_ids(n: int, rows: int = 1, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, 250, (rows, n), generator=torch.Generator().manual_seed(seed))


def kept_of(cache: Any) -> torch.Tensor:
    """BoolTensor [B, compressible layers, H, T seen]."""
    return cache.kept_columns()[:, cache.compressible]


@torch.no_grad()
def decode(
    model: Any, cache: Any, ids: torch.Tensor, steps: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits of the new tokens, what is stored after every step)."""
    logits, stored, begin = [], [], cache.seen
    for size in steps:
        logits.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
        stored.append(kept_of(cache))
        begin += size
    return torch.cat(logits, dim=1), stored


# ---- prefill ------------------------------------------------------------------------------------------------------


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


# ---- decoding -----------------------------------------------------------------------------------------------------


def hidden_of(
    model: Any, ids: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """(logits, per layer the input, rotary, keys and values) of one masked forward over everything."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found.append({"hidden": kwargs["hidden_states"], "rotary": kwargs["position_embeddings"]})

    handles = [
        m.register_forward_pre_hook(hook, with_kwargs=True) for m in architecture.attention_modules(model)
    ]
    with torch.no_grad():
        logits = model(ids, selection=selection, past_key_values=cache).logits
    for handle in handles:
        handle.remove()
    for layer, entry in zip(cache.layers, found, strict=True):
        entry |= {"keys": layer.keys, "values": layer.values}
    return logits, found


def selection_of(first: torch.Tensor, stored: list[torch.Tensor], steps: list[int]) -> Selection:
    """When each entry left, from what was stored after every step."""
    total = T + sum(steps)
    at = torch.full((1, *first.shape[1:3], total), NEVER, dtype=torch.int32)
    end = T
    for size, kept in zip([0, *steps], [first, *stored], strict=True):
        end += size
        gone = ~kept & (at[..., :end] == NEVER)
        at[..., :end][gone] = end
    return Selection(at)


@pytest.mark.parametrize(
    ("budget", "steps", "every"),
    [
        (Budget(0.6), [1] * STEPS, 8),
        (Budget(tokens=24), [1] * STEPS, 64),
        (Budget(0.75), [1, 1, 7, 1, 1, 1, 12, 1, 1, 1, 1, 1, 5, 1, 1, 1], 1),
    ],
)
@pytest.mark.parametrize("phase", ["both", "decode"])
def test_decoding_keeps_what_the_quantile_of_all_remembered_scores_says(budget, steps, every, phase):
    """Logits are those of a masked forward; every choice is repeated from that forward's hidden states."""
    model = scored_model()
    ids = token_ids(T + sum(steps))
    policy = ATSKV(n_sink=2, n_recent=5)
    cache = compress(model, ids[:, :T], policy, budget, phase=phase, every=every)
    first = kept_of(cache)
    logits, stored = decode(model, cache, ids, steps)
    selection = selection_of(first, stored, steps)
    masked, entries = hidden_of(model, ids, selection)
    assert (masked[:, T:] - logits).abs().max() <= 1e-4
    assert (masked[:, T:] - masked_logits(model, ids, None, None, sum(steps))).abs().max() > 1e-2

    controller = ThresholdController(budget)
    with torch.no_grad():
        ranks = torch.stack(
            [
                torch.nn.functional.logsigmoid(m.relevance(entry["hidden"]))[0].T
                for m, entry in zip(architecture.attention_modules(model), entries, strict=True)
            ]
        )
    column = torch.arange(ids.shape[1])
    held = torch.ones(3, 2, T, dtype=torch.bool)
    end = T
    for size, kept in zip([0, *steps], [first, *stored], strict=True):
        end += size
        held = torch.cat([held, torch.ones(3, 2, size, dtype=torch.bool)], -1)
        now = ranks[..., :end].clone()
        now[..., end - 5 :] = 1e6 + column[end - 5 : end]
        now[..., :2] = 1e8 - 8 * column[:2]
        if size or phase == "both":
            pieces = [[now[i, h][held[i, h]] for h in range(2)] for i in range(3)]
            chosen = controller.cut(pieces, end, every=every if size else None)
            for i in range(3):
                for h in range(2):
                    if chosen is not None:
                        held[i, h, held[i, h].nonzero().flatten()[~chosen[i][h]]] = False
        assert torch.equal(held, kept[0])
        limit = budget.n_kept(end) * 6
        if size or phase == "both":
            assert int(held.sum()) <= limit, "after a step the budget holds"
    assert any(len(kept[0].sum(-1).unique()) > 1 for kept in stored), "ragged"


def test_features_go_on_while_decoding():
    """The remembered scores of what is stored equal those worked out from all weights of the masked forward."""
    features, width = ALL, 3
    model, tokenizer = scored_model(features=features, width=width), toy_tokenizer()
    steps = [1] * 10 + [4] + [1] * 9
    total = T + sum(steps)
    ids = token_ids(total)
    policy = ATSKV(n_sink=0, n_recent=0)
    budget = Budget(0.5)
    cache = compress(model, ids[:, :T], policy, budget, phase="both", every=6, tokenizer=tokenizer)
    first = kept_of(cache)
    controller = cache.decode.rounds.controller
    assert controller.rows[0].rounds == 1
    seen_ranks: list[list[list[torch.Tensor]]] = []
    whole_cut = controller.cut

    def spy(ranks: Any, *args: Any, **kwargs: Any) -> Any:
        seen_ranks.append(ranks)
        return whole_cut(ranks, *args, **kwargs)

    controller.cut = spy
    logits, stored = decode(model, cache, ids, steps)
    selection = selection_of(first, stored, steps)
    masked, entries = hidden_of(model, ids, selection)
    assert (masked[:, T:] - logits).abs().max() <= 1e-4
    # the last round, by hand: which step it was, and what was stored then
    ends = [T + sum(steps[: i + 1]) for i in range(len(steps))]
    before = [first, *stored[:-1]]
    rounds = [i for i, kept in enumerate(stored) if int(kept.sum()) < int(before[i].sum()) + 6 * steps[i]]
    assert len(rounds) == len(seen_ranks) > 1
    last = rounds[-1]
    end = ends[last]
    for index, (module, entry) in enumerate(zip(architecture.attention_modules(model), entries, strict=True)):
        at = selection.evicted_at[0, index]
        weights = full_weights(module, entry, at, total)
        base = module.relevance.hidden_part(entry["hidden"])[0]
        for head in range(2):
            held = torch.cat([before[last][0, index, head], torch.ones(steps[last], dtype=torch.bool)])
            columns = held.nonzero().flatten()
            observers = [*range(T - 32, end)]  # the window of the prefill, then every token
            looked = weights[head, :, observers][..., :end].amax(0)  # [Q, end]
            sums = torch.stack(
                [
                    looked.sum(0),
                    looked.amax(0),
                    looked.new_zeros(end),
                    torch.special.entr(looked).sum(0),
                    torch.tensor([sum(q >= c for q in observers) for c in range(end)]).float(),
                    looked.new_zeros(end),
                ],
                -1,
            )
            decay = torch.tensor([2 ** (-(observers[-1] - q) / 16) for q in observers])
            sees = torch.tensor([[float(q >= c) for c in range(end)] for q in observers])
            sums[:, 2], sums[:, 5] = decay @ looked, decay @ sees
            attention = AttentionStatistics(sums[columns][None, None]).features()
            pair = (entry[name][:, head : head + 1, columns] for name in ("keys", "values"))
            handcrafted = HandcraftedFeatures()(*pair, ids[:, :end], tokenizer, columns)
            with torch.no_grad():
                extra = module.relevance.extra(torch.cat([attention, handcrafted], -1), head)[0, 0]
                wanted = torch.nn.functional.logsigmoid(base[columns, head] + extra)
            torch.testing.assert_close(seen_ranks[-1][index][head], wanted, atol=2e-3, rtol=2e-3)


def full_weights(module: Any, entry: dict[str, Any], at: torch.Tensor, total: int) -> torch.Tensor:
    """[H, G, T, T] attention weights of a masked forward, from scratch."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        query = module.q_proj(entry["hidden"]).view(1, total, 4, 16).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *entry["rotary"])
        logits = query.view(2, 2, total, 16) @ entry["keys"][0][:, None].transpose(-1, -2) / 4
    column = torch.arange(total)
    visible = (column <= column[:, None]) & (column[:, None] < at[:, None, :])
    return logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)


def test_active_memory_while_generating():
    """Plain `generate`: within the budget after every step, over it by one step's tokens at most, near the target."""
    model, ids = scored_model(), token_ids(60)
    cache = compress(model, ids, "atskv", 0.75, phase="both", every=64)
    sizes = []
    keep = cache.keep_in_layer

    def watched(index: int, kept: torch.Tensor, layer: Any = None) -> None:
        sizes.append((cache.seen, int(cache.stored_counts().sum()) if index == 0 else None))
        keep(index, kept, layer)

    cache.keep_in_layer = watched  # type: ignore[method-assign]
    torch.manual_seed(0)
    out = model.generate(
        torch.cat([ids, token_ids(3, seed=9)], 1), past_key_values=cache, max_new_tokens=340, do_sample=True
    )
    assert out.shape[1] == 403 and cache.seen == 402
    assert cache.achieved_compression[0] == pytest.approx(0.75, abs=0.02)
    for seen, stored in sizes:
        if stored is not None:
            assert stored <= 6 * (max(1, int(seen * 0.25)) + 3)
    n_rounds = sum(stored is not None for _, stored in sizes)
    assert 5 < n_rounds < 250


def test_beams_snapshots_and_cropping_keep_scores_with_their_tokens():
    model = scored_model()
    ids = token_ids(T + 30)
    budget, steps = Budget(0.6), [1] * 12

    def fresh() -> Any:
        return compress(model, ids[:, :T], ATSKV(n_recent=4), budget, phase="both", every=4)

    cache = fresh()
    _, whole = decode(model, cache, ids, steps)
    # rows in another order, repeated
    cache = fresh()
    cache.batch_repeat_interleave(2)
    two = torch.cat([ids, ids.flip(1)])[:, : T + 12]
    two[1, :T] = ids[0, :T]
    decode(model, cache, two, steps[:5])
    cache.reorder_cache(torch.tensor([1, 0]))
    _, swapped = decode(model, cache, two.flip(0), steps[5:])
    assert torch.equal(swapped[-1][1], whole[-1][0]) and not torch.equal(swapped[-1][0], whole[-1][0])
    # back to a snapshot
    cache = fresh()
    decode(model, cache, ids, steps[:3])
    saved = cache.snapshot()
    decode(model, cache, ids.flip(1), steps[3:])
    cache.restore(saved)
    _, again = decode(model, cache, ids, steps[3:])
    assert torch.equal(again[-1], whole[-1])
    # cropped tokens are forgotten with their scores (nothing had left since)
    cache = compress(model, ids[:, :T], ATSKV(), Budget(tokens=200), phase="both")
    plain, _ = decode(model, cache, ids, steps)
    cache.crop(T + 4)
    cropped, _ = decode(model, cache, ids, steps[4:])
    assert (cropped - plain[:, 4:]).abs().max() < 1e-5
    assert all(layer.recent_inputs[0].shape[1] == cache.seen for _, layer in cache.sparse_layers())


def test_chunks_and_later_turns():
    model = scored_model()
    ids = token_ids(96)
    chunked = compress(model, ids, ATSKV(n_recent=4), 0.5, chunk=24)
    assert chunked.achieved_compression[0] == pytest.approx(0.5) and not chunked.intact
    first = compress(model, ids[:, :T], ATSKV(n_recent=4), 0.5, phase="both")
    later = compress(model, ids, ATSKV(n_recent=4), 0.5, cache=first)
    assert later.achieved_compression[0] == pytest.approx(0.5)
    once = compress(model, ids[:, :T], ATSKV(), 0.5)
    with pytest.raises(ConfigError, match="earlier tokens of this cache were read without it"):
        compress(model, ids, ATSKV(), 0.5, cache=once)


def test_the_threshold_alone_goes_on_while_decoding():
    model = scored_model()
    ids = token_ids(T + 20)
    policy = ATSKV(n_sink=2, n_recent=4, threshold=1.0)
    cache = compress(model, ids[:, :T], policy, phase="both", every=5)
    _, stored = decode(model, cache, ids, [1] * 20)
    sizes = [int(kept.sum()) for kept in stored]
    drops = [i + 1 for i in range(1, 20) if sizes[i] < sizes[i - 1] + 6]
    assert set(drops) <= {5, 10, 15, 20} and len(drops) >= 2


def test_padded_rows_decode_as_alone():
    model = scored_model()
    ids, pad = token_ids(T + 16, rows=2), 13
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    policy = ATSKV(n_recent=4)
    cache = compress(model, ids[:, :T], policy, 0.6, attention_mask=mask[:, :T], phase="both", every=4)
    together = stepped_logits(model, cache, ids, mask, [1] * 16)
    for row, start in ((0, 0), (1, pad)):
        alone = compress(model, ids[row : row + 1, start:T], policy, 0.6, phase="both", every=4)
        logits, stored = decode(model, alone, ids[row : row + 1, start:], [1] * 16)
        assert torch.equal(kept_of(cache)[row, ..., start:], stored[-1][0])
        assert (logits[0] - together[row]).abs().max() <= 1e-4
    assert positions(mask)[1, -1] == T + 15 - pad


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
