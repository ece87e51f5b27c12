"""What a passive store holds, without reading or writing an entry: layers, rows, snapshots, and room to give back.

Shape letters: B rows, H kv heads. Where entries lie is an `EntryLog`'s business, how they are asked for that of
`PassiveStore`.
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
from sparsekv.cache.entry_request import Ints
from sparsekv.cache.pages import LayerIndex
from sparsekv.cache.places import Places
from sparsekv.errors import ConfigError

Store = TypeVar("Store", bound="Holdings")


class Snapshot:
    """What a store held at one moment; see `Holdings.snapshot`."""

    def __init__(self, layers: dict[int, LayerIndex]) -> None:
        self.layers = layers


class Holdings(ABC):
    """The part of a `PassiveStore` that is the same for all layers.

    Parameters
    ----------
    page_size : int >= 1
        Entries per page.
    """

    def __init__(self, page_size: int) -> None:
        if not 1 <= page_size <= 1024:
            raise ConfigError(f"page_size {page_size} is not between 1 and 1024 entries")
        self.page_size = page_size
        self._layers: dict[int, LayerIndex] = {}
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._closed = False

    def counts(self, layer: int) -> Tensor:
        """Entries of each (row, kv head) of a layer: LongTensor [B, H]; [0, 0] where nothing was ever put."""
        self._check_open()
        return torch.from_numpy(self._places(layer).counts())

    def columns(self, layer: int, row: int, head: int) -> Tensor:
        """Columns of one (row, kv head), LongTensor [n], in the order in which they were put."""
        self._check_open()
        return torch.from_numpy(self._places(layer).columns_of(row, head))

    # ---- rows and time ----------------------------------------------------------------------------------------------

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

    def pack(self) -> None:
        """Divide entries into pages as a store would into which they were put now, layer by layer, in their order."""
        self._check_open()
        for entry in self._layers.values():
            entry.pack()

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
        return sum(entry.n_entries for entry in self._layers.values())

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
        return sum(self._layers[i].n_entries for i in self._sharing(log) if i in self._layers)

    def _live(self, log: EntryLog) -> Ints:
        parts = [holder.places.live_slots() for holder in self._holders(log) if holder.n_entries]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _reclaim(self, log: EntryLog, *, taking: bool = False) -> None:
        """Give back the room of entries that left, if it is more than that of those that stay."""
        n_live = self._n_live(log)
        if not log.crowded(n_live, moving=log.moves_on_take or not taking):
            return
        if taking and not log.moves_on_take:
            self._drop_dead(log)
            return
        self._forget_changed(log)
        table = log.collect(self._live(log), n_live)
        if table is not None:
            for holder in self._holders(log):
                holder.remap(table)

    def _drop_dead(self, log: EntryLog) -> None:
        """Give back chunks in which nothing is left."""
        self._forget_changed(log)
        log.drop_dead(self._live(log))

    def _forget_changed(self, log: EntryLog) -> None:
        for holder in self._holders(log):
            holder.forget_changed()

    def _forget_held(self) -> None:
        for log in self._logs():
            log.forget_held()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the passive store is closed")

    def _places(self, layer: int) -> Places:
        entry = self._layers.get(layer)
        return entry.places if entry else Places(self.page_size)


def _look_again(forget: weakref.WeakMethod) -> None:
    method = forget()
    if method is not None:
        method()
