"""Page summaries: a bound on how much any key of a page can weigh for a query.

Shape letters: B rows, H kv heads, P pages, G query heads per kv head, D head size, R places (P x page size).

Quest (arXiv 2406.10774, section 3.3): with the elementwise minimum and maximum of a page's keys,

    q . k  <=  sum over d of max(q_d * min_d, q_d * max_d)      for every key k of the page

The sum is split by the sign of q_d, so that it is one matrix product: relu(q) . max - relu(-q) . min.
A summary remembers which slots it summarises: where a page's slots are others, it is made again. Slot numbers are given
anew once their entries are gone, so before that whoever reclaims room calls `LayerIndex.forget_changed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.entry_request import NONE, EntryRequest, Ints
from sparsekv.cache.frozen import is_frozen
from sparsekv.cache.places import Places, padded, remap
from sparsekv.errors import ConfigError
from sparsekv.policies.step_rules import box_bounds

PAGE_SIZE = 16
"""Entries per page, where nothing else is asked for."""

_AT_ONCE = 4096
"""Pages summarised in one go: bounds the keys that are copied for it."""


@dataclass(frozen=True)
class LayerBounds:
    """What is known of a layer's pages for some queries.

    Attributes
    ----------
    scores : FloatTensor [B, H, G, P], fp32
        Upper bound of q . k (not scaled); -inf where there is no page.
    sizes : LongTensor [B, H, P]
        Entries of each page; 0 where there is none.
    """

    scores: Tensor
    sizes: Tensor


class PageSummaries:
    """Minimum and maximum of the keys of each page of a layer.

    Attributes
    ----------
    of : int32 [B, H, R]
        The slots that were summarised.
    extremes : FloatTensor [B, H, P, 2 D], fp32
        Maxima, then minima. Kept in fp32, where 16-bit keys are exact and products don't round a bound down.
    sizes : int64 [B, H, P], or None
        Entries of each page, where `of` is unchanged since the last `update`.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.of: Ints = np.full((0, 0, 0), NONE, np.int32)
        self.extremes = torch.zeros(0, 0, 0, 0)
        self.sizes: Ints | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.of.nbytes + self.extremes.numel() * self.extremes.element_size()

    def copy(self) -> PageSummaries:
        """An independent copy."""
        twin = PageSummaries(self.page_size)
        twin.of, twin.extremes, twin.sizes = self.of.copy(), self.extremes.clone(), self.sizes
        return twin

    def update(
        self, layer: int, places: Places, read: Callable[[Ints], Tensor], device: torch.device
    ) -> Ints:
        """Summarise the pages whose entries are others than before; `read` gives keys [n, D] of slots [n].

        Returns the entries of each page, int64 [B, H, P]. Raises ConfigError if a key isn't finite: it would have no
        bound, and sort anywhere.
        """
        self._pad(*places.slot.shape)
        if self.sizes is not None and np.array_equal(self.of, places.slot):
            return self.sizes
        self.sizes = None
        if is_frozen(self.extremes):
            self.extremes = self.extremes.clone()
        rows, heads, pages = places.shape
        now = places.slot.reshape(-1, self.page_size)
        before = self.of.reshape(-1, self.page_size)
        sizes = (now != NONE).sum(axis=1)
        differs = (now != before).any(axis=1)
        before[differs & (sizes == 0)] = NONE
        changed = np.flatnonzero(differs & (sizes > 0))
        for start in range(0, len(changed), _AT_ONCE):
            which = changed[start : start + _AT_ONCE]
            slots = now[which]
            first = slots[np.arange(len(which)), (slots != NONE).argmax(axis=1)]
            whole = np.where(slots == NONE, first[:, None], slots)  # a hole repeats an entry: same extremes
            keys = read(whole.reshape(-1)).view(len(which), self.page_size, -1)
            extremes = torch.cat([keys.amax(dim=1), keys.amin(dim=1)], dim=-1).float()
            if not bool(extremes.isfinite().all()):
                raise ConfigError(f"keys of layer {layer} in the passive store are not finite (NaN or inf)")
            if self.extremes.shape[-1] == 0:
                self.extremes = extremes.new_zeros(rows, heads, pages, extremes.shape[-1], device=device)
            flat, there = self.extremes.view(-1, extremes.shape[-1]), self.extremes.device
            flat[torch.from_numpy(which).to(there)] = extremes.to(there)
            before[which] = slots
        self.sizes = sizes.reshape(rows, heads, pages)
        return self.sizes

    def forget_changed(self, slot: Ints) -> None:
        """Make anew, at the next `update`, the summaries of pages whose slots [B, H, R] are others by now."""
        rows, heads, room = (min(a, b) for a, b in zip(self.of.shape, slot.shape, strict=True))
        of = self.of[:rows, :heads, :room]
        paged = (rows, heads, room // self.page_size, self.page_size)
        other = (of != slot[:rows, :heads, :room]).reshape(paged).any(axis=3)
        of[np.repeat(other, self.page_size, axis=2)] = NONE
        self.sizes = None

    def bounds(self, query: Tensor, row: int, head: int) -> Tensor:
        """Bounds [G, P] of one (row, kv head) for queries [G, D], once `update` was called."""
        return box_bounds(query.to(self.extremes.device), self.extremes[row, head])

    def all_bounds(self, query: Tensor) -> Tensor:
        """Bounds [B, H, G, P] for queries [B, H, G, D], once `update` was called."""
        rows, heads = self.extremes.shape[:2]
        if query.shape[:2] != (rows, heads):
            raise ConfigError(
                f"query is for {query.shape[0]} rows and {query.shape[1]} kv heads; the passive store holds {rows} "
                f"rows and {heads} kv heads"
            )
        return box_bounds(query.to(self.extremes.device), self.extremes)

    def take_rows(self, rows: Ints) -> None:
        """New row i is old row `rows[i]`."""
        self.sizes = None
        had = max(int(rows.max(initial=-1)) + 1, self.of.shape[0])
        self._pad(had, self.of.shape[1], self.of.shape[2])
        self.of = self.of[rows]
        if self.extremes.shape[-1]:
            self.extremes = self.extremes[torch.from_numpy(rows).to(self.extremes.device)]

    def reorder(self, pages: Ints | None) -> None:
        """New page i is old page pages[b, h, i]; None: forget everything."""
        self.sizes = None
        if pages is None or self.extremes.numel() == 0:
            self.of = np.full((0, 0, 0), NONE, np.int32)
            self.extremes = torch.zeros(0, 0, 0, 0)
            return
        rows, heads, _ = pages.shape
        self._pad(rows, heads, max(self.of.shape[2], (int(pages.max(initial=-1)) + 1) * self.page_size))
        split = self.of.reshape(rows, heads, -1, self.page_size)
        self.of = np.ascontiguousarray(np.take_along_axis(split, pages[..., None], axis=2)).reshape(
            rows, heads, -1
        )
        index = torch.from_numpy(pages).to(self.extremes.device)[..., None]
        self.extremes = self.extremes.gather(2, index.expand(-1, -1, -1, self.extremes.shape[-1]))

    def _pad(self, rows: int, heads: int, room: int) -> None:
        if self.of.shape == (rows, heads, room):
            return
        self.of, self.sizes = padded(self.of, (rows, heads, room), NONE), None
        old = self.extremes
        if old.shape[-1]:
            self.extremes = old.new_zeros(rows, heads, room // self.page_size, old.shape[-1])
            self.extremes[: old.shape[0], : old.shape[1], : old.shape[2]] = old


class LayerIndex:
    """What a store knows of one layer: where its entries lie, and what their pages hold.

    A put is only noted, and given room in `places` when somebody looks there: entries leave the fast cache
    between two layers of a forward, and are looked for later.

    Attributes
    ----------
    n_entries : int
        Of all puts, entered or not. Asking does not enter one.
    """

    def __init__(self, places: Places) -> None:
        self._places, self.pages = places, PageSummaries(places.page_size)
        self._waiting: tuple[EntryRequest, Ints] | None = None

    @property
    def places(self) -> Places:
        """Where the entries lie, all puts entered."""
        if self._waiting is not None:
            request, slots = self._waiting
            self._places.fit(*request.shape)
            self._places.make_room(request.counts)
            self._waiting = None  # from here on nothing can fail
            self._places.insert(request, slots)
        return self._places

    @property
    def n_entries(self) -> int:
        return self._places.n_entries + (0 if self._waiting is None else len(self._waiting[1]))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.places.nbytes + self.pages.nbytes

    def append(self, request: EntryRequest, slots: Ints) -> None:
        """Put the entries of a request, which may be put (`Places.check_new`) and lie in `slots`."""
        places = self.places
        if places.fill.size:  # something was put before
            places.fit(*request.shape)
            holes = places.holes(request.counts)
            if holes.any():
                self.pages.reorder(places.squeeze(holes))
        self._waiting = request.copy(), slots

    def pack(self) -> None:
        """Number the pages as if the entries had all been put now, at once."""
        self.places.pack()
        self.pages.reorder(None)

    def copy(self) -> LayerIndex:
        """An independent copy."""
        twin = LayerIndex(self.places.copy())
        twin.pages = self.pages.copy()
        return twin

    def forget_changed(self) -> None:
        """Call it before slots that nothing holds any more can be given anew.

        A summary that lags behind would take another entry in an old slot for the one it knew.
        """
        if self.n_entries:
            self.pages.forget_changed(self.places.slot)
        elif self.pages.of.size:
            self.pages.reorder(None)

    def take_rows(self, rows: Ints) -> None:
        """New row i is old row `rows[i]`."""
        self.places.take_rows(rows)
        self.pages.take_rows(rows)

    def remap(self, table: Ints) -> None:
        """Entries moved: slot s is table[s] now, where that isn't NONE."""
        remap(self.places.slot, table)
        remap(self.pages.of, table)
