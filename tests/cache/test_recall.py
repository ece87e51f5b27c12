"""Which passive entries a step sees, and which come back: planted keys whose place is known."""

from __future__ import annotations

import pytest
import torch

from oracle import announced
from sparsekv.cache.sparse import ATTENTION
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from toy import tiny_config

H, G, D, T = 2, 2, 16, 64
PLANTED = 23


def planted_cache(active: int = 16, **options) -> tuple[TieredCache, torch.Tensor]:
    """64 entries with small keys, one of which looks along `needle`; all but the last 12 and first 4 are passive."""
    config = tiny_config("llama", num_hidden_layers=1)
    config._attn_implementation = ATTENTION
    cache = TieredCache(config, active, page_size=4, n_sink=2, n_recent=3, **options)
    draw = torch.Generator().manual_seed(0)
    keys, values = 0.1 * torch.randn(2, 1, H, T, D, generator=draw)
    needle = torch.zeros(D)
    needle[0] = 8.0
    keys[:, :, PLANTED] = needle
    values[:, :, PLANTED] = torch.arange(float(D))
    cache.tiers.held = True
    with announced(cache):
        cache.update(keys, values, 0)
    column = torch.arange(T)
    cache.keep_in_layer(0, ((column < 4) | (column >= T - 12))[None, None])
    cache.tiers.held = False
    return cache, needle


def step(cache: TieredCache, query: torch.Tensor) -> torch.Tensor:
    """The attention [H * G, D] of one new token whose queries are all `query`, and whose key and value are zero."""
    with announced(cache):
        cache.update(torch.zeros(1, H, 1, D), torch.zeros(1, H, 1, D), 0)
    layer = cache.layers[0]
    return layer.reader.attend(layer, query.expand(1, H * G, 1, D), None, None)[0, 0]


def test_an_entry_that_the_query_asks_for_comes_back_and_the_weakest_leave():
    cache, needle = planted_cache()
    output = step(cache, needle)
    assert torch.allclose(output, torch.arange(float(D)).expand(H * G, D), atol=0.2)
    for head in range(H):
        resident = cache.layers[0].columns()[head].tolist()
        assert PLANTED in resident and {0, 1, T - 2, T - 1, T} <= set(resident)
        assert len(resident) <= 16
    assert cache.passive_counts().sum() + cache.stored_counts().sum() == H * (T + 1)
    before = [columns.tolist() for columns in cache.layers[0].columns()]
    step(cache, needle)
    for columns, old in zip(cache.layers[0].columns(), before, strict=True):
        assert columns.tolist()[: len(old)] == old, "nothing moves for the same question again"
    assert all(PLANTED in columns for columns in cache.layers[0].columns())


def test_without_recall_the_same_step_misses_it():
    cache, needle = planted_cache(recall_tokens=0)
    assert float(step(cache, needle).abs().max()) < 1
    assert not any(PLANTED in columns for columns in cache.layers[0].columns())


def test_an_entry_beside_is_seen_and_does_not_move():
    cache, needle = planted_cache(active=20, recall_tokens=1)
    output = step(cache, needle)
    assert torch.allclose(output, torch.arange(float(D)).expand(H * G, D), atol=0.2)
    assert cache.stored_counts().unique().tolist() == [17], "16 and the new one"
    attended, stored = cache.last_step()
    assert stored.all() and attended.attended[0, 0].sum(dim=-1).tolist() == [18, 18]
    assert attended.attended[0, 0, :, PLANTED].all()
    assert cache.attended_fraction == pytest.approx(18 / (T + 1))


@pytest.mark.parametrize("recall", [1, 3, 4, 5, 30, 48, 100])
def test_no_more_entries_are_beside_than_allowed(recall):
    cache, needle = planted_cache(active=20, recall_tokens=recall)
    step(cache, needle)
    beside = cache.last_step()[0].attended[0, 0].sum(dim=-1) - cache.stored_counts()[0, 0]
    assert beside.tolist() == [min(recall, 48)] * H


def test_a_query_that_asks_for_nothing_passive_moves_nothing_once_the_room_is_used():
    """A resident that is as good stays: entries are exchanged for ones that weigh clearly more only."""
    cache, needle = planted_cache()
    step(cache, needle)
    before = [set(columns.tolist()) for columns in cache.layers[0].columns()]
    step(cache, torch.zeros(D))
    after = [set(columns.tolist()) for columns in cache.layers[0].columns()]
    assert all(old <= new for old, new in zip(before, after, strict=True))


def test_free_room_is_filled_with_the_best_pages_and_heads_stay_equal():
    cache, needle = planted_cache(active=40)
    step(cache, needle)
    assert cache.stored_counts().unique().tolist() == [35], "40 and 5 slots for the tokens to come"
    assert all(PLANTED in columns for columns in cache.layers[0].columns())


def test_attention_that_is_no_number_is_an_error_and_moves_nothing():
    cache, needle = planted_cache()
    with pytest.raises(ConfigError, match="layer 0: the attention is NaN"):
        step(cache, needle * torch.nan)
    assert cache.passive_counts().flatten().tolist() == [48, 48]
