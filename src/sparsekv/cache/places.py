"""Where the passive entries of one layer lie: column -> place -> slot.

Shape letters: B rows, H kv heads, N entries of a request, T columns known, R places, D head size.

A place is an entry's rank in the order in which its (row, kv head) put entries; `page_size` neighbouring places are a
page. A slot is where the entry's key and value lie in an `EntryLog`. Several rows may point to one slot (beams), so
reordering rows moves no keys. A request names entries of many heads at once: counts [B, H] and the columns of all,
packed [N], row-major over (row, kv head). Integers only: this module knows nothing of keys, files or models.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsekv.errors import ConfigError

Ints: TypeAlias = npt.NDArray[np.integer]

NONE = -1
"""No place, no slot, no column."""


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

    def check_new(self, layer: int, counts: Ints, columns: Ints) -> None:
        """Raise a ConfigError if a column stands twice in a request, or is there already."""
        owner = self._owner(counts)
        if _repeats(owner, columns):
            raise ConfigError(
                f"columns of a put into layer {layer} repeat within a kv head; each may be put once"
            )
        known = columns < self.place.shape[2]
        flat, owner = (owner * self.place.shape[2] + columns)[known], owner[known]
        at = self.place.reshape(-1).take(flat)
        there = at >= 0
        there[there] = self.slot.reshape(-1).take(owner[there] * self.slot.shape[2] + at[there]) != NONE
        if there.any():
            which = int(np.flatnonzero(known)[int(there.argmax())])
            raise ConfigError(f"{self._name(layer, counts, which)} has column {int(columns[which])} already")

    def insert(self, counts: Ints, columns: Ints, slots: Ints) -> None:
        """Append a request's entries, once `fit`, `check_new` and `make_room` were called for it."""
        start = 0
        for row, head in np.argwhere(counts > 0).tolist():
            n, first = int(counts[row, head]), int(self.fill[row, head])
            piece = columns[start : start + n]
            self.slot[row, head, first : first + n] = slots[start : start + n]
            self.column[row, head, first : first + n] = piece
            self.place[row, head][piece] = np.arange(first, first + n, dtype=np.int32)
            self.fill[row, head] = first + n
            start += n
        self.n_entries += start

    def find(self, layer: int, counts: Ints, columns: Ints) -> tuple[Ints, Ints]:
        """(places flat over [B, H, R], slots) of a request's entries.

        Raises ConfigError if one of them isn't there.
        """
        rows, heads, known = self.place.shape
        outside = counts.copy()
        outside[:rows, :heads] = 0
        if outside.any() or int(columns.max(initial=-1)) >= known:
            raise self._missing(layer, counts, columns)
        owner = self._owner(counts)
        at = self.place.reshape(-1).take(owner * known + columns)
        flat = owner * self.slot.shape[2] + at
        slots = self.slot.reshape(-1).take(flat, mode="clip")
        if flat.size and (int(at.min()) < 0 or int(slots.min()) < 0):
            raise self._missing(layer, counts, columns)
        return flat, slots

    def remove(self, layer: int, counts: Ints, columns: Ints, flat: Ints) -> None:
        """Forget what `find` found.

        Raises ConfigError if a column was asked for twice.
        """
        if _repeats(self._owner(counts), columns):
            raise ConfigError(
                f"columns of a take from layer {layer} repeat within a kv head; each is there once"
            )
        self.slot.reshape(-1)[flat] = NONE
        self.n_entries -= len(flat)

    def _owner(self, counts: Ints) -> Ints:
        """Number of the (row, kv head) of every entry of a request [N]."""
        ids = np.arange(counts.shape[0])[:, None] * self.slot.shape[1] + np.arange(counts.shape[1])
        return np.repeat(ids.reshape(-1), counts.reshape(-1))

    def _missing(self, layer: int, counts: Ints, columns: Ints) -> ConfigError:
        """The error for the first entry of a request that isn't there."""
        ends = counts.reshape(-1).cumsum()
        for segment in np.flatnonzero(counts.reshape(-1)).tolist():
            row, head = divmod(segment, counts.shape[1])
            piece = columns[ends[segment] - counts[row, head] : ends[segment]]
            lost = ~np.isin(piece, self.columns_of(row, head))
            if lost.any():
                where = f"layer {layer}, row {row}, kv head {head}"
                return ConfigError(
                    f"{where} of the passive store has no column {int(piece[int(lost.argmax())])}"
                )
        raise IndexError("every entry of the request is there")

    def _name(self, layer: int, counts: Ints, entry: int) -> str:
        segment = int(np.searchsorted(counts.reshape(-1).cumsum(), entry, side="right"))
        row, head = divmod(segment, counts.shape[1])
        return f"layer {layer}, row {row}, kv head {head} of the passive store"

    # ---- room -----------------------------------------------------------------------------------------------------

    def fit(self, rows: int, heads: int, columns: Ints) -> None:
        """Know at least these rows, kv heads and columns."""
        rows, heads = max(rows, self.slot.shape[0]), max(heads, self.slot.shape[1])
        known, width = self.place.shape[2], int(columns.max(initial=-1)) + 1
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

    @property
    def has_holes(self) -> bool:
        """More than half of the places given hold nothing."""
        return int(self.fill.sum()) > 2 * self.n_entries + self.page_size * self.fill.size

    def squeeze(self) -> Ints | None:
        """Drop empty pages: old page numbers [B, H, new pages]; None if whole pages would not do and all changed."""
        rows, heads, pages = self.shape
        full = (self.slot.reshape(rows, heads, pages, -1) != NONE).any(axis=3)
        order = np.argsort(~full, axis=2, kind="stable")
        kept = int(full.sum(axis=2).max(initial=0))
        order = order[:, :, :kept]
        self._reorder_places(order, self.page_size)
        self._number()
        if not self.has_holes:
            return order
        alone = np.argsort(self.slot == NONE, axis=2, kind="stable")
        most = int((self.slot != NONE).sum(axis=2).max(initial=0))
        self._reorder_places(alone[:, :, : -(-most // self.page_size) * self.page_size], 1)
        self._number()
        return None

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
        self.fit(int(rows.max(initial=-1)) + 1, 0, rows[:0])
        self.place, self.slot, self.column = self.place[rows], self.slot[rows], self.column[rows]
        self.fill = self.fill[rows]
        self.n_entries = int((self.slot != NONE).sum())

    def crop(self, n_seen: int) -> None:
        """Forget columns >= `n_seen`."""
        self.slot[self.column >= n_seen] = NONE
        self.n_entries = int((self.slot != NONE).sum())


def as_request(counts: Tensor, columns: Tensor) -> tuple[Ints, Ints]:
    """The integers of a request, int64; a ConfigError if they don't fit."""
    wanted, at = counts.cpu().numpy(), columns.cpu().numpy()
    if wanted.ndim != 2 or at.ndim != 1 or wanted.dtype.kind != "i" or at.dtype.kind != "i":
        raise ConfigError("a request needs counts [rows, kv heads] and columns [entries], both of integers")
    if int(wanted.min(initial=0)) < 0 or int(wanted.sum()) != len(at) or int(at.min(initial=0)) < 0:
        raise ConfigError(
            f"counts of a request add up to {int(wanted.sum())}, but there are {len(at)} columns; neither counts nor "
            "columns may be negative"
        )
    return wanted.astype(np.int64, copy=False), at.astype(np.int64, copy=False)


def remap(slots: Ints, table: Ints) -> None:
    """Replace slot s by table[s], in place, where that isn't NONE; slots that are gone may lie beyond the table."""
    held = np.flatnonzero((slots != NONE) & (slots < len(table)))
    flat = slots.reshape(-1)
    moved = table[flat[held]]
    flat[held[moved != NONE]] = moved[moved != NONE]


def padded(array: Ints, shape: tuple[int, ...], value: int) -> Ints:
    """The array with `value` behind it, up to `shape`; itself if it has that shape."""
    if array.shape == shape:
        return array
    wide = np.full(shape, value, array.dtype)
    wide[tuple(slice(n) for n in array.shape)] = array
    return wide


def _repeats(owner: Ints, columns: Ints) -> bool:
    """A column stands twice for one owner. Ascending columns, the usual case, cost one pass."""
    if columns.size < 2:
        return False
    if bool(((columns[1:] > columns[:-1]) | (owner[1:] != owner[:-1])).all()):
        return False
    return np.unique(owner * (int(columns.max()) + 1) + columns).size < columns.size
