"""The second tier of a KV cache: entries that left the fast cache and may come back.

Shape letters: B rows, H kv heads, N entries, D head size, P pages, G query heads per kv head.

`PassiveStore` is the interface and all of the bookkeeping; where bytes lie is an `EntryLog`: `memory.MemoryStore` keeps
them in CPU memory, `disk.DiskStore` in files. An entry is named by (layer, row, kv head, column), where a column is an
index of the padded input, as everywhere in this library. This module decides nothing: which entries leave and which
come back is the tiered cache's business.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.entry_log import EntryLog
from sparsekv.cache.pages import LayerBounds, LayerIndex
from sparsekv.cache.places import Ints, Places, as_request
from sparsekv.errors import ConfigError

Store = TypeVar("Store", bound="PassiveStore")


class Snapshot:
    """What a store held at one moment; see `PassiveStore.snapshot`."""

    def __init__(self, layers: dict[int, LayerIndex]) -> None:
        self.layers = layers


class PassiveStore(ABC):
    """Keys and values by (layer, row, kv head, column), page summaries of the keys, and room that is given back.

    Every request exists for a whole layer (`put_layer`, `take_layer`, `peek_layer`, `bounds_layer`: one call for all
    rows and kv heads, with ragged counts; the fast way) and for one kv head (`put`, `take`, `peek`, `bounds`). An entry
    is in the store once. Keys and values come back bit by bit as they were put. Not safe to use from several threads.

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

    def __init__(self, page_size: int = 16) -> None:
        if not 1 <= page_size <= 1024:
            raise ConfigError(f"page_size {page_size} is not between 1 and 1024 entries")
        self.page_size = page_size
        self.dtype: torch.dtype | None = None
        self.width: int | None = None
        self.device = torch.device("cpu")
        self._layers: dict[int, LayerIndex] = {}
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._closed = False

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
        wanted, at = as_request(counts, columns)
        self._check_entries(len(at), keys, values)
        entry = self._layers.get(layer) or LayerIndex(self.page_size)
        entry.places.fit(wanted.shape[0], wanted.shape[1], at)
        entry.places.check_new(layer, wanted, at)
        if not len(at):
            return
        if self.dtype is None:
            self.dtype, self.width = keys.dtype, keys.shape[1]
        self.device = keys.device
        log = self._log(layer)
        self._reclaim(log)
        slots = log.append(keys.detach(), values.detach())
        entry.squeeze()
        entry.places.make_room(wanted)
        entry.places.insert(wanted, at, slots)
        self._layers[layer] = entry

    def take_layer(self, layer: int, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Remove entries and return their keys and values [N, D], in the order asked for.

        `counts` and `columns` as in `put_layer`. Raises ConfigError, and removes nothing, if an entry isn't there or
        can't be read.
        """
        self._check_open()
        wanted, at = as_request(counts, columns)
        if not len(at):
            return self._nothing()
        places = self._places(layer)
        flat, slots = places.find(layer, wanted, at)
        found = self._log(layer).read(slots)
        places.remove(layer, wanted, at, flat)
        self._reclaim(self._log(layer), taking=True)
        return self._arrived(found)

    def peek_layer(self, layer: int, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Read entries, which stay: keys and values [N, D] in the order asked for, copies."""
        self._check_open()
        wanted, at = as_request(counts, columns)
        if not len(at):
            return self._nothing()
        _, slots = self._places(layer).find(layer, wanted, at)
        return self._arrived(self._log(layer).read(slots))

    def counts(self, layer: int) -> Tensor:
        """Entries of each (row, kv head) of a layer: LongTensor [B, H]; [0, 0] where nothing was ever put."""
        self._check_open()
        entry = self._layers.get(layer)
        return torch.from_numpy(entry.places.counts()) if entry else torch.zeros(0, 0, dtype=torch.int64)

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
        entry = self._summarised(layer, width, rows, heads)
        if entry is None:
            scores = torch.zeros(rows, heads, n_query, 0, device=self.device)
            sizes = torch.zeros(rows, heads, 0, dtype=torch.int64)
            return LayerBounds(scores, sizes, sizes.new_zeros(rows, heads, 0, self.page_size))
        scores = entry.pages.all_bounds(query)
        sizes, columns = entry.listed()
        empty = (sizes == 0).to(scores.device)
        return LayerBounds(scores.masked_fill(empty[:, :, None], -torch.inf), sizes, columns)

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

    def columns(self, layer: int, row: int, head: int) -> Tensor:
        """Columns of one (row, kv head), LongTensor [n], in the order in which they were put."""
        self._check_open()
        entry = self._layers.get(layer)
        return torch.from_numpy(entry.places.columns_of(row, head) if entry else np.zeros(0, np.int64))

    def bounds(self, layer: int, row: int, head: int, query: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Upper bounds [G, P] of q.k for queries [G, D], and the columns of each of the P pages.

        See `bounds_layer`, which does it for all rows and kv heads at once.
        """
        if query.ndim != 2:
            raise ConfigError(
                f"query has shape {tuple(query.shape)}; the bounds of a kv head need [queries, head size]"
            )
        entry = self._summarised(layer, query.shape[-1], row + 1, head + 1)
        if entry is None:
            return torch.zeros(len(query), 0, device=self.device), []
        pages = entry.places.pages_of(row, head)
        scores = entry.pages.bounds(query, row, head)
        real = [number for number, page in enumerate(pages) if len(page)]
        return scores[:, real], [torch.from_numpy(pages[number]) for number in real]

    def _summarised(self, layer: int, width: int, rows: int, heads: int) -> LayerIndex | None:
        """A layer of at least so many rows and kv heads, its page summaries up to date; None if it holds nothing."""
        self._check_open()
        entry = self._layers.get(layer)
        if entry is None or not entry.places.n_entries:
            return None
        if width != self.width:
            raise ConfigError(f"query has head size {width}; the keys of the passive store have {self.width}")
        log = self._log(layer)
        entry.places.fit(rows, heads, np.zeros(0, np.int64))
        entry.pages.update(layer, entry.places, lambda slots: log.read(slots, values=False)[0], self.device)
        return entry

    # ---- all layers -------------------------------------------------------------------------------------------------

    def crop(self, n_seen: int) -> None:
        """Forget columns >= `n_seen`, in all layers."""
        self._check_open()
        for entry in self._layers.values():
            entry.places.crop(n_seen)

    def reorder(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]` (beam search), or keep the rows of a BoolTensor. No key is copied."""
        self._check_open()
        index = (
            (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).cpu().numpy().astype(np.int64)
        )
        if index.ndim != 1 or int(index.min(initial=0)) < 0:
            raise ConfigError("rows to reorder by must be a list of row numbers >= 0")
        for entry in self._layers.values():
            entry.take_rows(index)

    def repeat(self, n: int) -> None:
        """Each row `n` times, side by side."""
        self._check_open()
        if n < 1:
            raise ConfigError(f"rows can't be repeated {n} times; at least once")
        rows = max((entry.places.shape[0] for entry in self._layers.values()), default=0)
        self.reorder(torch.arange(rows).repeat_interleave(n))

    def snapshot(self) -> Snapshot:
        """The present state, to `restore` any number of times: lists of entries, no keys. Room of entries that only a
        snapshot holds is given back when the snapshot is no longer referred to."""
        self._check_open()
        taken = Snapshot({layer: entry.copy() for layer, entry in self._layers.items()})
        self._snapshots.add(taken)
        weakref.finalize(taken, _look_again, weakref.WeakMethod(self._forget_held))
        return taken

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot of this store."""
        self._check_open()
        if snapshot not in self._snapshots:
            raise ConfigError("this snapshot was not taken from this passive store")
        self._layers = {layer: entry.copy() for layer, entry in snapshot.layers.items()}

    # ---- size, end --------------------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """Entries of all layers, rows and kv heads; one that rows share counts in each."""
        return sum(entry.places.n_entries for entry in self._layers.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated in memory: entries, if they are there, the index and the page summaries."""
        return sum(entry.nbytes for entry in self._layers.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of files; 0 for a store in memory."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory and on disk together."""
        return self.memory_bytes + self.disk_bytes

    def flush(self) -> None:
        """Make what the store holds durable; nothing to do in memory."""
        self._check_open()

    def close(self) -> None:
        """Give everything back. A closed store refuses every request; closing twice does nothing."""
        self._closed = True
        self._layers = {}

    def __enter__(self: Store) -> Store:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            f"a {type(self).__name__} can't be pickled or copied; give another process the folder of a disk store"
        )

    # ---- inside -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _log(self, layer: int) -> EntryLog:
        """The log that holds a layer's entries."""

    @abstractmethod
    def _sharing(self, log: EntryLog) -> Iterator[int]:
        """The layers whose entries lie in a log."""

    @abstractmethod
    def _logs(self) -> Iterator[EntryLog]:
        """All logs."""

    def _holders(self, log: EntryLog) -> Iterator[LayerIndex]:
        """Everything that refers to slots of a log: the layers, and their snapshots."""
        for layers in (self._layers, *(snapshot.layers for snapshot in self._snapshots)):
            yield from (layers[layer] for layer in self._sharing(log) if layer in layers)

    def _n_live(self, log: EntryLog) -> int:
        return sum(self._layers[i].places.n_entries for i in self._sharing(log) if i in self._layers)

    def _live(self, log: EntryLog) -> Ints:
        parts = [holder.places.live_slots() for holder in self._holders(log)]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _reclaim(self, log: EntryLog, *, taking: bool = False) -> None:
        """Give back the room of entries that left, if it is more than that of those that stay."""
        n_live = self._n_live(log)
        if not log.crowded(n_live, moving=log.moves_on_take or not taking):
            return
        if taking and not log.moves_on_take:
            log.drop_dead(self._live(log))
            return
        table = log.collect(self._live(log), n_live)
        if table is not None:
            for holder in self._holders(log):
                holder.remap(table)

    def _forget_held(self) -> None:
        for log in self._logs():
            log.forget_held()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the passive store is closed")

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

    def _places(self, layer: int) -> Places:
        entry = self._layers.get(layer)
        return entry.places if entry else Places(self.page_size)

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


def _look_again(forget: weakref.WeakMethod) -> None:
    method = forget()
    if method is not None:
        method()
