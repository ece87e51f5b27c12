"""Whatever happens to a two-tier cache, every entry is in exactly one tier, bit by bit as it was computed."""

from __future__ import annotations

import tempfile
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import announced
from sparsekv.cache import recall as recalling
from sparsekv.cache.sparse import ATTENTION
from sparsekv.cache.tiered import TieredCache
from toy import tiny_config

H, G, D, LAYERS = 2, 2, 16, 2
OPERATIONS = ("append", "offload", "crop", "reorder", "repeat", "select", "remember", "restore", "fork")


class Mirror:
    """A cache, and beside it the plain lists of all that it was given: `keys`, `values` [rows, layers, H, T, D]."""

    def __init__(self, cache: TieredCache, rows: int) -> None:
        self.cache = cache
        self.keys = torch.zeros(rows, LAYERS, H, 0, D)
        self.values = self.keys.clone()
        self.remembered: tuple | None = None

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def seen(self) -> int:
        return self.keys.shape[3]

    def append(self, draw: torch.Generator) -> None:
        n = int(torch.randint(1, 7, (), generator=draw))
        new = torch.randn(2, self.rows, LAYERS, H, n, D, generator=draw)
        self.keys, self.values = (
            torch.cat([a, b], dim=3) for a, b in zip((self.keys, self.values), new, strict=True)
        )
        before = self.cache.passive_counts() if self.cache.batch else None
        for index in range(LAYERS):
            with announced(self.cache):
                self.cache.update(new[0][:, index], new[1][:, index], index)
            query = 3 * torch.randn(self.rows, H * G, n, D, generator=draw)
            layer = self.cache.layers[index]
            if layer.reader is None:
                assert before is None or not before[index].any()
                continue
            output = layer.reader.attend(layer, query, None, None)
            if self.cache.tiers.recall_tokens == 10_000:
                torch.testing.assert_close(output, self.exact(index, query), atol=2e-5, rtol=1e-4)

    def exact(self, index: int, query: torch.Tensor) -> torch.Tensor:
        keys, values = (x[:, index].repeat_interleave(G, dim=1) for x in (self.keys, self.values))
        n = query.shape[2]
        mask = torch.ones(n, self.seen, dtype=torch.bool).tril(self.seen - n)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)
        return out.transpose(1, 2)

    def offload(self, draw: torch.Generator) -> None:
        for index in range(LAYERS):
            kept = torch.rand(self.rows, H, self.seen, generator=draw) < 0.5
            self.cache.keep_in_layer(index, kept)

    def crop(self, draw: torch.Generator) -> None:
        n = int(torch.randint(0, 8, (), generator=draw))
        length = max(self.seen - n, 1)
        self.cache.crop(length)
        self.keys, self.values = self.keys[:, :, :, :length], self.values[:, :, :, :length]

    def pick(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def reorder(self, draw: torch.Generator) -> None:
        rows = torch.randint(0, self.rows, (self.rows,), generator=draw)
        self.cache.reorder_cache(rows)
        self.pick(rows)

    def repeat(self, draw: torch.Generator) -> None:
        if self.rows < 3:
            self.cache.batch_repeat_interleave(2)
            self.pick(torch.arange(self.rows).repeat_interleave(2))

    def select(self, draw: torch.Generator) -> None:
        rows = torch.randperm(self.rows, generator=draw)[: max(1, self.rows - 1)]
        self.cache.batch_select_indices(rows)
        self.pick(rows)

    def remember(self, draw: torch.Generator) -> None:
        self.remembered = self.cache.snapshot(), self.keys, self.values

    def restore(self, draw: torch.Generator) -> None:
        if self.remembered is not None:
            self.cache.restore(self.remembered[0])
            _, self.keys, self.values = self.remembered

    def fork(self, draw: torch.Generator) -> None:
        if self.rows == 1:
            whole = self.cache.selection()
            self.cache = self.cache.fork([whole, whole])
            self.pick(torch.tensor([0, 0]))
            self.remembered = None

    def check(self) -> None:
        """Each column of each (layer, row, kv head) once, with its own key and value."""
        cache = self.cache
        assert cache.seen == self.seen
        for index, layer in cache.tiered_layers():
            resident = layer.columns()
            flat = [
                (key, value)
                for group in layer.groups()
                for key, value in zip(group.keys, group.values, strict=True)
            ]
            for segment, columns in enumerate(resident):
                row, head = divmod(segment, H)
                passive = cache.tiers.store.columns(index, row, head).long()
                together = torch.cat([columns, passive]).sort().values
                assert torch.equal(together, torch.arange(self.seen)), (index, row, head, columns, passive)
                keys, values = cache.tiers.store.peek(index, row, head, passive.int())
                own = self.keys[row, index, head], self.values[row, index, head]
                assert torch.equal(columns, columns.sort().values), "policies count on position order"
                for ours, stored, waiting in zip(own, flat[segment], (keys, values), strict=True):
                    assert torch.equal(ours[columns], stored)
                    assert len(passive) == len(waiting)
                    assert not len(passive) or torch.equal(ours[passive], waiting)


def config():
    made = tiny_config("llama", num_hidden_layers=LAYERS)
    made._attn_implementation = ATTENTION
    return made


STEPS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10**6)), max_size=14)


def run(cache: TieredCache, rows: int, steps: list[tuple[str, int]]) -> None:
    mirror = Mirror(cache, rows)
    mirror.append(torch.Generator().manual_seed(rows))
    for name, seed in steps:
        getattr(mirror, name)(torch.Generator().manual_seed(seed))
        mirror.check()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 2),
    active=st.integers(1, 24),
    recall=st.sampled_from([None, 0, 3, 10_000]),
    often=st.sampled_from([1, 2]),
    steps=STEPS,
)
def test_every_entry_is_in_exactly_one_tier(rows, active, recall, often, steps):
    with patch.object(recalling, "OFTEN", often):
        run(TieredCache(config(), active, recall_tokens=recall, page_size=4), rows, steps)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(active=st.integers(1, 12), recall=st.sampled_from([None, 4, 10_000]), steps=STEPS)
def test_every_entry_is_in_exactly_one_tier_on_disk(active, recall, steps):
    with tempfile.TemporaryDirectory() as folder, patch.object(recalling, "OFTEN", 1):
        cache = TieredCache(config(), active, f"disk:{folder}/tier", recall_tokens=recall, page_size=4)
        run(cache, 1, [step for step in steps if step[0] != "fork"])
        cache.close()


@pytest.mark.parametrize("recall", [None, 5])
def test_the_active_tier_never_passes_its_size_by_more_than_one_step(recall):
    cache = TieredCache(config(), 20, recall_tokens=recall)
    mirror = Mirror(cache, 2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        before = mirror.seen
        mirror.append(draw)
        assert int(cache.stored_counts().max()) <= 20
        assert int(cache.stored_counts().min()) >= min(18, mirror.seen)
        room = 20 + (mirror.seen - before) + 1
        for _, layer in cache.tiered_layers():
            assert len(layer.store.keys) <= room * len(layer.store.counts)
    mirror.check()


def test_a_forget_that_went_wrong_is_found():
    """The negative control: an entry that is dropped instead of handed over, and one that is in both tiers."""
    for spoil in ("lost", "doubled"):
        mirror = Mirror(TieredCache(config(), 8), 1)
        draw = torch.Generator().manual_seed(1)
        for _ in range(6):
            mirror.append(draw)
        mirror.check()
        layer = mirror.cache.layers[0]
        if spoil == "lost":
            kept = torch.ones(1, 1, mirror.seen, dtype=torch.bool)
            kept[..., -1] = False
            layer.forget(kept)
        else:
            mirror.cache.tiers.store.put(
                0, 0, 0, torch.tensor([mirror.seen - 1]), torch.ones(1, D), torch.ones(1, D)
            )
        with pytest.raises(AssertionError):
            mirror.check()
