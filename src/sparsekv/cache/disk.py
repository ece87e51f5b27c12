"""The passive tier in memory-mapped safetensors files of one folder.

A folder is as its last `flush` left it: `flush` writes what was put down and replaces the manifest, and until then the
files that the manifest names stay. So when a process dies, at whatever moment, the folder opens again with everything
up to its last flush and nothing later, never with half a put. Checksums are checked before anything is returned; see
`disk_log`. One store at a time: the folder is locked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsekv.cache import disk_manifest as manifests
from sparsekv.cache.disk_log import DTYPES, DiskLog, FileChunk, failed
from sparsekv.cache.entry_log import EntryLog
from sparsekv.cache.pages import PAGE_SIZE
from sparsekv.cache.passive import PassiveStore
from sparsekv.errors import ConfigError

_SMALLEST_FILE = 1 << 16


class DiskStore(PassiveStore):
    """A passive store in a folder, which opens again in another process.

    Parameters
    ----------
    folder : str or Path
        A folder of its own; made if it isn't there.
    fingerprint : mapping, optional
        Whose entries these are: field -> value (JSON), like the number of layers, or a hash of the weights. A folder
        that says otherwise is refused; fields that it doesn't know are added. See `belong_to`.
    page_size : int >= 1
        Entries per page.
    file_bytes : int >= 65536
        No file of entries is larger (but holds 256 entries at least).

    Attributes
    ----------
    generation : int
        How often the folder was flushed, by this store or before.
    note : dict
        Anything that JSON can say. Written by `flush` together with the entries, and there again after reopening: what
        else must fit them can be named here.

    Raises
    ------
    ConfigError
        A folder that can't be written, is in use, holds other files, or entries of another model; files that are
        missing, cut or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, Any] | None = None,
        *,
        page_size: int = PAGE_SIZE,
        file_bytes: int = 64 << 20,
    ) -> None:
        super().__init__(page_size)
        if file_bytes < _SMALLEST_FILE:
            raise ConfigError(f"file_bytes {file_bytes} is less than {_SMALLEST_FILE}")
        self.folder = Path(folder).expanduser()
        self.file_bytes = file_bytes
        self.note: dict[str, Any] = {}
        self.fingerprint: dict[str, Any] = {}
        self._process = os.getpid()
        self._disk: DiskLog | None = None
        self._retired: list[FileChunk] = []  # not needed, but the manifest still names them
        self._lock = self._locked()
        try:
            self._manifest = self._open()
            self.belong_to(fingerprint or {})
        except BaseException:
            self._let_go()
            raise

    @property
    def generation(self) -> int:
        return self._manifest.generation

    @property
    def disk_bytes(self) -> int:
        """Bytes that the folder takes on disk (holes of files that are not full do not count)."""
        self._check_open()
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.folder) if entry.is_file())

    def belong_to(self, fingerprint: Mapping[str, Any]) -> None:
        """Say whose entries these are; fields that the folder doesn't know yet are added.

        Raises
        ------
        ConfigError
            If the folder knows one of the fields with another value.
        """
        mine = json.loads(json.dumps(dict(fingerprint)))
        for name, value in mine.items():
            if name in self.fingerprint and self.fingerprint[name] != value:
                raise ConfigError(
                    f"passive folder '{self.folder}' holds entries of another model: {name} was "
                    f"{self.fingerprint[name]!r}, now {value!r}; use another folder"
                )
        self.fingerprint.update(mine)

    def flush(self) -> None:
        """Make everything durable: after this call the folder opens again as it is now.

        Raises ConfigError if it can't be written; then the folder opens again as of the flush before.
        """
        self._check_open()
        path = self.folder / manifests.MANIFEST
        try:
            if self._disk is not None:
                self._reclaim(self._disk)
                self._drop_dead(self._disk)
                for chunk in self._disk.files().values():
                    chunk.sync()
            self._manifest = self._written()
            named = self._manifest.names
            for chunk in self._retired:
                chunk.discard(remove=True)
            self._retired = []
            manifests.remove_strays(self.folder, named | self._held_names())
        except OSError as error:
            raise failed(path, error, "written") from error

    def close(self, *, commit: bool = True) -> None:
        """Flush (unless told not to `commit`) and let the folder go. Closing twice does nothing.

        Leaving a `with` block by an error does not commit: the folder stays as of its last flush.
        """
        if self._closed:
            return
        try:
            if commit:
                self.flush()
        finally:
            self._let_go()
            super().close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close(commit=kind is None)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _locked(self) -> FileLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.folder / ".lock"))
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"passive folder '{self.folder}' is in use by another process, or another store of this one"
            ) from None
        except FileExistsError:
            raise ConfigError(f"passive folder '{self.folder}' is a file; give a folder") from None
        except OSError as error:
            raise ConfigError(
                f"passive folder '{self.folder}' cannot be written: {error.strerror or error}"
            ) from None
        return lock

    def _open(self) -> manifests.Manifest:
        """Read what the folder holds; a new one gets an empty manifest, which says that it is ours."""
        found = manifests.read_manifest(self.folder)
        try:
            if found is None:
                self._manifest = manifests.Manifest()
                return self._written()
            manifests.remove_strays(self.folder, found.names)
        except OSError as error:
            raise failed(self.folder / manifests.MANIFEST, error, "written") from error
        self.fingerprint, self.note = dict(found.fingerprint), dict(found.note)
        self.dtype, self.width = found.torch_dtype, found.width
        if found.index is not None:
            self._disk = self._new_log(found.file_rows)
            self._disk.serial = found.serial
            self._layers = manifests.read_index(self.folder, found, self.page_size, self._disk)
        return found

    def _written(self) -> manifests.Manifest:
        """Write index and manifest of the next generation."""
        generation = self._manifest.generation + 1
        manifest = manifests.Manifest(
            generation=generation, fingerprint=dict(self.fingerprint), note=json.loads(json.dumps(self.note))
        )
        if self._disk is not None:
            name, checksum = manifests.write_index(self.folder, generation, self._layers, self._disk)
            manifest = manifests.Manifest(
                generation=generation,
                fingerprint=manifest.fingerprint,
                note=manifest.note,
                dtype=DTYPES[self._disk.dtype],
                width=self._disk.width,
                file_rows=self._disk.chunk_rows,
                serial=self._disk.serial,
                index=name,
                index_checksum=checksum,
                files=manifests.files_of(self._disk),
            )
        manifests.write_manifest(self.folder, manifest)
        return manifest

    def _new_log(self, rows: int | None = None) -> DiskLog:
        if self.dtype is None or self.width is None:
            raise ConfigError("the passive store doesn't know its dtype and head size yet")
        if self.dtype not in DTYPES:
            raise ConfigError(f"a disk store takes {', '.join(map(str, DTYPES))}, it was given {self.dtype}")
        log = DiskLog(self.folder, self.file_bytes, self.dtype, self.width, self.page_size, self._retire)
        if rows is not None:
            log.shift = rows.bit_length() - 1
        return log

    def _retire(self, chunk: FileChunk) -> None:
        """A file is no longer needed: remove it, or at the next flush if the manifest still names it."""
        if chunk.path.name in self._manifest.names:
            self._retired.append(chunk)
        else:
            chunk.discard(remove=True)

    def _held_names(self) -> set[str]:
        return {chunk.path.name for chunk in self._disk.files().values()} if self._disk else set()

    def _let_go(self) -> None:
        if os.getpid() != self._process:  # the parent's lock and files are not ours to close
            return
        for chunk in [*self._retired, *(self._disk.files().values() if self._disk else ())]:
            chunk.discard(remove=False)
        self._retired, self._disk = [], None
        self._lock.release()

    def _check_open(self) -> None:
        super()._check_open()
        if os.getpid() != self._process:
            raise ConfigError(
                f"passive folder '{self.folder}' belongs to the process that opened it, not to a fork of it"
            )

    def _log(self, layer: int) -> EntryLog:
        if self._disk is None:
            self._disk = self._new_log()
        return self._disk

    def _sharing(self, log: EntryLog) -> Iterator[int]:
        return iter(
            sorted({i for layers in (self._layers, *(s.layers for s in self._snapshots)) for i in layers})
        )

    def _logs(self) -> Iterator[EntryLog]:
        return iter([self._disk] if self._disk else [])
