"""evict_dynamic_cache_inplace: a stock DynamicCache loses entries and keeps counting tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from oracle import masked_logits
from sparsekv.attention import prepare
from sparsekv.cache.inplace import evict_dynamic_cache_inplace
from sparsekv.errors import ConfigError
from sparsekv.selection import Selection
from toy import FAMILIES, tiny_model

T, Q = 40, 7
KEPT = [0, 1, 2, 17, 18, *range(30, 40)]


def some_ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (rows, T + Q), generator=torch.Generator().manual_seed(3))


def read(model, ids) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(input_ids=ids[:, :T], past_key_values=cache)
    return cache


def expected_tokens(family: str, ids: torch.Tensor, n_new: int) -> torch.Tensor:
    """Greedy continuation by masked forwards over the whole sequence."""
    model = prepare(tiny_model(family))
    selection = Selection.from_kept(torch.isin(torch.arange(T), torch.tensor(KEPT))[None, None, None])
    for _ in range(n_new):
        logits = masked_logits(model, ids, None, selection.extend(ids.shape[1]), 1)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sparsekv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_get_the_right_positions_in_plain_generate(family, attention):
    model = tiny_model(family)
    if attention == "sparsekv":
        prepare(model)
    else:
        model.set_attn_implementation(attention)
    ids = some_ids()
    cache = read(model, ids)
    same = evict_dynamic_cache_inplace(cache, torch.tensor(KEPT))
    assert same is cache and cache.get_seq_length() == T
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, expected_tokens(family, ids, 6))
    assert cache.get_seq_length() == T + Q + 5


def test_the_memory_of_the_old_layers_is_free():
    model = tiny_model("llama")
    cache = read(model, some_ids())
    whole = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    evict_dynamic_cache_inplace(cache, KEPT)
    left = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    assert left * T == whole * len(KEPT)


def test_order_and_repetition_do_not_matter_and_a_second_eviction_goes_on():
    model = tiny_model("llama")
    ids = some_ids(2)
    first, second = read(model, ids), read(model, ids)
    evict_dynamic_cache_inplace(first, KEPT)
    evict_dynamic_cache_inplace(second, [*reversed(KEPT), 17, 17])
    assert [c.tolist() for c in second.layers[2].columns()] == [KEPT] * 4
    assert torch.equal(first.layers[1].keys, second.layers[1].keys)
    evict_dynamic_cache_inplace(second, [0, 5, 17, 39])
    assert [c.tolist() for c in second.layers[0].columns()] == [[0, 17, 39]] * 4, "5 left the first time"
    assert second.get_seq_length() == T


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keep_idx is empty"),
        ([0, T], r"must lie in \[0, 40\), got 0…40"),
        ([-1, 3], r"must lie in \[0, 40\), got -1…3"),
        (torch.arange(T) < 9, r"whole numbers\), got torch.bool"),
        ([0.5, 3.0], r"whole numbers\), got torch.float32"),
    ],
)
def test_bad_indices_are_named(keep, message):
    cache = read(tiny_model("llama"), some_ids())
    before = cache.layers[0].keys
    with pytest.raises(ConfigError, match=message):
        evict_dynamic_cache_inplace(cache, keep)
    assert cache.layers[0].keys is before, "a refused call must leave the cache alone"


def test_other_caches_are_refused():
    model = tiny_model("llama")
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="takes a DynamicCache, got StaticCache"):
        evict_dynamic_cache_inplace(static, KEPT)
    with pytest.raises(ConfigError, match="without offloading"):
        evict_dynamic_cache_inplace(DynamicCache(config=model.config, offloading=True), KEPT)
