"""A passive folder: what its files are, how large, who may use it, and that it opens again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sparsekv.cache import disk
from sparsekv.cache.disk import DiskStore
from sparsekv.errors import ConfigError


def request(n: int, heads: int = 2, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Counts, columns, keys, values of `n` entries of each of the kv heads."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, n * heads, width, generator=draw)
    return torch.full((1, heads), n), torch.arange(n).repeat(heads), keys, values


def test_a_folder_opens_again_as_it_was(tmp_path: Path) -> None:
    counts, columns, keys, values = request(300)
    with DiskStore(tmp_path / "new" / "p", {"weights": "a1"}) as store:
        store.put_layer(0, counts, columns, keys, values)
        store.put_layer(5, counts, columns.flip(0), values, keys)
        store.take(0, 0, 1, torch.arange(0, 300, 3))
        store.note["turn"] = 7
        order = store.columns(5, 0, 1)
    with DiskStore(tmp_path / "new" / "p", {"weights": "a1", "layers": 6}) as store:
        assert (store.dtype, store.width, store.note, store.generation) == (torch.float32, 8, {"turn": 7}, 2)
        assert store.counts(0).tolist() == [[300, 200]] and torch.equal(store.columns(5, 0, 1), order)
        left = torch.tensor([c for c in range(300) if c % 3])
        assert torch.equal(store.peek(0, 0, 1, left)[1], values[300 + left])
        assert torch.equal(store.peek_layer(5, counts, columns.flip(0))[0], values)
        # It goes on where it was: in the file that is not full yet, and with the same columns refused.
        store.put(0, 0, 0, torch.tensor([300]), keys[:1], values[:1])
        assert len(list((tmp_path / "new" / "p").glob("entries-*"))) == 1
        with pytest.raises(ConfigError, match="has column 299 already"):
            store.put(0, 0, 0, torch.tensor([299]), keys[:1], values[:1])
    with DiskStore(tmp_path / "new" / "p") as store:
        assert store.fingerprint == {"weights": "a1", "layers": 6}
        assert torch.equal(store.take(0, 0, 0, torch.tensor([300, 0]))[0], keys[[0, 0]])


def test_only_a_flush_counts(tmp_path: Path) -> None:
    counts, columns, keys, values = request(20)
    with DiskStore(tmp_path / "p") as store:
        store.put_layer(0, counts, columns, keys, values)
        store.flush()
        store.take(0, 0, 0, torch.arange(20))
        store.put_layer(1, counts, columns, keys, values)
        store.close(commit=False)
    with pytest.raises(ZeroDivisionError), DiskStore(tmp_path / "p") as store:
        assert store.counts(0).tolist() == [[20, 20]] and store.n_entries == 40
        store.take_layer(0, counts, columns)
        raise ZeroDivisionError  # leaving by an error does not commit
    with DiskStore(tmp_path / "p") as store:
        assert torch.equal(store.take_layer(0, counts, columns)[0], keys)
    with DiskStore(tmp_path / "p") as store:
        assert store.n_entries == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_are_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    counts, columns, keys, values = request(300)
    keys, values = keys.to(dtype), values.to(dtype)
    with DiskStore(tmp_path / "p") as store:
        store.put_layer(0, counts, columns, keys, values)
    (path,) = (tmp_path / "p").glob("entries-*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("keys")[:600], keys) and file.get_tensor("keys").dtype == dtype
        assert torch.equal(file.get_tensor("values")[:600], values)
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["files"][0]["used"] == 600 and len(manifest["files"][0]["checksum"]) == 32
    with safe_open(tmp_path / "p" / manifest["index"], framework="pt") as file:
        assert file.get_tensor("layers.0.counts").tolist() == [[300, 300]]
        assert file.get_tensor("layers.0.columns").tolist() == columns.tolist()
    with DiskStore(tmp_path / "p") as store:
        assert torch.equal(store.take_layer(0, counts, columns)[1], values)


def test_files_are_bounded_and_holes_take_no_room(tmp_path: Path) -> None:
    counts, columns, keys, values = request(5000, width=16)  # 10,000 rows of 128 bytes
    with DiskStore(tmp_path / "p", file_bytes=1 << 17) as store:
        store.put_layer(0, counts, columns, keys, values)
        sizes = [path.stat().st_size for path in (tmp_path / "p").glob("entries-*")]
        assert max(sizes) <= 1 << 17 and len(sizes) == 20  # 512 rows each
        assert torch.equal(store.peek_layer(0, counts, columns)[0], keys)
    with DiskStore(tmp_path / "q") as store:  # a file of 64 MiB, nearly all of it a hole
        store.put(0, 0, 0, torch.arange(256), keys[:256], values[:256])
        assert store.disk_bytes < 1 << 19
    with pytest.raises(ConfigError, match="file_bytes 100 is less than 65536"):
        DiskStore(tmp_path / "r", file_bytes=100)


def test_room_is_given_back(tmp_path: Path) -> None:
    counts, columns, keys, values = request(5000, width=16)
    with DiskStore(tmp_path / "p", file_bytes=1 << 17) as store:
        store.put_layer(0, counts, columns, keys, values)
        store.flush()
        full = store.disk_bytes
        gone = torch.tensor([c for c in range(5000) if c % 10])
        for head in range(2):
            store.take(0, 0, head, gone)
        store.flush()
        assert store.disk_bytes < 0.3 * full  # a tenth is left, and its columns
        assert torch.equal(store.peek(0, 0, 1, torch.arange(0, 5000, 10))[0], keys[5000::10])
        store.take_layer(0, torch.tensor([[500, 500]]), torch.arange(0, 5000, 10).repeat(2))
        store.flush()
        assert not list((tmp_path / "p").glob("entries-*")) and store.disk_bytes < 1 << 15


def test_a_session_without_a_flush_does_not_grow(tmp_path: Path) -> None:
    counts, columns, keys, values = request(500, width=16)
    with DiskStore(tmp_path / "p", file_bytes=1 << 17) as store:
        store.put_layer(0, counts, columns, keys, values)
        for turn in range(1, 30):
            store.take_layer(0, counts, columns + (turn - 1) * 500)
            store.put_layer(0, counts, columns + turn * 500, keys, values)
        assert store.disk_bytes < 8 * 1000 * 128  # of 30 times as much that was put
        assert torch.equal(store.peek_layer(0, counts, columns + 29 * 500)[0], keys)


def test_entries_of_another_model_are_refused(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "p", {"weights": "a1", "num_hidden_layers": 30, "head_dim": 8}) as store:
        store.put_layer(0, *request(3))
    for other, match in (
        ({"weights": "b2"}, "another model: weights was 'a1', now 'b2'"),
        ({"weights": "a1", "num_hidden_layers": 32}, "num_hidden_layers was 30, now 32"),
        ({"head_dim": 16}, "head_dim was 8, now 16"),
    ):
        with pytest.raises(ConfigError, match=match):
            DiskStore(tmp_path / "p", other)
    with DiskStore(tmp_path / "p") as store:  # the lock was let go by those that failed
        with pytest.raises(ConfigError, match="weights was 'a1', now 'b2'"):
            store.belong_to({"weights": "b2"})
        with pytest.raises(
            ConfigError, match=r"float32 entries of head size 8, it was given torch\.bfloat16"
        ):
            store.put(1, 0, 0, torch.tensor([1]), torch.ones(1, 8).bfloat16(), torch.ones(1, 8).bfloat16())
        store.belong_to({"dtype": "float32"})
    with pytest.raises(ConfigError, match="dtype was 'float32', now 'bfloat16'"):
        DiskStore(tmp_path / "p", {"dtype": "bfloat16"})


def test_one_store_at_a_time(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "p") as store:
        store.put_layer(0, *request(3))
        with pytest.raises(ConfigError, match="is in use by another process, or another store of this one"):
            DiskStore(tmp_path / "p")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # a fork: neither the store that it inherited nor a new one
            said = []
            for attempt in (store.flush, store.close, lambda: DiskStore(tmp_path / "p")):
                try:
                    attempt()
                except ConfigError as error:
                    said.append(str(error))
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = json.loads(os.read(reader, 10_000))
        assert len(said) == 3 and "not to a fork" in said[0] + said[1] and "is in use" in said[2]
        with pytest.raises(ConfigError, match="is in use"):  # the fork's end did not let it go
            DiskStore(tmp_path / "p")
        assert store.n_entries == 6
    DiskStore(tmp_path / "p").close()


def test_folders_that_are_no_passive_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        DiskStore(tmp_path / "file")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \('thesis\.tex'\)"):
        DiskStore(tmp_path / "others")
    assert (tmp_path / "others" / "thesis.tex").exists()


def test_strays_of_a_process_that_died_are_removed(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "p") as store:
        store.put_layer(0, *request(3))
    names = {path.name for path in (tmp_path / "p").iterdir()}
    for stray in ("entries-00000009.safetensors", "index-00000009.safetensors", "manifest.json.tmp"):
        (tmp_path / "p" / stray).write_bytes(b"half")
    (tmp_path / "p" / "notes.txt").write_text("of the user")
    with DiskStore(tmp_path / "p") as store:
        assert {path.name for path in (tmp_path / "p").iterdir()} == names | {"notes.txt"}
        assert store.n_entries == 6


def test_writes_of_others_are_noticed_between_reads(tmp_path: Path, monkeypatch: Any) -> None:
    """A block is not checked at every read, but always after anyone wrote to its file."""
    counts, columns, keys, values = request(300)
    with DiskStore(tmp_path / "p") as store:
        store.put_layer(0, counts, columns, keys, values)
    (path,) = (tmp_path / "p").glob("entries-*")
    os.utime(path, ns=(1, 1))
    checked: list[int] = []
    real = disk.FileChunk.check
    with DiskStore(tmp_path / "p") as store:
        monkeypatch.setattr(
            disk.FileChunk, "check", lambda self, rows: (checked.append(len(rows)), real(self, rows))
        )
        for _ in range(3):
            assert torch.equal(store.peek_layer(0, counts, columns)[0], keys)
        with open(path, "r+b") as file:
            file.seek(4096 + 8 * 4 * 17)
            file.write(b"\x55")
        with pytest.raises(ConfigError, match="is damaged: entries 0 to 255 do not match their checksum"):
            store.peek_layer(0, counts, columns)
        store.close(commit=False)
    assert len(checked) == 4


def test_a_manifest_of_another_version_or_program(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "p", {"weights": "a1"}) as store:
        store.put_layer(0, *request(3))
    path = tmp_path / "p" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ConfigError, match="has format version 9, this sparsekv reads 1"):
        DiskStore(tmp_path / "p")
    path.write_text('{"checksum": 1}')
    with pytest.raises(ConfigError, match="was not written by a passive store"):
        DiskStore(tmp_path / "p")
    path.write_text(text.replace("a1", "b2"))
    with pytest.raises(ConfigError, match="does not match its own checksum"):
        DiskStore(tmp_path / "p")
    path.write_text(text)
    with DiskStore(tmp_path / "p", {"weights": "a1"}) as store:
        assert store.n_entries == 6
