"""Which passive entries a step sees, and which come back: planted keys whose place is known."""

from __future__ import annotations

import pytest
import torch

from oracle import announced
from sparsekv.cache.recall import EAGER, EVERY, OFTEN
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


def test_an_entry_beside_is_seen_and_does_not_move_at_once():
    cache, needle = planted_cache(active=20, recall_tokens=1)
    output = step(cache, needle)
    assert torch.allclose(output, torch.arange(float(D)).expand(H * G, D), atol=0.2)
    assert cache.stored_counts().unique().tolist() == [17], "16 and the new one"
    attended, stored = cache.last_step()
    assert stored.all() and attended.attended[0, 0].sum(dim=-1).tolist() == [18, 18]
    assert attended.attended[0, 0, :, PLANTED].all()
    assert cache.attended_fraction == pytest.approx(18 / (T + 1))


def residents(cache: TieredCache) -> list[list[int]]:
    return [columns.tolist() for columns in cache.layers[0].columns()]


@pytest.mark.parametrize("recall", [1, 8, 100])
def test_an_entry_that_is_recalled_often_moves_in_for_the_weakest(recall):
    cache, needle = planted_cache(active=20, recall_tokens=recall)
    for place in range(OFTEN):
        assert not any(PLANTED in columns for columns in residents(cache)), "not yet"
        output = step(cache, needle)
        assert torch.allclose(output, torch.arange(float(D)).expand(H * G, D), atol=0.2)
        attended, stored = cache.last_step()
        seen = 16 + place + 1 + min(recall, 48)
        assert attended.attended[0, 0].sum(dim=-1).tolist() == [seen] * H, "who moved was seen as well"
        assert (attended.attended & ~stored).sum() == 0
    for head, columns in enumerate(residents(cache)):
        assert PLANTED in columns and {0, 1, T + OFTEN - 1} <= set(columns)
        assert len(columns) == 16 + OFTEN, "one came and one left"
        passive = cache.tiers.store.columns(0, 0, head).tolist()
        assert sorted(columns + passive) == list(range(T + OFTEN)), "and nothing else moved"
    output = step(cache, needle)
    assert torch.allclose(output, torch.arange(float(D)).expand(H * G, D), atol=0.2)


def test_entries_that_do_not_matter_stay_where_they_are_however_often_they_are_recalled():
    """All that is passive is recalled at every step, and weighs what the residents weigh."""
    cache, _ = planted_cache(active=22, recall_tokens=100)  # without a free place once they were counted
    before = residents(cache)
    for _ in range(OFTEN + 2):
        step(cache, torch.zeros(D))
    for columns, old in zip(residents(cache), before, strict=True):
        assert columns == old + list(range(T, T + OFTEN + 2))


def test_an_entry_that_is_recalled_often_takes_a_free_place_first():
    cache, needle = planted_cache(active=60, recall_tokens=1)
    for _ in range(OFTEN):
        step(cache, needle)
    for columns in residents(cache):
        assert PLANTED in columns and len(columns) == 16 + OFTEN + 1, "nobody left for it"
    assert cache.passive_counts().unique().tolist() == [47]


def test_a_head_with_a_size_of_its_own_does_not_wait_for_a_full_one():
    cache, needle = planted_cache(active=40, recall_tokens=8)
    cache.layers[0].share = torch.tensor([1.6, 0.4])
    assert cache.layers[0].quotas() == [64, 16]
    for _ in range(OFTEN):
        step(cache, needle)
    roomy, full = residents(cache)
    assert PLANTED in roomy and PLANTED in full
    assert set(range(4)) | set(range(T - 12, T + OFTEN)) <= set(roomy), "nobody left for it"
    assert len(full) <= 24


def test_a_step_that_breaks_off_counts_once(monkeypatch):
    cache, needle = planted_cache(active=20, recall_tokens=1)
    for _ in range(OFTEN - 1):
        step(cache, needle)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="full"):
        patched.setattr(cache.tiers.store, "put_layer", full)
        step(cache, needle)
    cache.crop(T + OFTEN - 1)
    assert (cache.layers[0].recalls[:, PLANTED] == OFTEN - 1).all()
    step(cache, needle)
    assert all(PLANTED in columns for columns in residents(cache))


def full(*_):
    raise ConfigError("the folder is full")


def test_later_only_looks_count():
    cache, needle = planted_cache(active=40, recall_tokens=1)
    for _ in range(EAGER):
        step(cache, torch.zeros(D))
    n = 0
    while not any(PLANTED in columns for columns in residents(cache)):
        step(cache, needle)
        n += 1
    assert (OFTEN - 1) * EVERY < n <= OFTEN * EVERY


def test_what_is_counted_goes_with_crops_snapshots_rows_and_forks():
    cache, needle = planted_cache(active=20, recall_tokens=1)
    state = cache.snapshot()
    for _ in range(OFTEN - 1):
        step(cache, needle)
    cache.crop(T)  # forgets the steps' own tokens, not that they asked
    nearly = cache.snapshot()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].recalls.shape == (2 * H, T)
    assert (cache.layers[0].recalls[:, PLANTED] == OFTEN - 1).all()
    cache.restore(nearly)
    twin = cache.fork([cache.selection()] * 2)
    assert (twin.layers[0].recalls[:, PLANTED] == OFTEN - 1).all()
    step(cache, needle)
    assert all(PLANTED in columns for columns in residents(cache))
    assert not cache.layers[0].recalls[:, PLANTED].any(), "starts anew if it leaves again"
    cache.restore(state)
    step(cache, needle)
    assert not any(PLANTED in columns for columns in residents(cache))
    cache.crop(0)
    cache.batch_repeat_interleave(2)
    cache.reset()
    assert cache.layers[0].recalls is None


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
