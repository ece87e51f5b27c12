"""Page bounds: by hand, against every key, and kept up to date."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.cache import disk, disk_log, entry_log, memory
from sparsekv.cache.disk import DiskStore
from sparsekv.cache.memory import MemoryStore
from sparsekv.cache.passive import PassiveStore
from sparsekv.errors import ConfigError
from sparsekv.policies.step_rules import page_bounds


def filled(keys: torch.Tensor, page_size: int = 2) -> MemoryStore:
    """One kv head whose column c has key c."""
    store = MemoryStore(page_size)
    store.put(0, 0, 0, torch.arange(len(keys)), keys, keys)
    return store


def test_the_formula_by_hand() -> None:
    low, high = torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    # sum over d of max(q*min, q*max): 2*3 + (-1)*2 = 4; -2*-1 + 0 = 2
    assert page_bounds(torch.tensor([[2.0, -1.0], [-2.0, 0.0]]), low, high).tolist() == [[4.0], [2.0]]


def test_bounds_of_a_head_by_hand() -> None:
    store = filled(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    scores, pages = store.bounds(0, 0, 0, torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))
    # page 0 has extremes (0..1, 0..1), page 1 only the key (-1, -1)
    assert scores.tolist() == [[2.0, -2.0], [2.0, -1.0]]
    assert [page.tolist() for page in pages] == [[0, 1], [2]]


def test_a_summary_follows_what_is_taken_and_put() -> None:
    store = filled(torch.tensor([[1.0], [7.0], [2.0]]))
    query = torch.tensor([[1.0]])
    assert store.bounds(0, 0, 0, query)[0].tolist() == [[7.0, 2.0]]
    store.take(0, 0, 0, torch.tensor([1]))
    assert store.bounds(0, 0, 0, query)[0].tolist() == [[1.0, 2.0]]
    store.put(0, 0, 0, torch.tensor([9]), torch.tensor([[5.0]]), torch.tensor([[0.0]]))
    scores, pages = store.bounds(0, 0, 0, query)
    assert scores.tolist() == [[1.0, 5.0]] and [p.tolist() for p in pages] == [[0], [2, 9]]
    # One comes, one leaves: as many entries as before, but others.
    store.take(0, 0, 0, torch.tensor([9]))
    store.put(0, 0, 0, torch.tensor([10]), torch.tensor([[3.0]]), torch.tensor([[0.0]]))
    assert sorted(store.bounds(0, 0, 0, query)[0][0].tolist()) == [1.0, 2.0, 3.0]


def test_a_layer_at_once_is_every_head_alone() -> None:
    torch.manual_seed(0)
    store = MemoryStore(4)
    counts = torch.tensor([[5, 0], [1, 9]])
    columns = torch.cat([torch.arange(n) for n in counts.flatten().tolist()])
    store.put_layer(3, counts, columns, torch.randn(15, 8), torch.randn(15, 8))
    query = torch.randn(3, 2, 2, 8)  # a third row, which never put anything
    whole = store.bounds_layer(3, query)
    assert whole.scores.shape == (3, 2, 2, whole.sizes.shape[2]) and whole.sizes[2].sum() == 0
    assert whole.sizes[1, 1, :3].tolist() == [4, 4, 1]
    for row in range(3):
        for head in range(2):
            scores, pages = store.bounds(3, row, head, query[row, head])
            real = whole.sizes[row, head] > 0
            assert torch.allclose(whole.scores[row, head][:, real], scores, atol=1e-5)
            assert bool((whole.scores[row, head][:, ~real] == -torch.inf).all())
            for number, page in zip(real.nonzero().flatten().tolist(), pages, strict=True):
                chosen = torch.zeros_like(whole.sizes, dtype=torch.bool)
                chosen[row, head, number] = True
                assert store.peek_pages(3, chosen).columns.tolist() == page.tolist()


def test_pages_are_taken_whole() -> None:
    torch.manual_seed(0)
    store = MemoryStore(4)
    counts = torch.tensor([[6, 0], [3, 9]])
    columns = torch.cat([torch.arange(n) for n in counts.flatten().tolist()]) * 2
    keys, values = torch.randn(18, 8), torch.randn(18, 8)
    store.put_layer(1, counts, columns, keys, values)
    bounds = store.bounds_layer(1, torch.randn(2, 2, 1, 8))
    store.take(1, 1, 1, torch.tensor([10]))
    chosen = torch.zeros_like(bounds.sizes, dtype=torch.bool)
    chosen[0, 0, 1] = chosen[1, 1, 0] = chosen[1, 1, 1] = chosen[0, 1, 0] = True  # one of them is empty
    rows = [4, 5, 9, 10, 11, 12, 13, 15, 16]
    seen = store.peek_pages(1, chosen)
    found = store.take_pages(1, chosen)
    for one in (seen, found):
        assert one.counts.tolist() == [[2, 0], [0, 7]] and one.columns.tolist() == [
            8,
            10,
            0,
            2,
            4,
            6,
            8,
            12,
            14,
        ]
        assert torch.equal(one.keys, keys[rows]) and torch.equal(one.values, values[rows])
    assert store.columns(1, 0, 0).tolist() == [0, 2, 4, 6] and store.columns(1, 1, 1).tolist() == [16]
    assert store.n_entries == 8 and store.take_pages(1, chosen).keys.shape == (0, 8)
    with pytest.raises(ConfigError, match="pages of layer 1 are chosen by booleans of shape"):
        store.take_pages(1, chosen[:1])
    with pytest.raises(ConfigError, match=r"not by torch\.int64"):
        store.take_pages(1, chosen.long())


def test_neighbouring_pages_of_several_heads_count_for_each_head() -> None:
    store, counts = MemoryStore(4), torch.tensor([[8, 8], [8, 4]])
    columns = torch.cat([torch.arange(n) for n in counts.flatten().tolist()])
    store.put_layer(0, counts, columns, torch.randn(28, 2), torch.randn(28, 2))
    found = store.peek_pages(0, store.all_pages(0, 2, 2))
    assert torch.equal(found.counts, counts) and torch.equal(found.columns, columns)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 2),
    heads=st.integers(1, 3),
    most=st.integers(1, 700),
    page_size=st.sampled_from([1, 2, 4, 16]),
    gone=st.sampled_from([0.0, 0.02, 0.5]),
    share=st.sampled_from([0.05, 0.5, 1.0]),
)
def test_chosen_pages_hold_what_each_page_holds_alone(
    seed: int, rows: int, heads: int, most: int, page_size: int, gone: float, share: float
) -> None:
    """Whole stretches of pages, scattered ones, with holes in their middle, at their end and nowhere."""
    rng = torch.Generator().manual_seed(seed)
    store = MemoryStore(page_size)
    counts = torch.randint(0, most + 1, (rows, heads), generator=rng)
    counts[-1, -1] = most
    columns = torch.cat([torch.randperm(n, generator=rng) for n in counts.flatten().tolist()])
    keys = torch.arange(len(columns), dtype=torch.float32)[:, None].expand(-1, 2)
    store.put_layer(0, counts, columns, keys, -keys)
    for row in range(rows):
        for head in range(heads):
            held = store.columns(0, row, head)
            store.take(0, row, head, held[torch.rand(len(held), generator=rng) < gone])
    every = store.all_pages(0, rows, heads)
    chosen = torch.rand(every.shape, generator=rng) < share
    found = store.peek_pages(0, chosen)
    alone = []
    for place in chosen.nonzero().tolist():
        one = torch.zeros_like(chosen)
        one[tuple(place)] = True
        alone.append(store.peek_pages(0, one))
    counted = sum((one.counts for one in alone), torch.zeros_like(found.counts))
    assert torch.equal(found.counts, counted)
    for name in ("columns", "keys", "values"):
        parts = [getattr(one, name) for one in alone] or [getattr(found, name)[:0]]
        assert torch.equal(getattr(found, name), torch.cat(parts))
    ends = found.counts.flatten().cumsum(0).tolist()
    for segment, (end, n) in enumerate(zip(ends, found.counts.flatten().tolist(), strict=True)):
        kept, _ = store.peek(0, segment // heads, segment % heads, found.columns[end - n : end])
        assert torch.equal(kept, found.keys[end - n : end])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(1, 6), st.sampled_from(["f32", "bf16", "f16"])
)
def test_no_key_of_a_page_weighs_more_than_its_bound(seed: int, n: int, page_size: int, kind: str) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    torch.manual_seed(seed)
    keys, query = torch.randn(n, 5).to(dtype), torch.randn(3, 5)
    store = filled(keys, page_size)
    gone = torch.randperm(n)[: n // 3]
    store.bounds(0, 0, 0, query)
    store.take(0, 0, 0, gone)
    scores, pages = store.bounds(0, 0, 0, query)
    assert sorted(torch.cat(pages).tolist()) == sorted(set(range(n)) - set(gone.tolist()))
    for number, page in enumerate(pages):
        held = keys[page].double()
        exact = query.double() @ held.T
        assert bool((exact <= scores[:, [number]].double() + 1e-5).all())
        # the tightest box: made from the keys that are there now, not from those that were
        box = torch.maximum(
            query.double()[:, None] * held.amin(0), query.double()[:, None] * held.amax(0)
        ).sum(-1)
        assert torch.allclose(box[:, 0], scores[:, number].double(), atol=1e-5)
        if len(page) == 1:
            assert torch.allclose(exact[:, 0], scores[:, number].double(), atol=1e-5)


def test_keys_without_a_bound_and_queries_that_do_not_fit_are_refused() -> None:
    store = filled(torch.tensor([[1.0], [float("nan")], [2.0]]))
    with pytest.raises(ConfigError, match="keys of layer 0 in the passive store are not finite"):
        store.bounds(0, 0, 0, torch.tensor([[1.0]]))
    store.take(0, 0, 0, torch.tensor([1]))
    assert store.bounds(0, 0, 0, torch.tensor([[1.0]]))[0].tolist() == [[1.0, 2.0]]
    with pytest.raises(ConfigError, match="query has head size 2"):
        store.bounds(0, 0, 0, torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="the passive store holds 1 rows and 2 kv heads"):
        store.put(0, 0, 1, torch.tensor([0]), torch.ones(1, 1), torch.ones(1, 1))
        store.bounds_layer(0, torch.zeros(1, 1, 1, 1))
    assert store.bounds(5, 0, 0, torch.zeros(1, 1))[1] == []
    assert store.bounds_layer(5, torch.zeros(2, 3, 4, 1)).scores.shape == (2, 3, 4, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_summary_that_lags_is_no_lower_than_any_key_once_slots_are_given_anew(
    where: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bounds are asked for now and then; in between entries leave, their room is reclaimed and used again."""
    monkeypatch.setattr(entry_log, "_SLACK", 0)
    monkeypatch.setattr(memory, "_SMALLEST", 4)
    monkeypatch.setattr(disk, "_SMALLEST_FILE", 1)
    monkeypatch.setattr(disk_log, "_BLOCK_SHIFT", 2)
    monkeypatch.setattr(disk_log, "BLOCK_ROWS", 4)
    monkeypatch.setattr("sparsekv.cache.disk_manifest.BLOCK_ROWS", 4)
    for run in range(12 if where == "memory" else 4):
        draw = random.Random(100 * seed + run)
        numbers = torch.Generator().manual_seed(100 * seed + run)
        store: PassiveStore = MemoryStore(4)
        if where == "disk":
            store = DiskStore(tmp_path / str(run), page_size=4, file_bytes=300)
        truth: dict[int, dict[int, torch.Tensor]] = {0: {}, 1: {}}
        column = 0
        for _ in range(60):
            head = draw.randrange(2)
            if draw.random() < 0.5:
                columns = torch.arange(column, column + draw.randrange(1, 9))
                column += len(columns)
                keys = torch.randn(len(columns), 4, generator=numbers)
                store.put(0, 0, head, columns, keys, keys)
                truth[head].update(zip(columns.tolist(), keys, strict=True))
            elif truth[head]:
                held = list(truth[head])
                leaving = draw.sample(held, draw.choice([len(held), draw.randrange(1, len(held) + 1)]))
                store.take(0, 0, head, torch.tensor(leaving))
                for each in leaving:
                    del truth[head][each]
            if draw.random() < 0.2:
                store.flush()
            if draw.random() < 0.4:
                query = torch.cat([torch.eye(4), -torch.eye(4)])
                sizes = store.bounds_layer(0, query.expand(1, 2, 8, 4)).sizes[0]
                assert sizes.sum(dim=1).tolist() == [len(truth[0]), len(truth[1])]
                for head, held_now in truth.items():
                    scores, pages = store.bounds(0, 0, head, query)
                    for page, of_page in enumerate(pages):
                        real = query @ torch.stack([held_now[c] for c in of_page.tolist()]).T
                        torch.testing.assert_close(scores[:, page], real.amax(dim=1))
        store.close()
