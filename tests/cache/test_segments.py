"""One layer's entries in one flat buffer, by hand: B = 1, H = 2, D = 1, key of column c in head h = 10 h + c."""

from __future__ import annotations

import pytest
import torch

from sparsekv.cache.rope import Rotation
from sparsekv.cache.segments import Segments
from sparsekv.errors import ConfigError


def entries(columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.tensor([[[[10.0 * head + c] for c in columns] for head in range(2)]])
    return keys, -keys


def rows(segments: Segments) -> list[list[float]]:
    return [segment.flatten().tolist() for group in segments.groups() for segment in group.keys]


def ragged() -> Segments:
    """Head 0 keeps columns 0 and 3, head 1 keeps column 2."""
    kept = torch.tensor([[[True, False, False, True], [False, False, True, False]]])
    return Segments.of(*entries([0, 1, 2, 3])).keep(kept, torch.tensor([0]), None)


def test_prefixes_may_differ_and_tails_do_not() -> None:
    segments = ragged()
    assert segments.counts == (2, 1) and segments.keys.flatten().tolist() == [0.0, 3.0, 12.0]
    segments.append(*entries([4]))
    assert rows(segments) == [[0.0, 3.0, 4.0], [12.0, 14.0]] and segments.room == 16
    assert [c.tolist() for c in segments.columns_of_segments()] == [[0, 3, 4], [2, 4]]
    assert segments.values.flatten()[:3].tolist() == [-0.0, -3.0, -4.0]
    with pytest.raises(ConfigError, match="store different numbers of entries"):
        segments.row(0)


@pytest.mark.parametrize("sizes", [(512, 512), (40, 1100), (3000, 5000)])
def test_what_is_allocated_stays_within_5_percent_of_what_is_stored(sizes: tuple[int, int]) -> None:
    """Right after the eviction and at every token after it, in bf16 and with 64 channels, columns included."""
    total = max(sizes)
    keys = torch.zeros(1, 2, total, 64, dtype=torch.bfloat16)
    kept = torch.stack([torch.arange(total) < size for size in sizes])[None]
    segments = Segments.of(keys, keys).keep(kept, None, None)
    for _ in range(150):
        stored = sum(segments.counts) + 2 * segments.tail
        assert stored * 256 <= segments.nbytes <= 1.05 * stored * 256
        segments.append(keys[:, :, :1], keys[:, :, :1])
    assert stored == sum(sizes) + 2 * 149


def test_an_append_spares_what_a_snapshot_needs() -> None:
    segments = ragged()
    segments.append(*entries([4]))
    early = segments.remember()
    segments.append(*entries([5]))
    assert segments.keys is early.keys  # spare room behind the tail: nothing is copied
    late = segments.remember()
    early.append(*entries([9]))  # column 5 lies in its way
    assert early.keys is not late.keys
    assert rows(early) == [[0.0, 3.0, 4.0, 9.0], [12.0, 14.0, 19.0]]
    assert rows(late) == rows(segments) == [[0.0, 3.0, 4.0, 5.0], [12.0, 14.0, 15.0]]


def test_rows_are_taken_in_any_number_and_order() -> None:
    segments = ragged()
    segments.append(*entries([4]))
    none = segments.take_rows(torch.tensor([], dtype=torch.int64))
    assert (none.batch, none.n_kv_heads, none.counts) == (0, 2, ())
    three = segments.take_rows(torch.tensor([0, 0, 0]))
    assert rows(three) == [[0.0, 3.0, 4.0], [12.0, 14.0]] * 3 and three.batch == 3
    assert three.guard is not segments.guard


@pytest.mark.parametrize("rotated", [False, True])
def test_a_whole_buffer_is_cut_as_any_other(rotated: bool) -> None:
    rotation = Rotation(torch.tensor([1.0, 0.1]), torch.arange(7)[None]) if rotated else None
    keys, values = torch.randn(2, 2, 3, 7, 4)  # 2 rows, 3 kv heads
    kept = torch.rand(2, 3, 7) < 0.5
    kept[1, 2] = False
    whole = Segments.of(keys[:, :, :6], values[:, :, :6])
    whole.append(keys[:, :, 6:], values[:, :, 6:])  # with spare room behind every tail
    assert whole.room > whole.tail == whole.seen
    found, other = whole.keep(kept, None, rotation), whole.keep(kept, torch.arange(2), rotation)
    assert found.counts == other.counts == tuple(kept.sum(-1).flatten().tolist())
    for name in ("keys", "values", "columns", "moved", "origin"):
        mine, theirs = getattr(found, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    assert torch.equal(found.values, values[kept])
