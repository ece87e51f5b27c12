"""The compiled kernel of decoding: few queries over segments of different lengths, shared out to all cores of a CPU.

torch's attention reads a segment on one core while there are few queries, and ragged heads are a call each; `native.c`
reads all heads in one call, every core an equal share of the entries, whatever they belong to. It is compiled for this
machine's processor when it is first wanted, which takes two seconds and a C compiler with OpenMP ($CC, or `cc`), and
kept in the cache folder ($SPARSEKV_HOME). Where that fails, or with SPARSEKV_NATIVE=0, torch's attention does the work.

torch's own threads do the work: symbols of the OpenMP library that it loads come first. Knows nothing of caches.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.files import cache_home

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
# not -ffast-math: it would assume that nothing is NaN, and change how the whole process treats tiny numbers
_FLAGS += [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
]
_SECONDS = 120
"""How long compiling may take."""

_SERIAL = 1 << 16
"""Products of a query's and a key's numbers, up to which one core is done before others have woken up."""

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

    Returns None where the kernel is not there, or not for such tensors (float32 and bfloat16, contiguous).
    Raises ValueError if the lengths are not those of the tensors: it would read other memory.
    """
    every = (queries, keys, values)
    fits = queries.dtype in _DTYPES and all(x.dtype == queries.dtype and x.is_contiguous() for x in every)
    library = _library() if fits and type(keys) is Tensor else None
    if library is None:
        return None
    (n_segments, n_queries, width), stored = queries.shape, sum(counts)
    if (
        not keys.shape == values.shape == (stored + n_segments * room, width)
        or len(counts) != n_segments
        or tail > room
    ):
        raise ValueError(
            f"{len(counts)} segments, {stored} + {tail} of {room}, don't lie in keys of {tuple(keys.shape)}"
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
    if os.environ.get("SPARSEKV_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(cache_home() / "native")))
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        library.sparsekv_attend.argtypes = [
            *[pointer] * 5,
            *[number] * 5,
            ctypes.c_float,
            ctypes.c_int,
            number,
        ]
        library.sparsekv_attend.restype = ctypes.c_int
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("attention while decoding is torch's own: %s", error)
        return None
    if not _is_right(library):
        log.warning("attention while decoding is torch's own: the compiled kernel computes something else")
        return None
    return library


def _compiled(folder: Path) -> Path:
    """The library in `folder`, compiled for this processor from this source, if it isn't there.

    Raises OSError, RuntimeError or SubprocessError if that can't be done.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    made_of = [_SOURCE.read_bytes(), " ".join([*compiler, *_FLAGS]).encode(), _processor().encode()]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]
    path = folder / f"attend-{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as workplace:
        made = Path(workplace) / "attend.so"
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-400:]}")
        made.replace(path)  # another process may have been as far: the same library
    return path


def _processor() -> str:
    """What machine code may use: a folder of several machines may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *dict.fromkeys(kept)])


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch does: a compiler's mistake must not become a wrong answer."""
    random = torch.Generator().manual_seed(0)
    counts, tail, room, n_queries, width = (70, 0, 133), 1, 3, 3, 64
    entries = sum(counts) + len(counts) * room
    for dtype in _DTYPES:
        queries, keys, values = (
            torch.randn(*shape, generator=random).to(dtype)
            for shape in ((len(counts), n_queries, width), (entries, width), (entries, width))
        )
        found = torch.empty_like(queries)
        pointers = [x.data_ptr() for x in (queries, keys, values, found)]
        sizes = (_lengths(counts), len(counts), tail, room, n_queries, width)
        if library.sparsekv_attend(*pointers, *sizes, 0.2, dtype == torch.bfloat16, 2):
            return False
        parts = [x.float().split([count + room for count in counts]) for x in (keys, values)]
        for i, (own_keys, own_values) in enumerate(zip(*parts, strict=True)):
            stored = slice(counts[i] + tail)
            query = queries[i, None].float()
            wanted = nn.functional.scaled_dot_product_attention(
                query, own_keys[None, stored], own_values[None, stored], scale=0.2
            )[0]
            if not torch.allclose(found[i].float(), wanted, atol=1e-5 if dtype == torch.float32 else 2e-2):
                return False
    return True
