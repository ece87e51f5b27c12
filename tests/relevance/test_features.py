"""Features of entries, computed by hand from full attention matrices and from the text."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.kvpress_reference import layer_contexts
from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.learned_scores import NAME, extra_of, relevance_of
from sparsekv.relevance import ATSKV, Relevance, RelevanceConfig, RelevancePredictor, attach_relevance
from sparsekv.relevance.attention_statistics import AttentionStatistics, of_group
from sparsekv.relevance.features import (
    HandcraftedFeatures,
    extra_features,
    n_features,
    text_features,
    token_frequency,
)
from sparsekv.relevance.token_types import KINDS, token_types
from toy import FAMILIES, tiny_model, toy_tokenizer

T = 40
TEXT = "The 12 foxes, and 3 hens: 12."


def contexts(
    model: Any, ids: torch.Tensor, tokenizer: Any = None
) -> tuple[list[LayerContext], list[torch.Tensor]]:
    """(every layer's context, its full attention matrix [B, Hq, T, T] under eager attention)."""
    model.set_attn_implementation("eager")
    matrices: list[torch.Tensor] = []
    found = layer_contexts(model, ids, attention=matrices, ids=ids, tokenizer=tokenizer)
    return found, matrices


def by_hand(matrix: torch.Tensor, queries: list[int], half_life: float) -> torch.Tensor:
    """[T, 4] of one kv head from its grouped heads' matrices [G, T, T], in plain Python."""
    n = matrix.shape[-1]
    found = torch.zeros(n, 4)
    entropies = []
    for i in range(n):
        seen = [(q, float(matrix[:, q, i].max())) for q in queries if q >= i]
        weights = [2 ** (-(queries[-1] - q) / half_life) for q, _ in seen]
        found[i, 0] = sum(p for _, p in seen) / len(seen)
        found[i, 1] = max(p for _, p in seen)
        found[i, 2] = sum(w * p for w, (_, p) in zip(weights, seen, strict=True)) / sum(weights)
        entropies.append(sum(-p * math.log(p) for _, p in seen if p > 0))
    found[:, 3] = torch.tensor(entropies) / sum(entropies)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_window_statistics_equal_the_full_matrix(family):
    model = tiny_model(family)
    ids = torch.randint(3, 250, (2, T), generator=torch.Generator().manual_seed(0))
    found, matrices = contexts(model, ids)
    for index in architecture.compressible_layers(model):
        stats = AttentionStatistics.of_window(found[index], 8, half_life=4.0)
        raw = torch.stack([stats.mean, stats.max, stats.recency, stats.entropy_share], -1)
        grouped = matrices[index].view(2, 2, -1, T, T)
        for row in range(2):
            for head in range(2):
                wanted = by_hand(grouped[row, head], list(range(T - 8, T)), 4.0)
                torch.testing.assert_close(raw[row, head], wanted, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(stats.features(), (1e-3 + T * raw).log() / 4, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stats.entropy_share.sum(-1), torch.ones(2, 2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_running_sums_equal_one_window(steps, seed):
    """However the queries come, one by one or in blocks: the numbers are those of all of them at once."""
    n = sum(steps)
    logits = torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(seed))
    weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    at_once = AttentionStatistics.empty(1, 2, half_life=3.0)
    at_once.update(weights)
    running, end = AttentionStatistics.empty(1, 2, half_life=3.0), 0
    for size in steps:
        running.update(weights[:, :, end : end + size, : end + size])
        end += size
    torch.testing.assert_close(running.sums, at_once.sums, atol=1e-5, rtol=1e-5)
    for head in range(2):
        wanted = by_hand(weights[:1, head], list(range(n)), 3.0)
        torch.testing.assert_close(running.mean[0, head], wanted[:, 0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(running.recency[0, head], wanted[:, 2], atol=1e-6, rtol=1e-4)
        if n > 1:
            torch.testing.assert_close(running.entropy_share[0, head], wanted[:, 3], atol=1e-5, rtol=1e-4)


def test_crop_reorder_and_keep_leave_the_right_entries():
    weights = torch.rand(3, 2, 4, 9, generator=torch.Generator().manual_seed(1))
    stats = AttentionStatistics.empty(3, 2)
    stats.update(weights)
    whole = stats.sums.clone()
    stats.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(stats.sums, whole[[2, 0, 0]])
    kept = torch.zeros(3, 2, 9, dtype=torch.bool)
    kept[:, 0, [1, 4, 8]] = kept[:, 1, [0, 2, 3]] = True
    stats.keep(kept)
    assert torch.equal(stats.sums[:, 0], whole[[2, 0, 0], 0][:, [1, 4, 8]])
    assert torch.equal(stats.sums[:, 1], whole[[2, 0, 0], 1][:, [0, 2, 3]])
    stats.crop(2)
    assert stats.sums.shape == (3, 2, 2, 6)
    with pytest.raises(ConfigError, match="the same number of entries"):
        stats.keep(torch.tensor([[True, False], [True, True]])[None].expand(3, 2, 2))
    with pytest.raises(ConfigError, match="2 entries were given 1 queries over 1"):
        stats.update(torch.ones(3, 2, 1, 1))
    with pytest.raises(ConfigError, match=r"unknown grouped 'maxx' \(did you mean 'max'\?\)"):
        of_group(torch.ones(1, 1, 1, 1, 1), "maxx")
    with pytest.raises(ConfigError, match="half_life must be over 0"):
        AttentionStatistics.empty(1, 1, half_life=0)


def test_attention_goes_to_the_largest_of_the_grouped_heads_or_the_mean():
    weights = torch.tensor([[0.7, 0.3], [0.2, 0.8]])[None, None, :, None]  # [1, 1, G=2, Q=1, T=2]
    torch.testing.assert_close(of_group(weights)[0, 0, 0], torch.tensor([0.7, 0.8]))
    torch.testing.assert_close(of_group(weights, "mean")[0, 0, 0], torch.tensor([0.45, 0.55]))


def word_tokenizer() -> Any:
    """One token per word or mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "The", "fox", ",", "12", "3.5", "and", "\n", "Of", "x7", "..."]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_kinds_of_tokens_by_hand():
    kinds = token_types(torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3]), word_tokenizer())
    assert [KINDS[kind] for kind in kinds] == [
        *("special", "stop_word", "content", "punctuation", "number", "number", "stop_word", "punctuation"),
        *("stop_word", "content", "punctuation", "content"),
    ]
    # a mark of three bytes, a token each; an id beyond the tokenizer's vocabulary
    tokenizer = toy_tokenizer()
    ids = torch.tensor([*tokenizer("k—")["input_ids"], 300])
    assert [KINDS[kind] for kind in token_types(ids, tokenizer)] == [
        "content",
        *["punctuation"] * 3,
        "content",
    ]
    assert token_types(torch.zeros(0, dtype=torch.long), tokenizer).numel() == 0


def test_frequency_by_hand():
    frequency = token_frequency(torch.tensor([5, 9, 5, 7, 5]))
    torch.testing.assert_close(frequency, torch.tensor([3, 1, 3, 1, 3]).float().log() / math.log(5))
    assert token_frequency(torch.tensor([4])).tolist() == [0.0]


def test_handcrafted_features_by_hand():
    tokenizer = toy_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[None]
    total = ids.shape[1]
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 4, 6, generator=generator).unbind(0)
    columns = torch.tensor([0, 4, 9, total - 1])
    found = HandcraftedFeatures()(keys, values, ids, tokenizer, columns)
    assert found.shape == (1, 2, 4, 10) and len(HandcraftedFeatures.NAMES) == 10
    for head in range(2):
        for i, column in enumerate(columns.tolist()):
            character = TEXT[column]
            kind = (
                "number" if character.isdigit() else "punctuation" if not character.isalpha() else "content"
            )
            kind = "stop_word" if character in "ai" else kind
            wanted = [
                column / (total - 1),
                math.log(total - column) / 10,
                *(float(kind == name) for name in KINDS),
                math.log(TEXT.count(character)) / math.log(total),
                math.log(keys[0, head, i].norm() / keys[0, head].norm(dim=-1).mean()),
                math.log(values[0, head, i].norm() / values[0, head].norm(dim=-1).mean()),
            ]
            torch.testing.assert_close(found[0, head, i], torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    scaled = HandcraftedFeatures()(1000 * keys, values / 77, ids, tokenizer, columns)
    torch.testing.assert_close(scaled, found, atol=1e-5, rtol=1e-5)
    nothing = HandcraftedFeatures()(torch.zeros(1, 1, 3, 4), torch.eye(4)[None, None, :3], ids, tokenizer)
    norms = nothing[0, 0, :, -2:]
    assert torch.equal(norms[:, 0], torch.full((3,), -4.0)) and torch.equal(norms[:, 1], torch.zeros(3))
    low = HandcraftedFeatures()(keys.bfloat16(), values.bfloat16(), ids, tokenizer, columns)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, found, atol=0.02, rtol=0)


def test_what_is_first_met_in_inference_mode_can_be_filled_up_later():
    tokenizer, ids = copy.deepcopy(toy_tokenizer()), torch.arange(40)  # of which nothing is known yet
    with torch.inference_mode():
        text_features(ids[:20], tokenizer)
        ATSKV().ranked(torch.nn.Module(), torch.zeros(1, 1, 31), None, 31)
    text_features(ids, tokenizer)
    g = torch.zeros(1, 1, 31, requires_grad=True)
    ATSKV().ranked(torch.nn.Module(), g, None, 31)[..., 10].sum().backward()
    assert g.grad[0, 0, 10] == 0.5 and g.grad.count_nonzero() == 1


def test_text_features_are_remembered_but_never_confused():
    tokenizer = toy_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    first = text_features(ids, tokenizer)
    assert text_features(ids.clone(), tokenizer) is first
    changed = ids.clone()
    changed[0] = ids[4]
    assert not torch.equal(text_features(changed, tokenizer), first)
    for i in range(20):
        text_features(ids[: i + 1], tokenizer)
    assert torch.equal(text_features(ids, tokenizer), first)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        (("attention",), 4),
        (("handcrafted",), 10),
        (("hidden", "attention"), 4),
        (("handcrafted", "attention"), 14),
    ],
)
@pytest.mark.parametrize("width", [0, 5, 40])
def test_groups_make_up_the_score(groups, size, width):
    """g is the hidden part plus the features' part, each written out."""
    config = RelevanceConfig(width=width, bias=0.5, features=groups)
    assert n_features(groups) == size
    model = attach_relevance(tiny_model("llama"), config, seed=2)
    ids = torch.tensor(toy_tokenizer()(TEXT * 2)["input_ids"])[None]
    (ctx, *_), _ = contexts(model, ids, toy_tokenizer())
    predictor = getattr(ctx.module, NAME)
    with torch.no_grad():
        predictor.extra.weight.normal_(generator=torch.Generator().manual_seed(1))
    extra = extra_features(ctx, config)
    assert extra.shape == (1, 2, ids.shape[1], size) and not extra.requires_grad
    parts = {
        "attention": AttentionStatistics.of_window(ctx).features(),
        "handcrafted": HandcraftedFeatures()(ctx.keys, ctx.values, ids, ctx.tokenizer),
    }
    assert torch.equal(extra, torch.cat([parts[g] for g in ("attention", "handcrafted") if g in groups], -1))
    state = predictor.state_dict()
    inner = extra
    if width:
        inner = torch.nn.functional.silu(extra @ state["extra.hidden.weight"].T + state["extra.hidden.bias"])
        assert inner.shape[-1] == min(width, 16)
    wanted = torch.einsum("bhtf,hf->bht", inner, state["extra.weight"]) + 0.5
    if "hidden" in groups:
        alone = RelevancePredictor(64, 2, RelevanceConfig(width=width, bias=0.5))
        alone.load_state_dict({name: value for name, value in state.items() if "extra" not in name})
        wanted = wanted - 0.5 + alone(ctx.hidden_states).transpose(1, 2)
    g = relevance_of(ctx.module, ctx.hidden_states, extra_of(ctx))
    torch.testing.assert_close(g, wanted, atol=1e-5, rtol=1e-5)
    one = predictor.extra(extra[:, 1:], 1)
    torch.testing.assert_close(one[:, 0], predictor.extra(extra)[:, 1])
    with pytest.raises(ConfigError, match=rf"take {size} numbers beside the hidden state, got none"):
        relevance_of(ctx.module, ctx.hidden_states)


def test_all_parts_learn():
    model = attach_relevance(
        tiny_model("llama"), RelevanceConfig(width=3, features=("hidden", "handcrafted"))
    )
    ids = torch.tensor(toy_tokenizer()(TEXT)["input_ids"])[None]
    (ctx, *_), _ = contexts(model, ids, toy_tokenizer())
    relevance_of(ctx.module, ctx.hidden_states, extra_of(ctx)).square().sum().backward()
    for name, parameter in getattr(ctx.module, NAME).named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_features_train_through_the_plan():
    """Soft eviction as training runs it, padding on the left: gradients reach every part of every layer's predictor."""
    from sparsekv import prepare
    from sparsekv.plan import SelectionPlan
    from sparsekv.training.relaxation import RelaxedRelevance

    features = ("hidden", "attention", "handcrafted")
    model = attach_relevance(prepare(tiny_model("llama")), RelevanceConfig(bias=0.0, features=features))
    tokenizer = toy_tokenizer()
    ids = torch.tensor([tokenizer(TEXT * 2)["input_ids"]] * 2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :9] = False
    policy = RelaxedRelevance(n_sink=1, n_recent=2, noise=0.0)
    boundary = ids.shape[1] - 6

    def run(tokenizer: Any) -> SelectionPlan:
        plan = SelectionPlan(
            policy=policy, boundary=boundary, attention_mask=mask, ids=ids, tokenizer=tokenizer
        )
        places = (mask.long().cumsum(-1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask.long(), position_ids=places, selection=plan).logits
        logits[:, boundary:].square().mean().backward()
        return plan

    plan = run(tokenizer)
    found, _ = contexts(tiny_model("llama"), ids[1:, 9:boundary], tokenizer)
    extra = extra_features(found[0], RelevanceConfig(features=features))
    predictor = getattr(model.model.layers[0].self_attn, NAME)
    with torch.no_grad():
        g = predictor(found[0].hidden_states, extra)[0]
    weight = torch.sigmoid(g)
    weight[0], weight[-2:] = 1.0, 1.0
    assert float(plan.soft_kept[0][1].detach()) == pytest.approx(float(weight.mean()), abs=1e-5)
    for module in (layer.self_attn for layer in model.model.layers):
        for name, parameter in getattr(module, NAME).named_parameters():
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    with pytest.raises(ConfigError, match="handcrafted features, which read the text"):
        run(None)


def test_hidden_alone_is_what_it_was():
    """Same draws, same names, same numbers as before there were other groups."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = RelevancePredictor(12, 3, RelevanceConfig(width=5))
        torch.manual_seed(4)
        hidden = torch.nn.Linear(12, 5)
        score = torch.nn.Linear(5, 3)
        torch.nn.init.normal_(score.weight, std=0.1 * 5**-0.5)
    assert list(found.state_dict()) == ["hidden.weight", "hidden.bias", "score.weight", "score.bias"]
    assert torch.equal(found.hidden.weight, hidden.weight) and torch.equal(found.score.weight, score.weight)
    ctx = SimpleNamespace(keys=None)
    assert found.extra_of(ctx) is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((), "must be a list of groups of hidden, attention, handcrafted"),
        ("hidden", "must be a list of groups"),
        (("hiden",), r"unknown group of relevance features 'hiden' \(did you mean 'hidden'\?\)"),
        (("hidden", "hidden"), "name a group twice: hidden, hidden"),
    ],
)
def test_mistakes_in_groups_are_told(features, message):
    with pytest.raises(ConfigError, match=message):
        RelevanceConfig(features=features)


def test_groups_are_kept_in_one_order():
    assert RelevanceConfig(features=["handcrafted", "hidden"]).features == ("hidden", "handcrafted")


def test_a_text_is_needed_where_it_is_read():
    model = attach_relevance(tiny_model("llama"), RelevanceConfig(features=("handcrafted",)))
    ids = torch.randint(3, 250, (1, T))
    (ctx, *_), _ = contexts(model, ids)
    with pytest.raises(ConfigError, match="handcrafted features, which read the text"):
        Relevance().score_layer(ctx, Budget(0.5))


@pytest.mark.parametrize("where", ["hidden", "keys", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_activations_name_their_layer(where, value):
    features = ("hidden", "attention", "handcrafted")
    model = attach_relevance(tiny_model("llama"), RelevanceConfig(features=features))
    ids = torch.randint(3, 250, (1, T))
    found, _ = contexts(model, ids, toy_tokenizer())
    ctx = found[1]
    if where == "hidden":
        ctx.hidden_states[0, 3, 5] = value
    elif where == "keys":
        ctx.keys = ctx.keys.clone()
        ctx.keys[0, 1, 7, 2] = value
    else:
        getattr(ctx.module, NAME).score.bias.data[0] = value
    with pytest.raises(ConfigError, match=r"relevance scores in layer 1 are NaN or infinite") as caught:
        Relevance().score_layer(ctx, Budget(0.5))
    assert "\n" not in str(caught.value)
    Relevance().score_layer(found[0], Budget(0.5))
