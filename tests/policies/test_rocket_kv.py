"""RocketKV's split and first stage against arXiv 2502.14051, whole decoding steps in a model, and Quest beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpress_reference import layer_contexts, token_ids
from window_reference import eager_weights, pooled_by_hand

from oracle import stepped_logits
from sparsekv.attention import prepare
from sparsekv.cache.steps import StepReader, attended_fraction, reads_by_step
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.budget import Budget
from sparsekv.policies.rocket_kv import Quest, RocketKV, adaptive_kernel, first_stage_exponent
from sparsekv.policies.step_rules import HybridRule, QuestRule

T = 96


def test_the_split_is_the_papers() -> None:
    assert first_stage_exponent(1) == pytest.approx(0.2)
    assert first_stage_exponent(4) == pytest.approx(0.32)  # 0.2 + 0.06 * 2
    assert first_stage_exponent(256) == pytest.approx(0.68)
    assert first_stage_exponent(2.0**12) == 0.8  # at most
    policy = RocketKV()
    # 1024 tokens at 0.75: c = 4, 1024 / 4 ** 0.32 = 657.1
    assert policy.n_stored(1024, Budget(0.75)) == 657
    assert policy.n_stored(1024, Budget(tokens=256)) == 657
    assert policy.n_stored(1024, Budget(0.0)) == 1024 and policy.n_stored(1, Budget(0.9)) == 1
    assert policy.step_rule(Budget(tokens=256), 0) == HybridRule(tokens=256)
    rule = policy.step_rule(Budget(0.75), 0)
    assert isinstance(rule, HybridRule) and rule.compression == pytest.approx(4**0.68)
    sizes, same = rule.sizes(657, 64), HybridRule(tokens=256).sizes(657, 64)
    assert sizes == same and sizes is not None
    # c of the second stage 2.57: pages of 2, 64 * 2 / 2.57 = 50 channels, 256 / 2 entries
    assert (sizes.page_size, sizes.n_dims, sizes.n_attended) == (2, 50, 128)
    assert policy.step_rule(Budget(0.0), 0) is None


def test_pooling_follows_the_contexts_length() -> None:
    assert [adaptive_kernel(n) for n in (1, 200, 512, 1024, 2048, 10**6)] == [7, 7, 17, 33, 63, 63]
    assert all(adaptive_kernel(n) % 2 for n in range(1, 3000))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_stage_one_is_summed_then_max_pooled(tiny_model: Any, family: str) -> None:
    model, ids = tiny_model(family), token_ids(T, rows=2)
    policy, budget, window = RocketKV(window=6, kernel_size=5), Budget(0.8), 6
    weights = eager_weights(model, ids)
    n_stored = int(T / (T / 19) ** first_stage_exponent(T / 19))
    for ctx in layer_contexts(model, ids)[::2]:
        with torch.no_grad():
            kept, scored = policy.keep_layer(ctx, budget), policy.score_layer(ctx, budget)
        assert kept.sum(-1).unique().tolist() == [n_stored]
        for row in range(2):
            for head in range(2):
                of_heads = weights[ctx.layer_idx][row, 2 * head : 2 * head + 2, -window:, : T - window]
                pooled = pooled_by_hand(of_heads.sum((0, 1)).tolist(), 5, "max")
                scores = scored[row, head, : T - window]
                assert scores.tolist() == pytest.approx(pooled, abs=3e-6)
                best = sorted(range(T - window), key=lambda t: (-float(scores[t]), t))[: n_stored - window]
                wanted = sorted([*best, *range(T - window, T)])
                assert kept[row, head].nonzero().flatten().tolist() == wanted


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = token_ids(T + 8, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize(
    "policy", [RocketKV(window=8), Quest(page_size=4, n_full_layers=1)], ids=lambda p: p.name
)
@pytest.mark.parametrize("budget", [0.8, 20])
def test_padded_rows_decode_what_they_decode_alone(
    tiny_model: Any, family: str, policy: Any, budget: float | int
) -> None:
    model = prepare(tiny_model(family))
    ids, mask = batch()
    cache = compress(model, ids[:, :T], policy, budget, attention_mask=mask[:, :T])
    assert reads_by_step(cache)
    together = stepped_logits(model, cache, ids, mask, [3, 1, 1, 1, 1, 1])
    assert 0 < attended_fraction(cache) < 1
    for row, pad in enumerate((0, 13)):
        alone = compress(model, ids[row : row + 1, pad:T], policy, budget)
        own = stepped_logits(model, alone, ids[row : row + 1, pad:], None, [3, 1, 1, 1, 1, 1])
        assert (own - together[row]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["rocket_kv", "quest"])
def test_steps_differ_from_reading_everything_and_the_question_does_not(tiny_model: Any, name: str) -> None:
    model = prepare(tiny_model("llama"))
    ids, _ = batch()
    cache = compress(model, ids[:1, :T], name, 0.85)
    plain = compress(model, ids[:1, :T], name, 0.85)
    for _, layer in plain.sparse_layers():
        layer.reader = None
    question, answer = slice(0, 4), slice(4, 8)
    by_step = stepped_logits(model, cache, ids[:1], None, [4, 1, 1, 1, 1])
    whole = stepped_logits(model, plain, ids[:1], None, [4, 1, 1, 1, 1])
    assert (by_step[:, question] - whole[:, question]).abs().max() <= 1e-5
    assert (by_step[:, answer] - whole[:, answer]).abs().max() > 1e-2
    assert attended_fraction(plain) == 1.0 and attended_fraction(cache) < 0.9


@pytest.mark.parametrize("name", ["rocket_kv", "quest"])
@pytest.mark.parametrize(("budget", "n"), [(0.0, T), (10_000, T), (0.9, 1), (3, 5)])
def test_sizes_at_the_edges(tiny_model: Any, name: str, budget: float | int, n: int) -> None:
    model, ids = prepare(tiny_model("llama")), token_ids(n + 6)
    cache = compress(model, ids[:, :n], name, budget)
    full = compress(model, ids[:, :n], "full")
    steps = [1] * 6
    ours, plain = (
        stepped_logits(model, cache, ids, None, steps),
        stepped_logits(model, full, ids, None, steps),
    )
    if budget in (0.0, 10_000):
        assert (ours - plain).abs().max() <= 1e-5 and attended_fraction(cache) == 1.0
    assert bool(ours.isfinite().all())


def test_generate_and_beams_work(tiny_model: Any) -> None:
    model = prepare(tiny_model("llama"))
    ids, mask = batch()
    cache = compress(model, ids[:, :T], "rocket_kv", 0.8, attention_mask=mask[:, :T])
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, num_beams=3, do_sample=False
    )
    assert out.shape == (2, T + 13) and cache.batch == 6 and 0 < attended_fraction(cache) < 1


def test_another_method_on_the_same_cache_reads_everything_again(tiny_model: Any) -> None:
    model = prepare(tiny_model("llama"))
    ids, _ = batch()
    cache = compress(model, ids[:1, :T], "quest", 0.8)
    assert isinstance(cache.layers[2].reader, StepReader) and cache.layers[0].reader is None
    assert cache.intact
    compress(model, ids[:1, : T + 4], "sink_recent", 20, cache=cache)
    assert not reads_by_step(cache)


def test_a_stock_attention_that_would_read_everything_is_refused(tiny_model: Any) -> None:
    model = prepare(tiny_model("llama"))
    cache = compress(model, token_ids(T), "quest", 0.8)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="prepare"):
        cache.check_attention()


def test_quest_spares_the_first_layers() -> None:
    rules = [Quest().step_rule(Budget(0.5), place) for place in range(4)]
    assert rules[:2] == [None, None] and rules[2:] == [QuestRule(Budget(0.5), 16)] * 2
    assert Quest(n_full_layers=0).step_rule(Budget(tokens=7, scope="layer"), 0) == QuestRule(
        Budget(tokens=7), 16
    )


def test_refusals(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), token_ids(T)
    for name, arguments, message in (
        ("rocket_kv", {"chunk": 20}, "method 'rocket_kv' needs the whole context at once"),
        ("rocket_kv", {"phase": "both"}, "method 'rocket_kv' evicts nothing while decoding"),
        ("quest", {"phase": "decode"}, "method 'quest' evicts nothing while decoding"),
        ("rocket_kv", {"budget": Budget(0.5, scope="layer")}, "scope must be head, got layer"),
        ("rocket_kv", {"budget": None}, "rocket_kv needs a budget"),
        ("quest", {"budget": None}, "quest needs a budget"),
    ):
        with pytest.raises(ConfigError, match=message):
            compress(model, ids, name, **{"budget": 0.5, **arguments})
    calls: list[Any] = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        ConfigError, match="'quest' chooses at every step what to read, as a second tier does by itself"
    ):
        compress(model, ids, "quest", 0.5, cache=TieredCache(model, 20))
    handle.remove()
    assert not calls, "told before the context is read"
    for name, parameters, message in (
        ("rocket_kv", {"kernel_size": 6}, "kernel_size must be odd, got 6; use 7"),
        ("quest", {"page_size": 0}, "page_size must be a whole number >= 1"),
        ("quest", {"n_full_layers": -1}, "n_full_layers must be a whole number >= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_policy(name, **parameters)
    with pytest.raises(ConfigError, match="rocket_kv chooses at every step what to read"):
        PolicyPress(make_policy("rocket_kv"), 0.5)
    with pytest.raises(ConfigError, match="method quest chooses at every decoding step"):
        EvictionAug(["quest"])


def test_memory_falls_by_the_first_stage_only(tiny_model: Any) -> None:
    cache = compress(tiny_model("llama"), token_ids(T), "rocket_kv", 0.8)
    compression = T / Budget(0.8).n_kept(T)
    expected = 1 - compression ** -first_stage_exponent(compression)
    assert cache.achieved_compression[0] == pytest.approx(expected, abs=1 / T)
    assert math.isclose(attended_fraction(cache), 1.0)  # no step has been made
