"""The passive store, in memory and on disk alike: what is put comes back, bit by bit, once."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv.cache.disk import DiskStore
from sparsekv.cache.memory import MemoryStore
from sparsekv.cache.passive import PassiveStore
from sparsekv.errors import ConfigError

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(params=["memory", "disk"])
def store(request: Any, tmp_path: Path) -> Iterator[PassiveStore]:
    made = MemoryStore(4) if request.param == "memory" else DiskStore(tmp_path / "passive", page_size=4)
    yield made
    made.close()


def ragged(counts: list[list[int]], width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A request for columns 0 … n - 1 of every kv head, with entries of its own."""
    columns = torch.cat([torch.arange(n) for row in counts for n in row])
    return torch.tensor(counts), columns, torch.randn(len(columns), width), torch.randn(len(columns), width)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.dtype])


@pytest.mark.parametrize("dtype", BITS)
def test_every_bit_pattern_comes_back(store: PassiveStore, dtype: torch.dtype) -> None:
    limit = torch.iinfo(BITS[dtype])
    raw = torch.randint(
        limit.min, limit.max, (2, 700, 6), dtype=BITS[dtype]
    )  # NaNs and infinities among them
    keys, values = raw.view(dtype)
    columns, counts = torch.cat([torch.randperm(300), torch.randperm(400)]), torch.tensor([[300], [400]])
    store.put_layer(1, counts, columns, keys, values)
    found = store.peek_layer(1, counts, columns)
    assert torch.equal(bits(found[0]), raw[0]) and torch.equal(bits(found[1]), raw[1])
    back = torch.cat([columns[:300].flip(0), columns[300:].flip(0)])
    order = torch.cat([torch.arange(299, -1, -1), torch.arange(699, 299, -1)])
    found = store.take_layer(1, counts, back)
    assert torch.equal(bits(found[0]), raw[0][order]) and torch.equal(bits(found[1]), raw[1][order])
    assert store.n_entries == 0 and found[0].dtype == dtype


def test_what_is_read_is_a_copy(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[3]])
    store.put_layer(0, counts, columns, keys, values)
    was = keys.clone()
    keys.zero_()
    store.peek_layer(0, counts, columns)[0].zero_()
    assert torch.equal(store.peek_layer(0, counts, columns)[0], was)


def test_what_a_caller_changes_after_a_put_was_not_put(store: PassiveStore) -> None:
    """A put is entered when somebody looks; what the caller's tensors hold by then does not matter."""
    counts, columns, keys, values = ragged([[3, 2]])
    expected = keys.clone(), values.clone()
    store.put_layer(0, counts, columns, keys, values)
    for given in (counts, columns, keys, values):
        given.fill_(1)
    assert store.n_entries == 5 and store.counts(0).tolist() == [[3, 2]]
    assert store.columns(0, 0, 0).tolist() == [0, 1, 2] and store.columns(0, 0, 1).tolist() == [0, 1]
    found = store.take_layer(0, torch.tensor([[3, 2]]), torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_head_alone_and_a_layer_at_once_are_the_same(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[5, 0], [3, 7]])
    store.put_layer(2, counts, columns, keys, values)
    assert store.counts(2).tolist() == counts.tolist() and store.n_entries == 15
    some = torch.tensor([6, 0, 3])
    for name in ("peek", "take"):
        found = getattr(store, name)(2, 1, 1, some)
        assert torch.equal(found[0], keys[8 + some]) and torch.equal(found[1], values[8 + some])
    store.put(2, 1, 1, torch.tensor([3, 20]), keys[:2], values[:2])
    assert store.columns(2, 1, 1).tolist() == [1, 2, 4, 5, 3, 20]  # in the order in which they were put
    assert (
        store.columns(2, 0, 1).tolist()
        == store.columns(9, 0, 0).tolist()
        == store.columns(2, 5, 5).tolist()
        == []
    )
    assert store.columns(2, 1, 1).dtype == torch.int64


def test_refusals_change_nothing(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[5, 2]])
    store.put_layer(0, counts, columns, keys, values)
    one = torch.ones(1, 8)
    cases: list[tuple[str, Any]] = [
        (
            "layer 0, row 0, kv head 1 .* has column 1 already",
            lambda: store.put(0, 0, 1, torch.tensor([1]), one, one),
        ),
        ("repeat within a kv head", lambda: store.put(0, 0, 1, torch.tensor([9, 9]), keys[:2], keys[:2])),
        ("has no column 7", lambda: store.take(0, 0, 0, torch.tensor([1, 7]))),
        ("has no column 2", lambda: store.peek(0, 0, 1, torch.tensor([2]))),
        ("row 3, kv head 0 .* has no column 0", lambda: store.take(0, 3, 0, torch.tensor([0]))),
        ("layer 4, row 0, kv head 0 .* has no column 0", lambda: store.peek(4, 0, 0, torch.tensor([0]))),
        ("each is there once", lambda: store.take(0, 0, 0, torch.tensor([1, 1]))),
        ("head size 4", lambda: store.put(1, 0, 0, torch.tensor([0]), one[:, :4], one[:, :4])),
        ("float16", lambda: store.put(1, 0, 0, torch.tensor([0]), one.half(), one.half())),
        ("must both be", lambda: store.put(1, 0, 0, torch.tensor([0]), one, keys[:2])),
        ("must both be", lambda: store.put(1, 0, 0, torch.tensor([0]), one, one.half())),
        (
            "add up to 2, but there are 1",
            lambda: store.take_layer(0, torch.tensor([[1, 1]]), torch.tensor([0])),
        ),
        ("must lie between 0 and 2147483646, got -1", lambda: store.take(0, 0, 0, torch.tensor([-1]))),
        ("got 4294967296", lambda: store.put(0, 0, 0, torch.tensor([2**32]), one, one)),
        ("may not be negative", lambda: store.take_layer(0, torch.tensor([[2, -1]]), torch.tensor([0]))),
        ("both of integers", lambda: store.take(0, 0, 0, torch.tensor([1.0]))),
        ("must not be negative", lambda: store.take(0, -1, 0, torch.tensor([1]))),
        ("can't be repeated 0 times", lambda: store.repeat(0)),
        ("row numbers >= 0", lambda: store.reorder(torch.tensor([0, -1]))),
    ]
    for match, call in cases:
        with pytest.raises(ConfigError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert store.n_entries == 7
    assert torch.equal(store.take_layer(0, counts, columns)[0], keys)


def test_rows_share_entries_and_part(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[3], [2]])
    store.put_layer(0, counts, columns, keys, values)
    store.reorder(torch.tensor([1, 1, 0, 4]))  # row 4 never put anything
    assert store.counts(0).tolist() == [[2], [2], [3], [0]]
    assert torch.equal(store.take(0, 1, 0, torch.tensor([1]))[0], keys[4:5])
    assert torch.equal(store.peek(0, 0, 0, torch.tensor([1]))[0], keys[4:5])
    store.put(0, 1, 0, torch.tensor([1]), keys[:1], values[:1])  # row 1 goes its own way
    assert torch.equal(store.peek(0, 1, 0, torch.tensor([0, 1]))[0], keys[[3, 0]])
    assert torch.equal(store.peek(0, 0, 0, torch.tensor([0, 1]))[0], keys[[3, 4]])
    store.repeat(2)
    assert store.counts(0).flatten().tolist() == [2, 2, 2, 2, 3, 3, 0, 0]
    store.reorder(torch.tensor([True, False, False, False, False, True, False, False]))
    assert store.counts(0).flatten().tolist() == [2, 3]
    assert torch.equal(store.peek(0, 1, 0, torch.arange(3))[1], values[:3])


def test_crop_forgets_the_newest_columns_of_all_layers(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[5, 2]])
    store.put_layer(0, counts, columns, keys, values)
    store.put_layer(3, counts, columns + 3, keys, values)
    store.crop(4)
    assert store.counts(0).tolist() == [[4, 2]] and store.counts(3).tolist() == [[1, 1]]
    store.put(0, 0, 0, torch.tensor([4]), keys[:1], values[:1])  # the column is free again
    assert torch.equal(store.peek(0, 0, 0, torch.tensor([4]))[0], keys[:1])


def test_a_snapshot_outlives_takes_and_reclaiming(store: PassiveStore) -> None:
    counts, columns, keys, values = ragged([[4000, 3000]])
    store.put_layer(0, counts, columns, keys, values)
    early = store.snapshot()
    store.take_layer(0, counts, columns)
    for start in range(0, 20_000, 4000):  # enough for the dead to be looked for, again and again
        store.put(0, 0, 0, torch.arange(start, start + 4000), keys[:4000], keys[:4000])
        store.take(0, 0, 0, torch.arange(start, start + 4000))
    for _ in range(2):
        store.restore(early)
        found = store.take_layer(0, counts, columns)
        assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    with pytest.raises(ConfigError, match="not taken from this passive store"):
        MemoryStore().restore(early)


def test_room_of_entries_that_left_is_given_back(store: PassiveStore) -> None:
    row = 2 * 8 * 4
    counts, columns, keys, values = ragged([[40_000]])
    kept = store.snapshot()
    store.put_layer(0, counts, columns, keys, values)
    index = store.memory_bytes if isinstance(store, DiskStore) else store.memory_bytes - 40_000 * row
    assert index < 40_000 * row * 0.35
    store.take(0, 0, 0, torch.arange(40_000)[torch.arange(40_000) % 20 != 0])  # 2,000 stay, all over
    store.flush()
    assert store.nbytes - index < 20_000 * row
    for start in range(40_000, 80_000, 500):  # a long chat: what comes leaves again
        store.put(0, 0, 0, torch.arange(start, start + 500), keys[:500], values[:500])
        store.take(0, 0, 0, torch.arange(start, start + 500))
    store.flush()
    assert store.nbytes < 1.3 * (index + 8000 * row)
    some = torch.arange(0, 40_000, 20)
    assert torch.equal(store.peek(0, 0, 0, some)[1], values[some])
    held = store.snapshot()
    store.take(0, 0, 0, some)
    store.flush()
    del held, kept
    gc.collect()
    store.flush()
    assert store.n_entries == 0


def test_reads_of_any_shape_across_chunks(monkeypatch: Any, tmp_path: Path) -> None:
    from sparsekv.cache import disk, memory

    monkeypatch.setattr(memory, "_CHUNK_ROWS", 64)
    monkeypatch.setattr(disk, "_SMALLEST_FILE", 1)
    torch.manual_seed(1)
    for store in (MemoryStore(4), DiskStore(tmp_path / "p", page_size=4, file_bytes=1)):
        counts, columns, keys, values = ragged([[301, 200, 299]])
        store.put_layer(0, counts, columns, keys, values)
        order = torch.randperm(301)
        pages = (torch.randperm(75)[:, None] * 4 + torch.arange(4)).flatten()
        halves = torch.cat([torch.arange(150, 301), torch.arange(150)])
        for wanted in (order, pages, halves, torch.arange(7, 250), torch.tensor([3])):
            found = store.peek(0, 0, 0, wanted)
            assert torch.equal(found[0], keys[wanted]) and torch.equal(found[1], values[wanted])
        store.close()


def test_sizes_closing_and_copies(store: PassiveStore, tmp_path: Path) -> None:
    counts, columns, keys, values = ragged([[64, 64]])
    store.put_layer(0, counts, columns, keys, values)
    assert store.nbytes == store.memory_bytes + store.disk_bytes
    assert (store.disk_bytes > 2 * keys.nbytes) == isinstance(store, DiskStore)
    if isinstance(store, MemoryStore):
        assert 2 * keys.nbytes < store.memory_bytes < 2 * keys.nbytes * 1.5
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match="can't be pickled or copied"):
            copied(store)
    with store as same:
        assert same is store
    store.close()
    for call in (
        store.flush,
        store.snapshot,
        lambda: store.counts(0),
        lambda: store.crop(0),
        store.__enter__,
    ):
        with pytest.raises(ConfigError, match="the passive store is closed"):
            call()
    with pytest.raises(ConfigError, match="page_size 0"):
        MemoryStore(0)
