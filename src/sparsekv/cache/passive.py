"""The second tier of a KV cache: entries that left the fast cache and may come back.

Shape letters: B rows, H kv heads, N entries, D head size, P pages, G query heads per kv head.

`PassiveStore` is the interface and all of the bookkeeping; where bytes lie is an `EntryLog`: `memory.MemoryStore` keeps
them in CPU memory, `disk.DiskStore` in files. An entry is named by (layer, row, kv head, column), where a column is an
index of the padded input, as everywhere in this library. This module decides nothing: which entries leave and which
come back is the tiered cache's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekv.cache.entry_request import NONE, EntryRequest, Ints
from sparsekv.cache.holdings import Holdings
from sparsekv.cache.pages import PAGE_SIZE, LayerBounds, LayerIndex
from sparsekv.cache.places import Places
from sparsekv.errors import ConfigError


class PageEntries(NamedTuple):
    """Entries of some pages of a layer, row-major over (row, kv head), page by page.

    counts LongTensor [B, H], columns LongTensor [N], keys and values [N, D].
    """

    counts: Tensor
    columns: Tensor
    keys: Tensor
    values: Tensor


class PassiveStore(Holdings):
    """Keys and values by (layer, row, kv head, column), page summaries of the keys, and room that is given back.

    Every request exists for a whole layer (`put_layer`, `take_layer`, `peek_layer`, `bounds_layer`: one call for all
    rows and kv heads, with ragged counts; the fast way) and for one kv head (`put`, `take`, `peek`, `bounds`). Whole
    pages are asked for fastest (`take_pages`, `peek_pages`). An entry is in the store once. Keys and values come back
    bit by bit as they were put. Not safe to use from several threads.

    Parameters
    ----------
    page_size : int >= 1
        Entries per page: entries of a (row, kv head) in the order in which they were put.

    Attributes
    ----------
    dtype, width, device
        Of the entries, known from the first put (D = `width`). What is read arrives on `device`, where the last
        entries came from.
    """

    def __init__(self, page_size: int = PAGE_SIZE) -> None:
        super().__init__(page_size)
        self.dtype: torch.dtype | None = None
        self.width: int | None = None
        self.device = torch.device("cpu")

    # ---- a whole layer at once --------------------------------------------------------------------------------------

    def put_layer(self, layer: int, counts: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Append entries of any rows and kv heads of a layer: all of them, or after an error none.

        Parameters
        ----------
        layer : int >= 0
        counts : IntTensor [B, H]
            Entries of each (row, kv head); may be 0.
        columns : IntTensor [N]
            Their columns >= 0, row-major over (row, kv head); unique within a kv head, and not in the store.
        keys, values : FloatTensor [N, D]
            In the order of `columns`.

        Raises
        ------
        ConfigError
            Shapes that don't fit, a column that is there already, another dtype or head size than before; for files,
            whatever keeps them from being written.
        """
        self._check_open()
        request = EntryRequest.of(counts, columns)
        n = len(request.columns)
        self._check_entries(n, keys, values)
        entry = self._layers.get(layer) or LayerIndex(Places(self.page_size))
        if entry.n_entries or not request.ascending:
            entry.places.fit(*request.shape)
            entry.places.check_new(layer, request)
        if not n:
            return
        if self.dtype is None:
            self.dtype, self.width = keys.dtype, keys.shape[1]
        self.device = keys.device
        log = self._log(layer)
        self._reclaim(log)
        entry.append(request, log.append(keys.detach(), values.detach()))
        self._layers[layer] = entry

    def take_layer(self, layer: int, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Remove entries and return their keys and values [N, D], in the order asked for.

        `counts` and `columns` as in `put_layer`. Raises ConfigError, and removes nothing, if an entry isn't there or
        can't be read.
        """
        self._check_open()
        request = EntryRequest.of(counts, columns)
        if not len(request.columns):
            return self._nothing()
        places = self._places(layer)
        flat, slots = places.find(layer, request)
        found = self._log(layer).read(slots)
        places.remove(layer, request, flat)
        self._reclaim(self._log(layer), taking=True)
        return self._arrived(found)

    def drop_layer(self, layer: int, counts: Tensor, columns: Tensor) -> None:
        """Remove entries without reading them, as one who has them already.

        `counts` and `columns` as in `put_layer`. Raises ConfigError, and removes nothing, if an entry isn't there.
        """
        self._check_open()
        request = EntryRequest.of(counts, columns)
        if len(request.columns):
            places = self._places(layer)
            places.remove(layer, request, places.find(layer, request)[0])
            self._reclaim(self._log(layer), taking=True)

    def peek_layer(self, layer: int, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Read entries, which stay: keys and values [N, D] in the order asked for, copies."""
        self._check_open()
        request = EntryRequest.of(counts, columns)
        if not len(request.columns):
            return self._nothing()
        _, slots = self._places(layer).find(layer, request)
        return self._arrived(self._log(layer).read(slots))

    def take_pages(self, layer: int, chosen: Tensor) -> PageEntries:
        """Remove all entries of the chosen pages, and return them.

        Parameters
        ----------
        chosen : BoolTensor [B, H, P]
            Pages as `bounds_layer` counts them; choosing an empty one is allowed. Pages are counted anew when entries
            are put, so choose and take without a put in between.

        Raises
        ------
        ConfigError
            A choice of another shape, or an entry that can't be read; then nothing is removed.
        """
        return self._pages(layer, chosen, take=True)

    def peek_pages(self, layer: int, chosen: Tensor) -> PageEntries:
        """Read all entries of the chosen pages (BoolTensor [B, H, P], see `take_pages`), which stay."""
        return self._pages(layer, chosen, take=False)

    def all_pages(self, layer: int, rows: int, heads: int) -> Tensor:
        """BoolTensor [B, H, P] that chooses every page of a layer, of at least so many rows and kv heads."""
        self._check_open()
        places = self._places(layer)
        places.fit(rows, heads)
        return torch.ones(places.shape, dtype=torch.bool)

    def all_entries(self, layer: int, rows: int, heads: int) -> PageEntries:
        """Copies of everything that a layer holds, of at least so many rows and kv heads."""
        self._check_open()
        if not self._places(layer).n_entries:
            none = torch.zeros(0, dtype=torch.int64)
            return PageEntries(none.new_zeros(rows, heads), none, *self._nothing())
        return self.peek_pages(layer, self.all_pages(layer, rows, heads))

    def put_rows_of(
        self,
        layer: int,
        stores: Sequence[PassiveStore],
        rows: Sequence[int],
        heads: int,
        shifts: Sequence[int],
    ) -> None:
        """Copies of what other stores hold of a layer, of which this one holds nothing yet.

        Parameters
        ----------
        rows : of each store; they come one after the other
        heads : kv heads
        shifts : what is added to each store's columns

        Pages stay as they are, so that a row's are scored, and filled up, as in its own store.
        """
        self._check_open()
        if self._places(layer).n_entries:
            raise ConfigError(f"layer {layer} of the passive store holds entries already")
        parts = [store.all_entries(layer, n, heads) for store, n in zip(stores, rows, strict=True)]
        held = [part for part in parts if len(part.columns)]  # an empty store knows no head size
        if not held:
            return
        places = Places.stacked([store._places(layer) for store in stores], rows, heads, shifts)
        keys, values = (torch.cat([getattr(part, name) for part in held]) for name in ("keys", "values"))
        self._check_entries(places.n_entries, keys, values)
        self.dtype, self.width, self.device = keys.dtype, keys.shape[1], keys.device
        slots = self._log(layer).append(keys, values)
        places.slot[places.slot != NONE] = slots
        self._layers[layer] = LayerIndex(places)

    def _pages(self, layer: int, chosen: Tensor, *, take: bool) -> PageEntries:
        self._check_open()
        places = self._places(layer)
        if tuple(chosen.shape) != places.shape or chosen.dtype != torch.bool:
            raise ConfigError(
                f"pages of layer {layer} are chosen by booleans of shape {list(places.shape)}, not by "
                f"{chosen.dtype} of {list(chosen.shape)}"
            )
        pages, counts, columns, slots = places.of_pages(chosen.cpu().numpy())
        keys, values = self._arrived(self._log(layer).read(slots)) if len(slots) else self._nothing()
        if take:
            places.remove_pages(pages, len(slots))
            self._reclaim(self._log(layer), taking=True)
        return PageEntries(torch.from_numpy(counts), torch.from_numpy(columns), keys, values)

    def bounds_layer(self, layer: int, query: Tensor) -> LayerBounds:
        """Upper bounds of q.k for every page of a layer, as in Quest (arXiv 2406.10774, section 3.3).

        Parameters
        ----------
        query : FloatTensor [B, H, G, D]
            Queries as they meet the keys (rotated), grouped by kv head.

        Raises
        ------
        ConfigError
            Keys that aren't finite (they have no bound), or a query of another shape.
        """
        if query.ndim != 4:
            raise ConfigError(
                f"query has shape {tuple(query.shape)}; a layer's bounds need [rows, kv heads, queries, head size]"
            )
        rows, heads, n_query, width = query.shape
        found = self._summarised(layer, width, rows, heads)
        if found is None:
            scores = torch.zeros(rows, heads, n_query, 0, device=self.device)
            return LayerBounds(scores, torch.zeros(rows, heads, 0, dtype=torch.int64))
        entry, known = found
        scores, sizes = entry.pages.all_bounds(query), torch.from_numpy(known.copy())
        empty = (sizes == 0).to(scores.device)
        return LayerBounds(scores.masked_fill_(empty[:, :, None], -torch.inf), sizes)

    # ---- one (row, kv head) -----------------------------------------------------------------------------------------

    def put(self, layer: int, row: int, head: int, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Append entries of one (row, kv head): columns [n], keys and values [n, D]. See `put_layer`."""
        self.put_layer(layer, _only(row, head, columns), columns, keys, values)

    def take(self, layer: int, row: int, head: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Remove entries of one (row, kv head) and return keys, values [n, D]. See `take_layer`."""
        return self.take_layer(layer, _only(row, head, columns), columns)

    def peek(self, layer: int, row: int, head: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Read entries of one (row, kv head): keys, values [n, D]. See `peek_layer`."""
        return self.peek_layer(layer, _only(row, head, columns), columns)

    def bounds(self, layer: int, row: int, head: int, query: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Upper bounds [G, P] of q.k for queries [G, D], and the columns of each of the P pages.

        See `bounds_layer`, which does it for all rows and kv heads at once.
        """
        if query.ndim != 2:
            raise ConfigError(
                f"query has shape {tuple(query.shape)}; the bounds of a kv head need [queries, head size]"
            )
        found = self._summarised(layer, query.shape[-1], row + 1, head + 1)
        if found is None:
            return torch.zeros(len(query), 0, device=self.device), []
        entry, _ = found
        pages = entry.places.pages_of(row, head)
        scores = entry.pages.bounds(query, row, head)
        real = [number for number, page in enumerate(pages) if len(page)]
        return scores[:, real], [torch.from_numpy(pages[number]) for number in real]

    def _summarised(self, layer: int, width: int, rows: int, heads: int) -> tuple[LayerIndex, Ints] | None:
        """A layer of at least so many rows and kv heads, its page summaries up to date, and the entries of each page.

        None if it holds nothing.
        """
        self._check_open()
        entry = self._layers.get(layer)
        if entry is None or not entry.n_entries:
            return None
        if width != self.width:
            raise ConfigError(f"query has head size {width}; the keys of the passive store have {self.width}")
        log = self._log(layer)
        entry.places.fit(rows, heads)
        return entry, entry.pages.update(
            layer, entry.places, lambda slots: log.read(slots, values=False)[0], self.device
        )

    def _check_entries(self, n: int, keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 2 or keys.shape != values.shape or len(keys) != n or keys.dtype != values.dtype:
            raise ConfigError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} of a put must both be [{n}, head size] and "
                "of one dtype"
            )
        if not keys.is_floating_point():
            raise ConfigError(f"keys are {keys.dtype}; the passive store takes floating point")
        if self.dtype is not None and (keys.dtype, keys.shape[1]) != (self.dtype, self.width):
            raise ConfigError(
                f"the passive store holds {self.dtype} entries of head size {self.width}, it was given {keys.dtype} of "
                f"head size {keys.shape[1]}"
            )

    def _nothing(self) -> tuple[Tensor, Tensor]:
        none = torch.zeros(0, self.width or 0, dtype=self.dtype or torch.float32, device=self.device)
        return none, none.clone()

    def _arrived(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = found
        if self.device.type == "cpu":
            return keys, values
        return keys.to(self.device, non_blocking=True), values.to(self.device, non_blocking=True)


def _only(row: int, head: int, columns: Tensor) -> Tensor:
    """Counts [row + 1, head + 1] of a request for one (row, kv head)."""
    if row < 0 or head < 0:
        raise ConfigError(f"row {row} and kv head {head} of the passive store must not be negative")
    counts = torch.zeros(row + 1, head + 1, dtype=torch.int64)
    counts[row, head] = len(columns)
    return counts
