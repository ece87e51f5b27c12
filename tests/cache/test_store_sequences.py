"""Any sequence of requests, against a dict: nothing is lost, nothing doubled, every bit is as it was put."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsekv.cache import disk, disk_log, entry_log, memory
from sparsekv.cache.disk import DiskStore
from sparsekv.cache.memory import MemoryStore
from sparsekv.cache.passive import PassiveStore
from sparsekv.errors import ConfigError

LAYERS, HEADS, WIDTH, COLUMNS = 2, 2, 3, 120
SMALL = [
    # so small that a few dozen entries fill chunks, files and pages, and make room worth reclaiming
    mock.patch.object(entry_log, "_SLACK", 8),
    mock.patch.object(memory, "_CHUNK_ROWS", 32),
    mock.patch.object(disk, "_SMALLEST_FILE", 1),
    mock.patch.object(disk_log, "_BLOCK_SHIFT", 3),
    mock.patch.object(disk_log, "BLOCK_ROWS", 8),
    mock.patch("sparsekv.cache.disk_manifest.BLOCK_ROWS", 8),
]

Model = dict[tuple[int, int, int], dict[int, tuple[torch.Tensor, torch.Tensor]]]


class Sequences(RuleBasedStateMachine):
    """A store beside a dict (layer, row, head) -> column -> (key, value), in the order of puts."""

    make: Callable[[Path], PassiveStore]

    def __init__(self) -> None:
        super().__init__()
        for patch in SMALL:
            patch.start()
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.make(self.folder / "p")
        self.model: Model = {}
        self.rows = 2
        self.flushed: tuple[Model, int] = ({}, self.rows)
        self.snapshots: list[tuple[Any, Model, int]] = []
        self.random = torch.Generator().manual_seed(0)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)
        for patch in SMALL:
            patch.stop()

    def entries(self, n: int) -> torch.Tensor:
        return torch.randn(n, WIDTH, generator=self.random)

    def some(self, seed: int, layer: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
        """A random request for entries that are there: counts, columns, and (row, head, column) of each."""
        draw = torch.Generator().manual_seed(seed)
        counts, asked = torch.zeros(self.rows, HEADS, dtype=torch.int64), []
        for row in range(self.rows):
            for head in range(HEADS):
                held = list(self.model.get((layer, row, head), {}))
                n = int(torch.randint(0, len(held) + 1, (1,), generator=draw))
                order = torch.randperm(len(held), generator=draw)[:n].tolist()
                if seed % 3 == 0:
                    order = sorted(order)
                counts[row, head] = n
                asked += [(row, head, held[i]) for i in order]
        return counts, torch.tensor([column for *_, column in asked], dtype=torch.int64), asked

    def check(self, layer: int, found: Any, asked: list[tuple[int, int, int]]) -> None:
        assert len(found[0]) == len(found[1]) == len(asked)
        for i, (row, head, column) in enumerate(asked):
            key, value = self.model[layer, row, head][column]
            assert torch.equal(found[0][i], key) and torch.equal(found[1][i], value)

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 10**6), most=st.integers(1, 40))
    def put(self, layer: int, seed: int, most: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        counts, columns, owners = torch.zeros(self.rows, HEADS, dtype=torch.int64), [], []
        for row in range(self.rows):
            for head in range(HEADS):
                held = self.model.setdefault((layer, row, head), {})
                free = [c for c in torch.randperm(COLUMNS, generator=draw).tolist() if c not in held]
                n = min(int(torch.randint(0, most + 1, (1,), generator=draw)), len(free))
                counts[row, head] = n
                columns += free[:n]
                owners += [(row, head, column) for column in free[:n]]
        keys, values = self.entries(len(columns)), self.entries(len(columns))
        self.store.put_layer(layer, counts, torch.tensor(columns, dtype=torch.int32), keys, values)
        for i, (row, head, column) in enumerate(owners):
            self.model[layer, row, head][column] = (keys[i], values[i])

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 10**6))
    def take(self, layer: int, seed: int) -> None:
        counts, columns, asked = self.some(seed, layer)
        self.check(layer, self.store.take_layer(layer, counts, columns), asked)
        for row, head, column in asked:
            del self.model[layer, row, head][column]
        if asked:
            with pytest.raises(ConfigError, match="has no column"):
                self.store.take(layer, asked[0][0], asked[0][1], columns[:1])

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 10**6))
    def peek(self, layer: int, seed: int) -> None:
        counts, columns, asked = self.some(seed, layer)
        self.check(layer, self.store.peek_layer(layer, counts, columns), asked)

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 10**6), leave=st.booleans())
    def pages(self, layer: int, seed: int, leave: bool) -> None:
        sizes = self.store.bounds_layer(
            layer, self.entries(self.rows * HEADS).view(self.rows, HEADS, 1, WIDTH)
        ).sizes
        chosen = torch.rand(sizes.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        if not sizes.numel():
            return
        found = (self.store.take_pages if leave else self.store.peek_pages)(layer, chosen)
        assert found.counts.tolist() == (sizes * chosen).sum(dim=2).tolist()
        owners = [(row, head) for row in range(self.rows) for head in range(HEADS)]
        of = [
            owner for owner, n in zip(owners, found.counts.flatten().tolist(), strict=True) for _ in range(n)
        ]
        asked = [(*owner, column) for owner, column in zip(of, found.columns.tolist(), strict=True)]
        self.check(layer, (found.keys, found.values), asked)
        for row, head, column in asked if leave else ():
            del self.model[layer, row, head][column]

    @rule(n_seen=st.integers(COLUMNS // 2, COLUMNS))
    def crop(self, n_seen: int) -> None:
        self.store.crop(n_seen)
        for held in self.model.values():
            for column in [c for c in held if c >= n_seen]:
                del held[column]

    @rule(order=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def reorder(self, order: list[int]) -> None:
        old = [row % self.rows for row in order]
        self.store.reorder(torch.tensor(old))
        self.model = {
            (layer, new, head): dict(self.model.get((layer, row, head), {}))
            for new, row in enumerate(old)
            for layer in range(LAYERS)
            for head in range(HEADS)
        }
        self.rows = len(old)

    @precondition(lambda self: self.rows <= 2)
    @rule()
    def repeat(self) -> None:
        self.store.repeat(2)
        if self.store.n_entries:  # a store without entries knows of no rows
            self.model = {
                (layer, 2 * row + twice, head): dict(held)
                for (layer, row, head), held in self.model.items()
                for twice in range(2)
            }
        self.rows *= 2

    @rule()
    def snapshot(self) -> None:
        self.snapshots.append((self.store.snapshot(), copy.deepcopy(self.model), self.rows))

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 5), forget=st.booleans())
    def restore(self, which: int, forget: bool) -> None:
        at = which % len(self.snapshots)
        state, model, self.rows = self.snapshots[at]
        self.model = copy.deepcopy(model)
        self.store.restore(state)
        if forget:
            del self.snapshots[at]

    @rule()
    def flush(self) -> None:
        self.store.flush()
        self.flushed = copy.deepcopy(self.model), self.rows

    @precondition(lambda self: isinstance(self.store, DiskStore))
    @rule(commit=st.booleans())
    def reopen(self, commit: bool) -> None:
        assert isinstance(self.store, DiskStore)
        self.store.close(commit=commit)
        if not commit:
            self.model, self.rows = copy.deepcopy(self.flushed[0]), self.flushed[1]
        else:
            self.flushed = copy.deepcopy(self.model), self.rows
        self.snapshots = []
        self.store = self.make(self.folder / "p")

    @invariant()
    def as_many_entries(self) -> None:
        assert self.store.n_entries == sum(len(held) for held in self.model.values())

    # A rule, no invariant: to ask enters the last put, which must be known as well where nobody has asked.
    @rule()
    def same_entries(self) -> None:
        for (layer, row, head), held in self.model.items():
            assert self.store.columns(layer, row, head).tolist() == list(held)

    # A rule, no invariant: summaries must lag behind what moved, or one that went stale would never be seen.
    @rule()
    def pages_cover_and_bound(self) -> None:
        query = self.entries(2)
        for (layer, row, head), held in self.model.items():
            scores, pages = self.store.bounds(layer, row, head, query)
            assert [c for page in pages for c in page.tolist()] == list(held)
            for number, page in enumerate(pages):
                keys = torch.stack([held[c][0] for c in page.tolist()])
                box = torch.maximum(query[:, None] * keys.amin(0), query[:, None] * keys.amax(0)).sum(-1)
                assert torch.allclose(scores[:, number], box[:, 0], atol=1e-5)


class InMemory(Sequences):
    make = staticmethod(lambda folder: MemoryStore(4))


class OnDisk(Sequences):
    make = staticmethod(lambda folder: DiskStore(folder, {"layers": LAYERS}, page_size=4, file_bytes=5000))


InMemory.TestCase.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
OnDisk.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
TestSequencesInMemory = InMemory.TestCase
TestSequencesOnDisk = OnDisk.TestCase
