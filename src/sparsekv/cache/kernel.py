"""The compiled kernel of decoding: few queries over segments of different lengths, shared out to all cores of a CPU.

torch's attention reads a segment on one core while there are few queries, and ragged heads are a call each; `kernel.c`
reads all heads in one call, a piece at a time, each core the next one. It is compiled for this machine's processor when
it is first wanted, which takes two seconds and a C compiler with OpenMP ($CC, or `cc`), and kept in the cache folder
($SPARSEKV_HOME). Where that fails, or with SPARSEKV_KERNEL=0, torch's attention does the work.

With GCC torch's own threads do the work: symbols of the OpenMP library that it has loaded come first.
Knows nothing of caches.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.files import cache_home

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
# what of -ffast-math lets sums be vectorised; the rest would take NaN for impossible, and tiny numbers for 0 everywhere
_FLAGS += [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
]
_SECONDS = 60
"""How long compiling may take."""

_SERIAL = 1 << 16
"""Products of a query's and a key's numbers, up to which one core is done before others have woken up."""

_WIDEST, _MOST_QUERIES = 512, 64
"""The kernel keeps a block of numbers of these sizes on the stack."""

_DTYPES = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


def is_on() -> bool:
    """Whether the kernel is there: compiled now, if it has not been. The same for the whole life of a process."""
    return _library() is not None


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: tuple[int, ...],
    tail: int,
    room: int,
    scaling: float | None = None,
) -> Tensor | None:
    """Attention [S, n, D] of queries [S, n, D], n for each of S segments; sums in float32. No gradient.

    Parameters
    ----------
    queries, keys, values : FloatTensor [S, n, D], [sum(counts) + S * room, D], the same
        On the CPU, of one dtype.
    counts, tail, room : lengths
        Segment i is `counts[i] + tail` entries, more than none, and `room - tail` that are not read behind them.
    scaling : float, optional
        What logits are multiplied by. Default: D ** -0.5.

    Returns None where the kernel is not there, or not for such tensors: it takes float32 and bfloat16, contiguous.
    Raises ValueError if the lengths are not those of the tensors: it would read other memory.
    """
    every = (queries, keys, values)
    fits = queries.dtype in _DTYPES and all(
        type(x) is Tensor and x.is_cpu and x.dtype == queries.dtype and x.is_contiguous() and not x.is_neg()
        for x in every
    )
    (n_segments, n_queries, width), stored = queries.shape, sum(counts)
    library = _library() if fits and width <= _WIDEST and n_queries <= _MOST_QUERIES else None
    if library is None:
        return None
    lengths_fit = len(counts) == n_segments and min(counts, default=0) >= 0 and 0 <= tail <= room
    whole = keys.shape == values.shape == (stored + n_segments * room, width)
    if not (lengths_fit and whole and all(count + tail for count in counts)):
        raise ValueError(
            f"segments of {counts} entries, {tail} of {room}, don't lie in keys of {tuple(keys.shape)}"
        )
    work = (stored + n_segments * tail) * n_queries * width
    output = torch.empty_like(queries)
    failed = library.sparsekv_attend(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        _lengths(counts),
        n_segments,
        tail,
        room,
        n_queries,
        width,
        width**-0.5 if scaling is None else scaling,
        queries.dtype == torch.bfloat16,
        torch.get_num_threads() if work > _SERIAL else 1,
    )
    return None if failed else output


@lru_cache(maxsize=4096)
def _lengths(counts: tuple[int, ...]) -> Any:
    """As the kernel reads them. Asked for every layer and token: remembered."""
    return (ctypes.c_int64 * len(counts))(*counts)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The kernel, or None where it is not wanted, can't be compiled, or computes something else than torch does."""
    if os.environ.get("SPARSEKV_KERNEL") == "0":
        return None
    try:
        library = _loaded(cache_home() / "kernels")
    except subprocess.TimeoutExpired as error:
        log.warning("attention while decoding is torch's own (SPARSEKV_KERNEL=0 does not try): %s", error)
        return None
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        log.info("attention while decoding is torch's own: %s", error)
        return None
    if not _is_right(library):
        log.warning("attention while decoding is torch's own: the compiled kernel computes something else")
        return None
    return library


def _loaded(folder: Path) -> ctypes.CDLL:
    """The library of this source for this processor, compiled into `folder` if it isn't there or is no longer whole.

    Raises OSError, AttributeError, RuntimeError, ValueError or TimeoutExpired if that can't be done.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    made_of = [_SOURCE.read_bytes(), " ".join([*compiler, *_FLAGS]).encode(), _processor().encode()]
    path = folder / f"attend-{_digest(b''.join(made_of))}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owned(folder)
    if not _is_whole(path):
        _compile(compiler, path)
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.sparsekv_attend.argtypes = [*[pointer] * 5, *[number] * 5, ctypes.c_float, ctypes.c_int, number]
    library.sparsekv_attend.restype = ctypes.c_int
    return library


def _compile(compiler: list[str], path: Path) -> None:
    """Make the library, and beside it a file that says what is in it."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as workplace:
        made = Path(workplace) / "attend.so"
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                _, said = process.communicate(timeout=_SECONDS)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                raise
        if process.returncode:
            raise RuntimeError(
                f"{shlex.join(command)} failed: {said.decode(errors='replace').strip()[-400:]}"
            )
        known = made.with_suffix(".sha256")
        known.write_text(_digest(made.read_bytes()))
        for file in (made, known):  # another process may have been as far, with the same
            file.chmod(0o600)
            file.replace(path.with_suffix(file.suffix))


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was made: one that was cut short would end the process."""
    try:
        for file in (path, path.with_suffix(".sha256")):
            _check_owned(file)
        return _digest(path.read_bytes()).encode() == path.with_suffix(".sha256").read_bytes()
    except FileNotFoundError:
        return False


def _check_owned(path: Path) -> None:
    """Raise a RuntimeError if another user may have put something there: what lies there is executed."""
    if not hasattr(os, "geteuid"):
        return
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise RuntimeError(f"{path} can be written by other users")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _processor() -> str:
    """What machine code may use: a folder of several machines may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *platform.libc_ver(), *dict.fromkeys(kept)])


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether it computes attention: a compiler's mistake must not become a wrong answer.

    In numpy, which no mode or default of torch changes.
    """
    random = np.random.default_rng(0)
    counts, tail, room, n_queries, width = (300, 0, 33), 1, 3, 3, 64
    queries = random.standard_normal((len(counts), n_queries, width), np.float32)
    keys, values = random.standard_normal((2, sum(counts) + len(counts) * room, width), np.float32)
    keys[-room] = np.nan  # in the last segment: no flag may take it for impossible
    for half in (False, True):
        given = [(x.view(np.uint32) >> 16).astype(np.uint16) if half else x for x in (queries, keys, values)]
        read = [(x.astype(np.uint32) << 16).view(np.float32) if half else x for x in given]
        found = np.empty_like(given[0])
        pointers = [x.ctypes.data for x in (*given, found)]
        sizes = (_lengths(counts), len(counts), tail, room, n_queries, width)
        if library.sparsekv_attend(*pointers, *sizes, 0.2, half, min(2, torch.get_num_threads())):
            return False
        result = (found.astype(np.uint32) << 16).view(np.float32) if half else found
        start = 0
        for i, count in enumerate(counts):
            stored = slice(start, start + count + tail)
            weights = np.exp(0.2 * read[0][i].astype(np.float64) @ read[1][stored].T)
            wanted = weights @ read[2][stored] / weights.sum(axis=1, keepdims=True)
            if not np.allclose(result[i], wanted, atol=2e-2 if half else 1e-5, equal_nan=True):
                return False
            start += count + room
    return True
