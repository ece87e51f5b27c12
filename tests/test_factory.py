"""make_cache: every cache by name, in plain generate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from oracle import stepped_logits
from sparsekv import make_cache
from sparsekv.attention import prepare
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.relevance import RelevanceConfig, attach_relevance
from toy import tiny_model, toy_tokenizer

T = 80


def some_ids(total: int = T) -> torch.Tensor:
    return torch.randint(3, 250, (1, total), generator=torch.Generator().manual_seed(3))


def of(name: str) -> dict:
    """SnapKV's window must be smaller than what is stored."""
    return {"window_size": 8} if name == "snapkv" else {}


def generated(model, cache, n: int = 20, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = some_ids() if ids is None else ids
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, do_sample=False)


def test_full_is_the_model_s_own_cache():
    model = prepare(tiny_model("llama"))
    cache = make_cache("full", model.config)
    assert torch.equal(
        generated(model, cache), model.generate(some_ids(), max_new_tokens=20, do_sample=False)
    )
    assert cache.intact and not isinstance(cache, TieredCache)


@pytest.mark.parametrize(
    "name", ["sink_recent", "sliding_window", "knorm", "snapkv", "tova", "anchors", "random"]
)
def test_a_method_evicts_after_the_prompt_and_while_tokens_come(name):
    model = prepare(tiny_model("llama"))
    cache = make_cache(name, model, 20, every=4, tokenizer=toy_tokenizer(), **of(name))
    generated(model, cache)
    assert 20 <= int(cache.stored_counts().min()) <= int(cache.stored_counts().max()) < 24
    assert cache.seen == T + 19


def test_the_factory_s_cache_is_the_one_that_compress_makes():
    model = prepare(tiny_model("llama"))
    ids = some_ids(T + 30)
    made = make_cache("sink_recent", model, 20, every=4, n_sink=2)
    model(input_ids=ids[:, :T], past_key_values=made)
    policy = make_policy("sink_recent", n_sink=2)
    other = compress(model, ids[:, :T], policy, 20, phase="both", every=4)
    assert torch.equal(made.kept_columns(), other.kept_columns())
    assert torch.equal(*(stepped_logits(model, cache, ids, None, [1] * 30) for cache in (made, other)))


def test_a_quest_cache_reads_a_part_of_what_it_stores():
    model = prepare(tiny_model("llama"))
    cache = make_cache("quest", model, 16, page_size=16)
    generated(model, cache)
    assert cache.stored_counts().unique().tolist() == [T + 19]


@pytest.mark.parametrize("name", ["snapkv", "sink_recent", "anchors"])
def test_with_a_passive_tier_nothing_is_lost_and_the_policy_decides(name):
    model = prepare(tiny_model("llama"))
    options = {"every": 4, "tokenizer": toy_tokenizer(), **of(name)}
    cache = make_cache(name, model, 20, passive="cpu", recall_tokens=0, **options)
    lone = make_cache(name, model, 20, **options)
    assert torch.equal(generated(model, cache), generated(model, lone))
    assert torch.equal(cache.kept_columns(), lone.kept_columns())
    total = cache.stored_counts() + cache.passive_counts()
    assert total.unique().tolist() == [T + 19]


@pytest.mark.parametrize("name", ["soft_threshold", "adaptive_block_dropout"])
def test_a_policy_that_observes_with_a_whole_forward_has_two_tiers(name):
    model = prepare(tiny_model("llama"))
    cache = make_cache(name, model, 20, passive="cpu", every=4, window=None)
    generated(model, cache)
    assert int(cache.stored_counts().max()) <= 24
    assert (cache.stored_counts() + cache.passive_counts()).unique().tolist() == [T + 19]


def test_two_tiers_without_a_policy(tmp_path):
    model = prepare(tiny_model("llama"))
    everything = {"recall_tokens": 1000, "page_size": 8}
    cache = make_cache("full", model, active=16, passive=f"disk:{tmp_path / 'tier'}", **everything)
    assert torch.equal(
        generated(model, cache), model.generate(some_ids(), max_new_tokens=20, do_sample=False)
    )
    assert int(cache.stored_counts().max()) <= 16
    assert make_cache("full", model, 24, passive="cpu").tiers.active.tokens == 24
    assert make_cache("knorm", model, 0.5, active="1MiB").tiers.active.n_bytes == 2**20


def test_a_budget_of_zero_is_a_ratio_or_nothing():
    model = prepare(tiny_model("llama"))
    cache = make_cache("knorm", model, 0.0)
    generated(model, cache)
    assert cache.intact
    for made in (
        lambda: make_cache("knorm", model, 0),
        lambda: compress(model, some_ids(), "sink_recent", 0),
    ):
        with pytest.raises(ConfigError, match=r"budget 0 is no number of entries .*; 0.0 is the ratio"):
            made()


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("full", 24, "method 'full' evicts nothing: give no budget"),
        (
            "defensive_kv",
            24,
            "method 'defensive_kv' with budget scope 'head' evicts once, from a context",
        ),
        ("adakv(knorm)", 0.5, "evicts once, .* can't be scored again; use compress"),
        ("knorm", Budget(0.5, scope="layer"), "with budget scope 'layer' evicts once"),
    ],
)
def test_what_could_evict_only_once_is_refused_when_it_is_made(method, budget, message):
    """Not in the middle of an answer, when unequal heads can't be scored again."""
    model = prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match=message):
        make_cache(method, model, budget)
    if method != "full":
        with pytest.raises(
            ConfigError, match="evicts once, what it leaves can't be scored again; use phase='prefill'"
        ):
            compress(model, some_ids(), method, budget, phase="both")
        full = compress(model, some_ids()[:, :40], "full")  # equal heads: as in a first turn
        assert compress(model, some_ids(), method, budget, cache=full).achieved_compression[0] >= 0.5


@pytest.mark.parametrize("route", ["factory", "compress", "prefill", "beside a ratio"])
def test_atskv_holds_a_number_of_bytes(route):
    model = prepare(tiny_model("llama"))
    attach_relevance(model, RelevanceConfig(width=8))
    entry = 2 * model.config.head_dim * 4
    n_entries = 30 * model.config.num_hidden_layers * model.config.num_key_value_heads
    policy = make_policy("atskv", max_bytes=n_entries * entry, n_sink=1, n_recent=2)
    if route == "factory":
        cache = make_cache(policy, model, every=4)
    else:
        budget = 0.01 if route == "beside a ratio" else None
        phase = "prefill" if route == "prefill" else "both"
        cache = compress(model, some_ids(), policy, budget, phase=phase, every=4)
        assert int(cache.stored_counts().sum()) == n_entries
    if route != "prefill":
        ids = torch.cat([some_ids(), some_ids()[:, :1]], dim=1) if cache.seen else some_ids()
        model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert n_entries // 2 < int(cache.stored_counts().sum()) <= n_entries
    half = make_policy("atskv", target=0.5, bounds=(0.0, 0.25), n_sink=1, n_recent=2)
    stored = compress(model, some_ids(), half).stored_counts()
    assert int(stored.sum()) == pytest.approx(0.75 * T * stored.numel(), abs=1), (
        "no more than a quarter at once"
    )
    with pytest.raises(ConfigError, match="max_bytes must be a whole number >= 1, got 0"):
        make_policy("atskv", max_bytes=0)
    for bounds in ([0.5, 0.2], 0.5, [0.5], ["a", "b"], [0.0, 0.5, 0.7]):
        with pytest.raises(
            ConfigError, match=r"bounds must be \(low, high\) with 0 <= low <= high <= 1, got"
        ):
            make_policy("atskv", bounds=bounds)


@pytest.mark.parametrize("features", [("hidden",), ("hidden", "attention"), ("hidden", "handcrafted")])
@pytest.mark.parametrize("tiered", [False, True])
def test_atskv_evicts_by_rounds_as_compress_does(features, tiered):
    model = prepare(tiny_model("llama"))
    attach_relevance(model, RelevanceConfig(width=8, features=features))
    ids = some_ids(T + 20)
    options = {"passive": "cpu", "active": 60, "recall_tokens": 0} if tiered else {}
    made = make_cache("atskv", model, 40, every=4, tokenizer=toy_tokenizer(), **options)
    with torch.no_grad():
        model(input_ids=ids[:, :T], past_key_values=made)
    logits = stepped_logits(model, made, ids, None, [1] * 20)
    counts = made.stored_counts().double().mean(dim=(0, 2))
    assert made.seen == T + 20 and 36 <= float(counts) <= 44
    if not tiered:
        cache = compress(model, ids[:, :T], "atskv", 40, phase="both", every=4, tokenizer=toy_tokenizer())
        assert torch.equal(stepped_logits(model, cache, ids, None, [1] * 20), logits)


@pytest.mark.parametrize("every", [1, 8, 64])
@pytest.mark.parametrize(
    "method", [{"target": 0.2}, {"max_bytes": 10**7}, {"threshold": -100.0}, {"name": "sink_recent"}]
)
def test_the_active_size_holds_where_a_method_s_own_size_is_larger(method, every):
    model = prepare(tiny_model("llama"))
    attach_relevance(model, RelevanceConfig(width=8))
    method = {"name": "atskv", **method}
    own = {"n_sink": 8, "n_recent": 60} if method["name"] == "sink_recent" else {}
    cache = make_cache(
        make_policy(method.pop("name"), **method, **own), model, active=20, passive="cpu", every=every
    )
    ids = some_ids(T + 40)
    with torch.no_grad():
        for start, end in pairwise([0, T - 20, *range(T - 19, T), *range(T, T + 41, 10)]):
            model(input_ids=ids[:, start:end], past_key_values=cache)
            if start:
                assert float(cache.stored_counts().double().mean()) <= 20 + end - start
    assert int((cache.stored_counts() + cache.passive_counts()).min()) == T + 40


@pytest.mark.parametrize("tiered", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_a_cache_that_was_reset_evicts_by_the_text_again(tiered, broken, monkeypatch):
    model, tokenizer = prepare(tiny_model("llama")), toy_tokenizer()
    ids = tokenizer("One. Two, three; four! Five? six: seven. " * 4, return_tensors="pt").input_ids
    options = {"passive": "cpu", "active": 80} if tiered else {}
    made = [
        make_cache("anchors", model, 64, tokenizer=tokenizer, every=8, sink_size=4, recent_size=8, **options)
        for _ in range(2)
    ]
    expected = generated(model, made[0], ids=ids)
    if broken:
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(model.model.layers[1].mlp, "forward", fails)
            generated(model, made[1], ids=ids)
    else:
        generated(model, made[1], ids=ids[:, 5:])
    made[1].reset()
    assert torch.equal(generated(model, made[1], ids=ids), expected)
    assert torch.equal(made[0].kept_columns(), made[1].kept_columns())
    made[1].ids = None
    with pytest.raises(ConfigError, match="'anchors' looks at the text, which this cache was not told of"):
        stepped_logits(model, made[1], torch.cat([expected, ids], dim=1), None, [1] * 9)


def fails(*_):
    raise MemoryError


def test_a_folder_is_free_after_a_cache_was_refused(tmp_path):
    model, place = tiny_model("llama"), f"disk:{tmp_path / 'tier'}"
    for method, options in (
        ("quest", {}),
        ("key_rerotation(knorm)", {}),
        ("atskv", {}),
        ("full", {"recall_tokens": -1}),
    ):
        with pytest.raises(ConfigError) as caught:
            make_cache(method, model, 40, active=60, passive=place, **options)
        assert "\n" not in str(caught.value)
        make_cache("full", model, active=8, passive=place).close()


def test_what_the_factory_refuses():
    model = tiny_model("llama")
    for arguments, options, match in (
        (("snapvk", model, 20), {}, "did you mean 'snapkv'"),
        (("knorm", model), {}, "knorm: give a budget"),
        (("sink_recent", model), {}, "n_recent"),
        (("kvzip", model, 0.5), {}, "use compress"),
        (("relevance", model, 20), {}, "use compress"),
        (("atskv", model, 40), {}, "predictor"),
        (("atskv", model.config, 40), {}, "give the model itself"),
        (("quest", model, 20), {"passive": "cpu"}, "chooses at every step what to read"),
        (("knorm", model, 20), {"every": 0}, "every must be"),
        (("knorm", model, 20), {"recall_tokens": 5}, "needs a second tier"),
        (("knorm", model, 0.5), {"passive": "cpu"}, "give active"),
        (("knorm", model, 20), {"active": 0}, "active must be"),
        (("sink_recent", model, 20), {"n_sinks": 4}, "did you mean 'n_sink'"),
        ((make_policy("knorm"), model, 20), {"n_sink": 4}, "n_sink is for a method's name"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_cache(*arguments, **options)
    with pytest.raises(ConfigError, match=r"evicts while decoding.*prepare"):
        generated(model, make_cache("knorm", model, 20))
