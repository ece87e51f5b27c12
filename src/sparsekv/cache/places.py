"""Where the passive entries of one layer lie: column -> place -> slot.

Shape letters: B rows, H kv heads, N entries of a request, T columns known, R places, D head size.

A place is an entry's rank in the order in which its (row, kv head) put entries; `page_size` neighbouring places are a
page. A slot is where the entry's key and value lie in an `EntryLog`. Several rows may point to one slot (beams), so
reordering rows moves no keys. A request names entries of many heads at once: counts [B, H] and the columns of all,
packed [N], row-major over (row, kv head). Integers only: this module knows nothing of keys, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsekv.cache.entry_request import NONE, Bools, EntryRequest, Ints
from sparsekv.errors import ConfigError

Array = TypeVar("Array", bound=npt.NDArray[Any])

_MOST_SPANS = 64
"""Most stretches of places that are looked at one by one."""


class Places:
    """The index of one layer. Places are given in order and not reused before `squeeze`.

    Attributes
    ----------
    place : int32 [B, H, T]
        Place of a column. Only right where the slot at that place is not NONE: taking an entry out leaves it as it is.
    slot, column : int32 [B, H, R]
        Slot and column at each place; slot NONE where nothing is (any more).
    fill : int64 [B, H]
        The next place that a put gets.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.place: Ints = np.full((0, 0, 0), NONE, np.int32)
        self.slot: Ints = np.full((0, 0, 0), NONE, np.int32)
        self.column: Ints = np.full((0, 0, 0), NONE, np.int32)
        self.fill: Ints = np.zeros((0, 0), np.int64)
        self.n_entries = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, pages)."""
        rows, heads, places = self.slot.shape
        return rows, heads, places // self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.place.nbytes + self.slot.nbytes + self.column.nbytes + self.fill.nbytes

    def copy(self) -> Places:
        """An independent copy."""
        twin = Places(self.page_size)
        twin.place, twin.slot, twin.column = self.place.copy(), self.slot.copy(), self.column.copy()
        twin.fill, twin.n_entries = self.fill.copy(), self.n_entries
        return twin

    @classmethod
    def stacked(
        cls, parts: Sequence[Places], rows: Sequence[int], heads: int, shifts: Sequence[int]
    ) -> Places:
        """The rows of all parts, `rows` of each, one after the other; pages, holes and all.

        A part's columns move up by its shift. Slots are numbered anew, from 0 in the order of (row, kv head, place).
        """
        twin = cls(parts[0].page_size)
        n_places = max(part.slot.shape[2] for part in parts)
        slots, columns, fills = [], [], []
        for part, n_rows, shift in zip(parts, rows, shifts, strict=True):
            part.fit(n_rows, heads)
            shape = (n_rows, heads, n_places)
            slots.append(padded(part.slot[:n_rows, :heads], shape, NONE))
            columns.append(padded(part.column[:n_rows, :heads], shape, NONE) + shift)
            fills.append(part.fill[:n_rows, :heads])
        twin.slot, twin.column, twin.fill = (np.concatenate(arrays) for arrays in (slots, columns, fills))
        held = twin.slot != NONE
        twin.n_entries = int(held.sum())
        twin.slot[held] = np.arange(twin.n_entries)
        fill, known = twin.fill, int(twin.column[held].max(initial=NONE)) + 1
        twin.place = np.full((*fill.shape, known), NONE, np.int32)
        twin._number()
        twin.fill = fill  # a page goes on where it ended, also after entries at its end have left
        return twin

    def live_slots(self) -> Ints:
        """Slots of all entries [N], in no order; twice where rows share one."""
        return self.slot[self.slot != NONE]

    def counts(self) -> Ints:
        """Entries per (row, kv head) [B, H]."""
        return np.asarray((self.slot != NONE).sum(axis=2))

    def columns_of(self, row: int, head: int) -> Ints:
        """Columns of one (row, kv head) in the order in which they were put."""
        if row >= self.slot.shape[0] or head >= self.slot.shape[1]:
            return np.zeros(0, np.int64)
        return self.column[row, head][self.slot[row, head] != NONE].astype(np.int64)

    def pages_of(self, row: int, head: int) -> list[Ints]:
        """Columns of every page of one (row, kv head), empty pages included."""
        slots = self.slot[row, head].reshape(-1, self.page_size)
        columns = self.column[row, head].reshape(-1, self.page_size).astype(np.int64)
        return [page[held] for page, held in zip(columns, slots != NONE, strict=True)]

    # ---- requests -----------------------------------------------------------------------------------------------

    def check_new(self, layer: int, request: EntryRequest) -> None:
        """Raise a ConfigError if a column stands twice in a request, or is there already. After `fit`."""
        if request.ascending and not self.n_entries:
            return
        flat = self._flat(request, request.columns, self.place.shape[2])
        if not request.ascending and _repeats(flat):
            raise ConfigError(
                f"columns of a put into layer {layer} repeat within a kv head; each may be put once"
            )
        at = self.place.reshape(-1).take(flat)
        if int(at.max(initial=NONE)) == NONE:
            return
        there = self.slot.reshape(-1).take(self._flat(request, at, self.slot.shape[2]), mode="clip") != NONE
        there &= at != NONE
        if there.any():
            which = int(there.argmax())
            segment = int(np.searchsorted(request.counts.reshape(-1).cumsum(), which, side="right"))
            row, head = divmod(segment, request.counts.shape[1])
            raise ConfigError(
                f"layer {layer}, row {row}, kv head {head} of the passive store has column "
                f"{int(request.columns[which])} already"
            )

    def insert(self, request: EntryRequest, slots: Ints) -> None:
        """Append a request's entries, once `fit`, `check_new` and `make_room` were called for it."""
        for row, head, start, end in request.segments():
            first, piece = int(self.fill[row, head]), request.columns[start:end]
            last = first + len(piece)
            self.slot[row, head, first:last] = slots[start:end]
            self.column[row, head, first:last] = piece
            self.place[row, head][piece] = np.arange(first, last, dtype=np.int32)
            self.fill[row, head] = last
        self.n_entries += len(slots)

    def find(self, layer: int, request: EntryRequest) -> tuple[Ints, Ints]:
        """(places flat over [B, H, R], slots) of a request's entries.

        Raises ConfigError if one of them isn't there.
        """
        rows, heads, known = self.place.shape
        outside = request.counts.copy()
        outside[:rows, :heads] = 0
        if outside.any() or request.top >= known:
            raise self._missing(layer, request)
        at = self.place.reshape(-1).take(self._flat(request, request.columns, known))
        flat = self._flat(request, at, self.slot.shape[2])
        slots = self.slot.reshape(-1).take(flat, mode="clip")
        if flat.size and (int(at.min()) < 0 or int(slots.min()) < 0):
            raise self._missing(layer, request)
        return flat, slots

    def remove(self, layer: int, request: EntryRequest, flat: Ints) -> None:
        """Forget what `find` found.

        Raises ConfigError if an entry was asked for twice.
        """
        if not request.ascending and _repeats(flat):
            raise ConfigError(
                f"columns of a take from layer {layer} repeat within a kv head; each is there once"
            )
        self.slot.reshape(-1)[flat] = NONE
        self.n_entries -= len(flat)

    def of_pages(self, chosen: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """(page numbers flat over [B, H, P], counts [B, H], columns [N], slots [N]) of chosen pages [B, H, P]."""
        rows, heads, pages = self.shape
        which = np.flatnonzero(chosen)
        spans = self._spans(which)
        if spans is not None:
            counts = np.zeros(rows * heads, np.int64)
            for first, last in spans:
                counts[first // self.slot.shape[2]] += last - first
            slots = np.concatenate([self.slot.reshape(-1)[a:b] for a, b in spans])
            columns: Ints = np.concatenate([self.column.reshape(-1)[a:b] for a, b in spans], dtype=np.int64)
            return which, counts.reshape(rows, heads), columns, slots
        slots = self.slot.reshape(-1, self.page_size)[which]
        columns = self.column.reshape(-1, self.page_size)[which]
        held = slots != NONE
        counts = np.bincount(which // pages, held.sum(axis=1), minlength=rows * heads).astype(np.int64)
        return which, counts.reshape(rows, heads), columns[held].astype(np.int64), slots[held]

    def _spans(self, which: Ints) -> list[tuple[int, int]] | None:
        """The places of pages [n], flat over [B, H, R], as stretches without a hole, each of one kv head.

        None if they lie so scattered that it is quicker to name them one by one.
        """
        pages, size = self.shape[2], self.page_size
        starts = np.flatnonzero(which[1:] - which[:-1] != 1) + 1
        heads = np.searchsorted(which, np.arange(1, self.fill.size) * pages)  # where the pages of each begin
        edges = sorted({0, *starts.tolist(), *heads.tolist(), len(which)})
        if not len(which) or len(edges) > _MOST_SPANS:
            return None
        ends = [at * pages * size + n for at, n in enumerate(self.fill.reshape(-1).tolist())]
        nothing_left = self.n_entries == int(self.fill.sum())
        spans = []
        for a, b in pairwise(edges):
            first, last = int(which[a]) * size, (int(which[b - 1]) + 1) * size
            if nothing_left:  # so that what was put fills its places, and nobody needs to look
                spans.append((first, max(first, min(last, ends[int(which[a]) // pages]))))
                continue
            holes = np.flatnonzero(self.slot.reshape(-1)[first:last] == NONE)
            if len(holes) and int(holes[0]) < last - first - len(holes):  # not only where the last page ends
                return None
            spans.append((first, last - len(holes)))
        return spans

    def remove_pages(self, which: Ints, n: int) -> None:
        """Forget the `n` entries of pages, numbered flat over [B, H, P]."""
        self.slot.reshape(-1, self.page_size)[which] = NONE
        self.n_entries -= n

    def _flat(self, request: EntryRequest, within: Ints, size: int) -> Ints:
        """Index into a flattened [B, H, size] of every entry of a request, given that within its kv head."""
        flat, heads = np.empty(len(within), np.int64), self.slot.shape[1]
        for row, head, start, end in request.segments():
            np.add(within[start:end], (row * heads + head) * size, out=flat[start:end])
        return flat

    def _missing(self, layer: int, request: EntryRequest) -> ConfigError:
        """The error for the first entry of a request that isn't there."""
        for row, head, start, end in request.segments():
            piece = request.columns[start:end]
            lost = ~np.isin(piece, self.columns_of(row, head))
            if lost.any():
                where = f"layer {layer}, row {row}, kv head {head}"
                return ConfigError(
                    f"{where} of the passive store has no column {int(piece[int(lost.argmax())])}"
                )
        raise IndexError("every entry of the request is there")

    # ---- room -----------------------------------------------------------------------------------------------------

    def fit(self, rows: int, heads: int, width: int = 0) -> None:
        """Know at least so many rows, kv heads and columns."""
        rows, heads = max(rows, self.slot.shape[0]), max(heads, self.slot.shape[1])
        known = self.place.shape[2]
        self.place = padded(self.place, (rows, heads, width + width // 8 if width > known else known), NONE)
        self.fill = padded(self.fill, (rows, heads), 0)
        self.slot = padded(self.slot, (rows, heads, self.slot.shape[2]), NONE)
        self.column = padded(self.column, (rows, heads, self.column.shape[2]), NONE)

    def make_room(self, counts: Ints) -> None:
        """Make places for the entries of a request, whole pages."""
        needed = int((self.fill + padded(counts, self.fill.shape, 0)).max(initial=0))
        if needed > self.slot.shape[2]:
            places = -(-(needed + needed // 16) // self.page_size) * self.page_size
            shape = (*self.fill.shape, places)
            self.slot, self.column = padded(self.slot, shape, NONE), padded(self.column, shape, NONE)

    def holes(self, counts: Ints) -> Bools:
        """[B]: rows that put entries now (counts [b, h]), and of whose given places more than half hold nothing.

        Row by row, and only where one puts, so that a row's pages are the same whatever other rows do beside it.
        """
        puts = padded(counts, self.fill.shape, 0).any(axis=1)
        return puts & self._is_sparse()

    def _is_sparse(self) -> Bools:
        given = self.fill.sum(axis=1)
        held = np.full(1, self.n_entries) if len(given) == 1 else (self.slot != NONE).sum(axis=(1, 2))
        return np.asarray(given > 2 * held + self.page_size * self.fill.shape[1])

    def squeeze(self, chosen: Bools) -> Ints | None:
        """Drop empty pages of the chosen rows [B], and where that would not do, holes in pages. Other rows stay.

        Returns old page numbers [B, H, new pages]; None if pages are not what they were.
        """
        rows, heads, pages = self.shape
        if not self.n_entries:
            self.place[chosen], self.fill[chosen] = NONE, 0
            return None
        wanted = (self.slot.reshape(rows, heads, pages, -1) != NONE).any(axis=3)
        used = np.arange(pages) < -(-self.fill // self.page_size)[..., None]
        order = self._kept_first(np.where(chosen[:, None, None], wanted, used))
        self._move(order, self.page_size, chosen)
        chosen = chosen & self._is_sparse()
        if not chosen.any():
            return order
        used = np.arange(self.slot.shape[2]) < self.fill[..., None]
        alone = self._kept_first(np.where(chosen[:, None, None], self.slot != NONE, used), self.page_size)
        self._move(alone, 1, chosen)
        return None

    def pack(self) -> None:
        """Leave no hole: all entries move to consecutive places, in their order."""
        if not self.fill.size:
            return
        self._move(self._kept_first(self.slot != NONE, self.page_size), 1, np.ones(len(self.fill), bool))

    @staticmethod
    def _kept_first(kept: Bools, multiple: int = 1) -> Ints:
        """Numbers [B, H, n] of what is kept [B, H, N], in order; n, a multiple, is enough for the fullest head."""
        most = int(kept.sum(axis=2).max(initial=0))
        return np.argsort(~kept, axis=2, kind="stable")[:, :, : -(-most // multiple) * multiple]

    def _move(self, order: Ints, size: int, chosen: Bools) -> None:
        """`_reorder_places`, places and fills set anew; rows that are not chosen go on filling where they ended."""
        fill = self.fill.copy()
        self._reorder_places(order, size)
        self._number()
        self.fill[~chosen] = fill[~chosen]

    def _reorder_places(self, order: Ints, size: int) -> None:
        """New run i of `size` places is old run order[b, h, i]."""
        for name in ("slot", "column"):
            runs = getattr(self, name).reshape(*self.slot.shape[:2], -1, size)
            picked = np.take_along_axis(runs, order[..., None], axis=2)
            setattr(self, name, np.ascontiguousarray(picked).reshape(*order.shape[:2], -1))

    def _number(self) -> None:
        """Set places and fills after entries moved."""
        self.place[:] = NONE
        row, head, at = np.nonzero(self.slot != NONE)
        self.place[row, head, self.column[row, head, at]] = at
        self.fill[:] = 0
        np.maximum.at(self.fill, (row, head), at + 1)

    # ---- rows, columns, slots ---------------------------------------------------------------------------------------

    def take_rows(self, rows: Ints) -> None:
        """New row i is old row `rows[i]`; a row that never put anything is empty."""
        self.fit(int(rows.max(initial=-1)) + 1, 0)
        self.place, self.slot, self.column = self.place[rows], self.slot[rows], self.column[rows]
        self.fill = self.fill[rows]
        self.n_entries = int((self.slot != NONE).sum())

    def crop(self, n_seen: int) -> None:
        """Forget columns >= `n_seen`."""
        self.slot[self.column >= n_seen] = NONE
        self.n_entries = int((self.slot != NONE).sum())


def remap(slots: Ints, table: Ints) -> None:
    """Replace slot s by table[s], in place, where that isn't NONE; slots that are gone may lie beyond the table."""
    held = np.flatnonzero((slots != NONE) & (slots < len(table)))
    flat = slots.reshape(-1)
    moved = table[flat[held]]
    flat[held[moved != NONE]] = moved[moved != NONE]


def padded(array: Array, shape: tuple[int, ...], value: int) -> Array:
    """The array with `value` behind it, up to `shape`; itself if it has that shape."""
    if array.shape == shape:
        return array
    wide = np.full(shape, value, array.dtype)
    wide[tuple(slice(n) for n in array.shape)] = array
    return wide  # type: ignore[return-value]


def _repeats(flat: Ints) -> bool:
    """An index stands twice."""
    seen = np.zeros(int(flat.max(initial=0)) + 1, bool)
    seen[flat] = True
    return int(np.count_nonzero(seen)) < flat.size
