"""SparseLayer and SparseCache against plain lists: after any sequence of operations both hold exactly the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.selection import Selection
from toy import tiny_config

H, D = 2, 3
ENTRY = 4  # bytes of one fp32 number


@dataclass
class ByHand:
    """The reference: `held[row][head]` is a list of (column, key, value); nothing is ever shared."""

    held: list[list[list[tuple[int, tuple, tuple]]]]
    seen: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for row in range(keys.shape[0]):
            for head in range(H):
                for i in range(keys.shape[2]):
                    entry = (
                        self.seen + i,
                        tuple(keys[row, head, i].tolist()),
                        tuple(values[row, head, i].tolist()),
                    )
                    self.held[row][head].append(entry)
        self.seen += keys.shape[2]

    def keep(self, kept: torch.Tensor) -> None:
        self.held = [
            [
                [e for e in head if bool(kept[r, min(h, kept.shape[1] - 1), e[0]])]
                for h, head in enumerate(row)
            ]
            for r, row in enumerate(self.held)
        ]

    def take(self, rows: list[int]) -> None:
        self.held = [copy.deepcopy(self.held[i]) for i in rows]

    def crop(self, length: int) -> None:
        self.seen = min(self.seen, length)
        self.held = [[[e for e in head if e[0] < length] for head in row] for row in self.held]


def check(layer: SparseLayer, hand: ByHand) -> None:
    """Columns, keys, values, counts and sizes agree."""
    flat = [head for row in hand.held for head in row]
    assert layer.get_seq_length() == hand.seen
    assert [c.tolist() for c in layer.columns()] == [[e[0] for e in head] for head in flat]
    assert layer.stored().tolist() == [[len(head) for head in row] for row in hand.held]
    groups = list(layer.groups())
    assert [g.start for g in groups] + [len(flat)] == [0] + [g.stop for g in groups]
    for group in groups:
        for i in range(group.start, group.stop):
            assert [tuple(k) for k in group.keys[i - group.start].tolist()] == [e[1] for e in flat[i]]
            assert [tuple(v) for v in group.values[i - group.start].tolist()] == [e[2] for e in flat[i]]
    for row, heads in enumerate(hand.held):
        if len({len(head) for head in heads}) == 1:
            keys, values = layer.row(row)
            assert [[tuple(k) for k in head] for head in keys.tolist()] == [[e[1] for e in h] for h in heads]
            assert [[tuple(v) for v in head] for head in values.tolist()] == [
                [e[2] for e in h] for h in heads
            ]
    sizes = {len(head) for head in flat}
    assert layer.is_uniform == (len(sizes) == 1)
    width, offset = layer.get_mask_sizes(torch.zeros(2))
    assert (width, offset) == (max(sizes) + 2, hand.seen - max(sizes))
    store = layer.store
    slots = sum(store.counts) + len(store.counts) * store.room
    assert store.keys.untyped_storage().nbytes() == slots * D * ENTRY, "the buffer has no hidden rest"
    assert store.values.untyped_storage().nbytes() == slots * D * ENTRY
    assert layer.nbytes == 2 * slots * D * ENTRY + 4 * sum(store.counts) + 8 * len(store.counts)
    assert 0 <= store.tail <= store.room


def tight(layer: SparseLayer) -> None:
    """Right after a compaction nothing but the kept entries is allocated."""
    n = int(layer.stored().sum())
    assert layer.store.keys.shape == (n, D) and layer.store.room == 0
    assert layer.store.keys.untyped_storage().nbytes() == n * D * ENTRY


def fresh(rows: int, n_tokens: int, generator: torch.Generator) -> tuple[SparseLayer, ByHand]:
    layer, hand = SparseLayer(), ByHand([[[] for _ in range(H)] for _ in range(rows)])
    keys, values = torch.rand(2, rows, H, n_tokens, D, generator=generator)
    layer.update(keys, values)
    hand.append(keys, values)
    return layer, hand


OPERATIONS = st.lists(
    st.sampled_from(["one", "few", "many", "keep", "shared", "take", "crop", "snapshot", "restore"]),
    max_size=14,
)
# In one buffer only: snapshots, and appends over what other snapshots need.
TIME_TRAVEL = st.lists(st.sampled_from(["one", "back", "snapshot", "restore"]), min_size=5, max_size=14)


@settings(max_examples=120, deadline=None)
@given(operations=OPERATIONS | TIME_TRAVEL, seed=st.integers(0, 10_000), rows=st.integers(1, 3))
def test_any_sequence_of_operations_agrees_with_lists(operations, seed, rows):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    layer, hand = fresh(rows, draw(1, 9), generator)
    saved = []
    for operation in operations:
        n_rows = len(hand.held)
        if operation in ("one", "few", "many"):
            n_new = {"one": 1, "few": draw(2, 5), "many": draw(65, 70)}[operation]
            keys, values = torch.rand(2, n_rows, H, n_new, D, generator=generator)
            layer.update(keys, values)
            hand.append(keys, values)
        elif operation in ("keep", "shared"):
            heads = H if operation == "keep" else 1
            kept = torch.rand(n_rows, heads, hand.seen, generator=generator) < 0.6
            layer.keep(kept)
            hand.keep(kept)
            tight(layer)
        elif operation == "take":
            chosen = [draw(0, n_rows - 1) for _ in range(draw(1, 4))]
            layer.take_rows(torch.tensor(chosen))
            hand.take(chosen)
        elif operation in ("crop", "back"):
            length = draw(0, hand.seen + 1) if operation == "crop" else max(0, hand.seen - draw(1, 2))
            layer.crop(length if length % 2 or length >= hand.seen else length - hand.seen)
            hand.crop(length)
        elif operation == "snapshot":
            saved.append((layer.snapshot(), copy.deepcopy(hand)))
        elif saved:
            state, then = saved[draw(0, len(saved) - 1)]
            layer.restore(state)
            hand = copy.deepcopy(then)
        check(layer, hand)
    for state, then in saved:
        layer.restore(state)
        check(layer, then)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.integers(1, 4), again=st.booleans())
def test_forks_are_compacted_copies_that_share_nothing(seed, copies, again):
    generator = torch.Generator().manual_seed(seed)
    layer, hand = fresh(1, 9, generator)
    if again:
        first = torch.rand(1, H, 9, generator=generator) < 0.7
        layer.keep(first)
        hand.keep(first)
        keys, values = torch.rand(2, 1, H, 2, D, generator=generator)
        layer.update(keys, values)
        hand.append(keys, values)
    kept = torch.rand(copies, H, hand.seen, generator=generator) < 0.5
    twin = layer.fork(kept)
    expected = ByHand([copy.deepcopy(hand.held[0]) for _ in range(copies)], hand.seen)
    expected.keep(kept)
    tight(twin)
    check(twin, expected)
    keys, values = torch.rand(2, copies, H, 3, D, generator=generator)
    twin.update(keys, values)
    expected.append(keys, values)
    check(twin, expected)
    check(layer, hand)


@pytest.mark.parametrize(("prefix", "copies"), [(12, 9), (640, 7), (4000, 3)])
def test_single_tokens_copy_the_prefix_once_in_a_while(prefix, copies):
    """Once for every 32nd of what is stored, 16 to 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    layer, _ = fresh(2, 2 * prefix, generator)
    layer.keep(torch.rand(2, H, 2 * prefix, generator=generator) < 0.5)
    buffers = []
    for _ in range(129):
        keys, values = torch.rand(2, 2, H, 1, D, generator=generator)
        layer.update(keys, values)
        if not any(layer.store.keys is buffer for buffer in buffers):
            buffers.append(layer.store.keys)
    assert copies - 2 <= len(buffers) <= copies + 2
    assert layer.tail == 129


def test_what_a_layer_refuses():
    layer, _ = fresh(2, 5, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="fork needs a cache of one row"):
        layer.fork(torch.ones(1, 1, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match="for 1 rows and 5 columns; the cache has 2 rows"):
        layer.keep(torch.ones(1, 1, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match="for 2 rows and 4 columns"):
        layer.keep(torch.ones(2, 1, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="can't be assigned"):
        layer.keys = torch.zeros(1)
    ragged = torch.ones(2, H, 5, dtype=torch.bool)
    ragged[0, 0, 0] = False
    layer.keep(ragged)
    assert layer.keys is None
    with pytest.raises(ConfigError, match="kv heads of this row"):
        layer.row(0)
    assert layer.row(1)[0].shape == (H, 5, D)
    with pytest.raises(ConfigError, match="is empty"):
        SparseLayer().columns()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), family=st.sampled_from(["llama", "gemma3"]))
def test_the_cache_keeps_what_the_selection_keeps(seed, family):
    """A whole SparseCache: counts, columns, bytes, and the Selection that it gives back."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config(family, attn_implementation="sparsekv", head_dim=D)
    config._attn_implementation = "sparsekv"
    cache = SparseCache(config)
    for index in range(3):
        cache.update(*torch.rand(2, 2, H, 30, D, generator=generator), index)
    assert cache.nbytes >= cache.full_nbytes and cache.achieved_compression == [0.0, 0.0]
    kept = torch.rand(2, 3, H, 30, generator=generator) < 0.5
    cache.apply(Selection.from_kept(kept))
    assert torch.equal(cache.kept_columns()[:, cache.compressible], kept[:, cache.compressible])
    assert torch.equal(cache.selection().evicted_at[:, cache.compressible] > 30, kept[:, cache.compressible])
    stored = kept[:, cache.compressible].sum(dim=-1)
    assert torch.equal(cache.stored_counts(), stored.transpose(0, 1))
    expected = 1 - stored.double().mean(dim=(1, 2)) / 30
    assert cache.achieved_compression == pytest.approx(expected.tolist())
    window = 2 * 2 * H * 23 * D * ENTRY if family == "gemma3" else 0
    per_entry, per_segment = 2 * D * ENTRY + 4, 8
    assert cache.nbytes == window + int(stored.sum()) * per_entry + stored.numel() * per_segment
