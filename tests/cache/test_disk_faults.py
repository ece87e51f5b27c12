"""Whatever happens to a passive folder: a clear error, or everything as it was at a flush. Never a wrong entry."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sparsekv.cache import disk, disk_log, disk_manifest, entry_log
from sparsekv.cache.disk import DiskStore
from sparsekv.errors import ConfigError

HEADS, WIDTH = 2, 4


@pytest.fixture(autouse=True)
def small(monkeypatch: Any) -> None:
    """Blocks of 8 entries, files of 64: a few hundred entries are several files."""
    monkeypatch.setattr(entry_log, "_SLACK", 16)
    monkeypatch.setattr(disk, "_SMALLEST_FILE", 1)
    monkeypatch.setattr(disk_log, "_BLOCK_SHIFT", 3)
    monkeypatch.setattr(disk_log, "BLOCK_ROWS", 8)
    monkeypatch.setattr(disk_manifest, "BLOCK_ROWS", 8)


def opened(folder: Path, **options: Any) -> DiskStore:
    return DiskStore(
        folder, options.pop("fingerprint", None), page_size=4, file_bytes=4096 + 64 * 2 * WIDTH * 4
    )


def entries(layer: int, n: int = 60) -> tuple[torch.Tensor, ...]:
    """The one right content of a layer: counts, columns, keys, values."""
    draw = torch.Generator().manual_seed(layer)
    keys, values = torch.randn(2, n * HEADS, WIDTH, generator=draw)
    return torch.full((1, HEADS), n), torch.arange(n).repeat(HEADS), keys, values


def holds(store: DiskStore, layers: dict[int, list[int]]) -> bool:
    """The store holds just these columns of these layers (in both heads), and they are right."""
    known = {layer for layer in range(40) if store.counts(layer).sum()}
    if known != {layer for layer, columns in layers.items() if columns}:
        return False
    for layer in known:
        _, _, keys, values = entries(layer)
        for head in range(HEADS):
            columns = store.columns(layer, 0, head)
            if sorted(columns.tolist()) != sorted(layers[layer]):
                return False
            found = store.peek(layer, 0, head, columns)
            assert torch.equal(found[0], keys[head * 60 + columns]), f"wrong keys in layer {layer}"
            assert torch.equal(found[1], values[head * 60 + columns]), f"wrong values in layer {layer}"
    return True


def script(store: DiskStore) -> Iterator[dict[int, list[int]]]:
    """Puts, takes, reclaiming and flushes; yields what is flushed after each flush."""
    every, tenth = list(range(60)), list(range(0, 60, 10))
    store.put_layer(0, *entries(0))
    store.put_layer(1, *entries(1))
    store.flush()
    yield {0: every, 1: every}
    rest = torch.tensor([c for c in every if c % 10])
    store.take_layer(0, torch.full((1, HEADS), len(rest)), rest.repeat(HEADS))
    store.put_layer(2, *entries(2))
    store.take_layer(1, torch.full((1, HEADS), len(rest)), rest.repeat(HEADS))
    store.put_layer(3, *entries(3))  # mostly dead files are emptied now
    store.flush()
    yield {0: tenth, 1: tenth, 2: every, 3: every}
    store.take_layer(2, *entries(2)[:2])
    store.flush()
    yield {0: tenth, 1: tenth, 3: every}
    store.close()
    yield {0: tenth, 1: tenth, 3: every}


# ---- a process that dies ----------------------------------------------------------------------------------------


def test_death_at_any_system_call_leaves_the_last_flush_or_the_next(tmp_path: Path) -> None:
    store = opened(tmp_path / "p")
    copies: list[tuple[Path, int]] = []
    n_flushed = 0

    def keep() -> None:
        target = tmp_path / f"copy{len(copies)}"
        shutil.copytree(tmp_path / "p", target)
        copies.append((target, n_flushed))

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            keep()
            return real(*arguments, **options)

        return call

    def torn(real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any, *rest: int) -> int:
            keep()
            half = memoryview(data)[: max(1, len(data) // 2)]
            return real(descriptor, half, *rest)

        return call

    patches = [mock.patch.object(os, name, torn(getattr(os, name))) for name in ("pwrite", "write")]
    patches += [mock.patch.object(os, name, before(getattr(os, name))) for name in ("replace", "ftruncate")]
    patches += [mock.patch.object(os, "fsync", before(lambda descriptor: None))]  # the machine stays up
    patches += [mock.patch.object(Path, "unlink", before(Path.unlink))]
    states: list[dict[int, list[int]]] = [{}]
    for patch in patches:
        patch.start()
    try:
        for state in script(store):
            states.append(state)
            n_flushed += 1
    finally:
        for patch in patches:
            patch.stop()
    assert len(copies) > 100
    found = set()
    for number, (folder, done) in enumerate(copies):
        again = opened(folder)
        which = [i for i in (done, done + 1) if i < len(states) and holds(again, states[i])]
        assert which, f"{folder.name} is neither flush {done} nor the next"
        found.add(which[0])
        again.put_layer(9, *entries(9))  # and it can be gone on with
        again.close(commit=number % 10 == 0)
        if number % 10 == 0:
            with opened(folder) as later:
                assert holds(later, {**states[which[0]], 9: list(range(60))})
        shutil.rmtree(folder)
    assert found == set(range(len(states) - 1))  # the last two are equal


def test_kill_9_while_putting(tmp_path: Path) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                store = opened(folder)
                for layer in range(40):
                    store.put_layer(layer, *entries(layer))
                    if layer >= 2:
                        store.take_layer(layer - 2, *entries(layer - 2)[:2])
                    if layer % 3 == 2:
                        store.flush()
                        os.write(writer, bytes([layer]))
            finally:
                os._exit(0)
        os.close(writer)
        flushed = os.read(reader, 1)[0]
        time.sleep(0.004 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while rest := os.read(reader, 1):
            flushed = rest[0]
        os.close(reader)
        every = list(range(60))
        with opened(folder) as store:
            at = [layer for layer in (flushed, flushed + 3) if holds(store, {layer - 1: every, layer: every})]
            assert at, "neither the last flush that was heard of nor the next"
            store.take_layer(at[0], *entries(at[0])[:2])


# ---- files that changed -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with opened(tmp_path / "p", fingerprint={"weights": "a1"}) as store:
        for layer in range(2):
            store.put_layer(layer, *entries(layer))
        some = torch.tensor([3, 4, 5, 50])
        store.take_layer(1, torch.full((1, HEADS), 4), some.repeat(HEADS))
    return tmp_path / "p"


RIGHT = {0: list(range(60)), 1: [c for c in range(60) if c not in (3, 4, 5, 50)]}


@contextmanager
def changed(path: Path, at: int, bit: int) -> Iterator[None]:
    """One bit of a file is another one, for a while."""
    with open(path, "r+b") as file:
        for _ in range(2):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << bit)]))
            file.flush()
            if _ == 0:
                yield


def test_no_flipped_bit_is_ever_returned(folder: Path) -> None:
    draw = random.Random(0)
    paths = sorted(path for path in folder.iterdir() if path.name != ".lock")
    caught = 0
    for path in paths:
        size = path.stat().st_size
        spots = range(0, size, 7) if size < 1500 else [draw.randrange(size) for _ in range(120)]
        for at in spots:
            with changed(path, at, draw.randrange(8)):
                try:
                    store = opened(folder)
                except ConfigError as error:
                    assert "\n" not in str(error) and str(path.parent) in str(error)
                    caught += 1
                    continue
                try:
                    assert holds(store, RIGHT)  # a byte that holds nothing: a hole, an entry that was taken
                except ConfigError as error:
                    assert f"'{path}' is damaged: entries" in str(error)
                    caught += 1
                finally:
                    store.close(commit=False)
    assert caught > 300
    with opened(folder) as store:
        assert holds(store, RIGHT)


def test_a_bit_flipped_under_an_open_store_is_caught(folder: Path) -> None:
    path = sorted(folder.glob("entries-*"))[0]
    with opened(folder) as store:
        assert holds(store, RIGHT)
        for row in (0, 13, 63):
            with changed(path, 4096 + row * WIDTH * 4 + 2, 6), pytest.raises(ConfigError, match="is damaged"):
                holds(store, RIGHT)
            assert holds(store, RIGHT)
        with changed(path, 4096 + 2, 6), pytest.raises(ConfigError, match="is damaged"):
            store.bounds(0, 0, 0, torch.ones(1, WIDTH))
        with changed(path, 4096 + 2, 6), pytest.raises(ConfigError, match="is damaged"):
            store.take(0, 0, 0, torch.tensor([0]))
        assert store.n_entries == 2 * sum(map(len, RIGHT.values()))  # the take took nothing


def test_a_bit_flipped_right_after_a_put_is_caught(tmp_path: Path, monkeypatch: Any) -> None:
    """Time stamps are coarse (here: ten seconds): a put, a read and a change may share one."""
    tick = 10_000_000_000
    monkeypatch.setattr(disk_log, "_COARSE_NS", tick)
    monkeypatch.setattr(
        disk_log, "_state", lambda found: (found.st_mtime_ns // tick, found.st_ctime_ns // tick)
    )
    with opened(tmp_path / "p") as store:
        store.put_layer(0, *entries(0))
        assert holds(store, {0: list(range(60))})
        path = sorted((tmp_path / "p").glob("entries-*"))[0]
        with changed(path, 4096 + 1, 0), pytest.raises(ConfigError, match="is damaged"):
            holds(store, {0: list(range(60))})
        store.put_layer(1, *entries(1))  # its own write must not hide another's
        with changed(path, 4096 + 1, 0):
            store.put_layer(2, *entries(2))
            with pytest.raises(ConfigError, match="is damaged"):
                holds(store, {i: list(range(60)) for i in range(3)})


@pytest.mark.parametrize("open_before", [False, True])
def test_missing_and_cut_files(folder: Path, tmp_path: Path, open_before: bool) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    for name in names:
        for fault in ("missing", "empty", "cut", "longer"):
            copy = tmp_path / f"{name}-{fault}"
            shutil.copytree(folder, copy)
            if open_before and not name.startswith("entries"):
                continue  # what an open store no longer reads
            store = opened(copy) if open_before else None
            path = copy / name
            if fault == "missing":
                path.unlink()
            elif fault == "longer":
                with open(path, "ab") as file:
                    file.write(b"\0")
            else:
                os.truncate(path, 0 if fault == "empty" else path.stat().st_size // 2)
            with pytest.raises(ConfigError) as caught:
                store = store or opened(copy)
                holds(store, RIGHT)
            assert name in str(caught.value) and "\n" not in str(caught.value)
            if store is not None:
                store.close(commit=False)


# ---- folders that refuse -----------------------------------------------------------------------------------------


def test_a_read_only_folder() -> None:
    place = Path(tempfile.mkdtemp())
    with opened(place / "p") as store:
        store.put_layer(0, *entries(0))
    os.chmod(place / "p", 0o555)
    (place / "empty").mkdir(mode=0o555)
    os.chmod(place, 0o555)
    was = os.geteuid()
    try:
        if was == 0:  # root may write anywhere
            os.seteuid(65534)
        for folder in (place / "p", place / "empty", place / "new"):
            with pytest.raises(ConfigError, match=r"cannot be (written|opened)") as caught:
                opened(folder)
            assert "ermission" in str(caught.value) and "\n" not in str(caught.value)
    finally:
        os.seteuid(was)
        for path in (place, place / "p", place / "empty"):
            os.chmod(path, 0o755)
        shutil.rmtree(place)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "write"])
def test_a_full_disk_at_any_moment(tmp_path: Path, call: str) -> None:
    """The put or flush that meets it fails as a whole; with room again, everything goes on."""
    every = list(range(60))
    with opened(tmp_path / "p") as store:
        store.put_layer(0, *entries(0))
        store.flush()
        failures = 0
        for nth in range(30):
            n_calls = 0
            real = getattr(os, call)

            def full(*arguments: Any, nth: int = nth, real: Callable[..., Any] = real) -> Any:
                nonlocal n_calls
                n_calls += 1
                if n_calls > nth:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*arguments)

            try:
                with mock.patch.object(os, call, full):
                    store.put_layer(1, *entries(1))
                    store.flush()
            except ConfigError as error:
                assert "is full" in str(error) and "\n" not in str(error)
                failures += 1
            else:
                break
            put = holds(store, {0: every, 1: every})
            assert put or holds(store, {0: every})
            shutil.copytree(tmp_path / "p", tmp_path / "copy")  # what another process would find now
            with opened(tmp_path / "copy") as other:
                assert holds(other, {0: every}) or holds(other, {0: every, 1: every})
            shutil.rmtree(tmp_path / "copy")
            if put:
                store.take_layer(1, *entries(1)[:2])
        assert failures >= 1 and holds(store, {0: every, 1: every})
    with opened(tmp_path / "p") as store:
        assert holds(store, {0: every, 1: every})


def test_a_limit_of_the_system_on_file_sizes(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with opened(tmp_path / "p") as store:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
                try:
                    store.put_layer(0, *entries(0))
                except ConfigError as error:
                    os.write(writer, str(error).encode())
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                store.put_layer(0, *entries(0))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"is full" in os.read(reader, 4000)
    with opened(tmp_path / "p") as store:
        assert holds(store, {0: list(range(60))})


def test_a_store_that_cannot_flush_lets_the_folder_go(folder: Path) -> None:
    store = opened(folder)
    store.put_layer(5, *entries(5))
    with (
        mock.patch.object(os, "replace", side_effect=OSError(errno.EIO, "Input/output error")),
        pytest.raises(ConfigError, match="cannot be written: Input/output error"),
    ):
        store.close()
    with opened(folder) as again:
        assert holds(again, RIGHT)
