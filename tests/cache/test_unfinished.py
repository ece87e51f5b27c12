"""A forward that breaks off is noticed before the next one, and can be taken back."""

from __future__ import annotations

import pytest
import torch

from oracle import stepped_logits
from sparsekv.attention import prepare
from sparsekv.cache.join import join
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from toy import tiny_model, toy_tokenizer

T, Q = 40, 20


def some_ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (rows, T + Q + 6), generator=torch.Generator().manual_seed(3))


def breaks_at(monkeypatch, owner, name: str, layer: int | None = None) -> None:
    """`owner.name` fails as a full disk does (for one layer, given as its first argument)."""
    real = getattr(owner, name)

    def fails(*arguments):
        if layer is None or arguments[0] == layer:
            raise ConfigError("no space left")
        return real(*arguments)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_passive_tier_that_fails_leaves_no_cache_that_goes_on_by_itself(monkeypatch, layer):
    model, ids = prepare(tiny_model("llama")), some_ids()
    cache, twin = (compress(model, ids[:, :T], "full", cache=TieredCache(model, 16)) for _ in range(2))
    breaks_at(monkeypatch, cache.tiers.store, "put_layer", layer)
    with pytest.raises(ConfigError, match="no space left"):
        stepped_logits(model, cache, ids, None, [Q])
    monkeypatch.undo()
    again = (
        lambda: stepped_logits(model, cache, ids, None, [Q]),
        lambda: model.generate(ids, past_key_values=cache, max_new_tokens=1),
        lambda: compress(model, ids, "full", cache=cache),
        cache.snapshot,
        lambda: cache.fork([cache.selection()]),
    )
    for use in again:
        with pytest.raises(ConfigError, match=rf"broke off.*crop\({T}\) it or restore a snapshot") as caught:
            use()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"broke off after {T} tokens; crop the cache to at most"):
        cache.crop(T + 5)
    cache.crop(T)
    assert cache.seen == T
    logits, expected = (stepped_logits(model, each, ids, None, [Q, 1, 1, 1]) for each in (cache, twin))
    held = cache.stored_counts() + cache.passive_counts()
    assert held.unique().tolist() == [T + Q + 3], "nothing was lost"
    # Layers before the one that failed may have moved residents by then, so the tiers may differ, not what there is.
    assert layer > 0 or torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("prepared", [True, False])
def test_the_same_generate_again_says_what_happened(monkeypatch, family, layer, prepared):
    """`generate` would cut off the tokens that layer 0 has, and have nothing left to give."""
    model, ids = tiny_model(family), some_ids()
    cache, twin = SparseCache(model.config), SparseCache(model.config)
    if prepared:
        cache, twin = (compress(model, ids[:, :T], "full", cache=TieredCache(model, 1000)) for _ in range(2))
    else:
        for one in (cache, twin):
            model(ids[:, :T], past_key_values=one)
    before = cache.snapshot()
    use = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with monkeypatch.context() as patched:
        breaks_at(patched, model.get_decoder().layers[layer].mlp, "forward")
        with pytest.raises(ConfigError, match="no space left"):
            model.generate(ids, past_key_values=cache, **use)
    with pytest.raises(ConfigError, match=rf"broke off.*crop\({T}\) it"):
        model.generate(ids, past_key_values=cache, **use)
    cache.restore(before)
    found, expected = (model.generate(ids, past_key_values=one, **use) for one in (cache, twin))
    assert torch.equal(found, expected)


def test_cropping_takes_back_what_an_eviction_remembers(monkeypatch):
    """Text, hidden states and counters are those of the tokens that stay."""
    model, ids = prepare(tiny_model("llama")), some_ids()
    for method in ("snapkv", "anchors"):
        caches = [
            compress(model, ids[:, :T], method, 70, phase="both", every=8, tokenizer=toy_tokenizer())
            for _ in range(2)
        ]
        with monkeypatch.context() as patched:
            breaks_at(patched, model.model.layers[1].mlp, "forward")
            with pytest.raises(ConfigError, match="no space left"):
                stepped_logits(model, caches[0], ids, None, [Q])
        caches[0].crop(T)
        for broken, whole in zip(caches[0].layers, caches[1].layers, strict=True):
            assert (broken.recent_inputs is None) == (whole.recent_inputs is None)
            for one, other in zip(broken.recent_inputs or (), whole.recent_inputs or (), strict=True):
                assert torch.equal(one, other)
        assert caches[0].decode.since == caches[1].decode.since
        assert method == "snapkv" or torch.equal(caches[0].ids, caches[1].ids)


def test_after_a_reset_nothing_is_left_of_a_reading_that_broke_off(monkeypatch):
    model, ids = prepare(tiny_model("llama")), some_ids(2)
    cache = SparseCache(model.config)
    with monkeypatch.context() as patched:
        breaks_at(patched, model.model.layers[1].mlp, "forward")
        with pytest.raises(ConfigError, match="no space left"):
            compress(model, ids, "random", 20, cache=cache, seeds=(1, 2))
    cache.reset()
    assert cache.ids is None and cache.seeds is None
    use = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **use)
    assert torch.equal(model.generate(ids, past_key_values=cache, **use), expected)
    cache.crop(30)


def test_a_window_that_was_not_reached_needs_no_cropping(monkeypatch):
    model, ids = prepare(tiny_model("gemma3")), some_ids()
    cache, twin = (compress(model, ids[:, :T], "sink_recent", 20) for _ in range(2))
    with monkeypatch.context() as patched:
        breaks_at(patched, model.get_decoder().layers[0].mlp, "forward")
        with pytest.raises(ConfigError, match="no space left"):
            stepped_logits(model, cache, ids, None, [Q])
    cache.crop(T)
    logits, expected = (stepped_logits(model, each, ids, None, [Q]) for each in (cache, twin))
    assert torch.equal(logits, expected)


def test_restoring_a_snapshot_repairs_too_also_where_a_window_has_moved_on(monkeypatch):
    model, ids = prepare(tiny_model("gemma3")), some_ids()
    cache = compress(model, ids[:, :T], "sink_recent", 20)
    before = cache.snapshot()
    expected = stepped_logits(model, cache, ids, None, [Q])
    cache.restore(before)
    with monkeypatch.context() as patched:
        breaks_at(patched, model.model.layers[2].mlp, "forward")  # after every layer has stored the tokens
        with pytest.raises(ConfigError, match="no space left"):
            stepped_logits(model, cache, ids, None, [Q])
    with pytest.raises(ConfigError, match="broke off"):
        stepped_logits(model, cache, ids, None, [Q])
    cache.restore(before)
    assert torch.equal(stepped_logits(model, cache, ids, None, [Q]), expected)


def test_an_unprepared_model_notices_layers_that_differ_and_a_first_forward_can_be_reset(monkeypatch):
    model, ids = tiny_model("llama"), some_ids()
    cache = SparseCache(model.config)
    with monkeypatch.context() as patched:
        breaks_at(patched, model.model.layers[1].mlp, "forward")
        with pytest.raises(ConfigError, match="no space left"):
            model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match=r"broke off.*reset\(\) it"):
        model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)
    assert join([cache]).seen == ids.shape[1]


def test_arguments_that_are_refused_mark_nothing():
    model, ids = prepare(tiny_model("llama")), some_ids()
    cache = compress(model, ids[:, :T], "full")
    with pytest.raises(ConfigError, match="attention_mask covers"):
        model(ids[:, T:], past_key_values=cache, attention_mask=torch.ones(1, 3))
    stepped_logits(model, cache, ids, None, [Q])
