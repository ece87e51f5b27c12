"""Attention of one new token over what layers store: the compiled kernel beside torch's attention, and the floor.

    python benchmarks/decode_attention.py
    python benchmarks/decode_attention.py --heads 8 --head-dim 128 --group 4 --dtype bfloat16

Layers of the same number of entries, evenly and unevenly divided among the kv heads, are read one after the other, so
that they come from memory as they do while a model decodes. Beside the median time per layer stands the rate at which
keys and values were read; the floor is the time in which torch finds the greatest number of the same bytes, which reads
each of them once and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from machine import describe
from torch import Tensor

from sparsekv.cache import kernel
from sparsekv.cache.attend import attend_stored
from sparsekv.cache.layer import SparseLayer


def layer_of(counts: list[int], width: int, dtype: torch.dtype) -> SparseLayer:
    """A layer of one row whose kv heads store so many of the entries that it has seen."""
    layer, seen = SparseLayer(), max(counts) + 1
    layer.update(*torch.randn(2, 1, len(counts), seen, width).to(dtype))
    layer.keep(torch.arange(seen) < torch.tensor(counts)[None, :, None])
    # a new token, as while decoding: from here on there is room between the heads
    layer.update(*torch.randn(2, 1, len(counts), 1, width).to(dtype))
    return layer


def measure(counts: list[int], width: int, group: int, dtype: torch.dtype, layers: int, rounds: int) -> None:
    """One line per way of reading layers of these counts; they take turns."""
    every = [layer_of(counts, width, dtype) for _ in range(layers)]
    query = torch.randn(1, group * len(counts), 1, width).to(dtype)
    n_bytes = 2 * (sum(counts) + len(counts)) * width * dtype.itemsize
    stores: list[tuple[Tensor, Tensor]] = [(layer.store.keys, layer.store.values) for layer in every]

    def attend(i: int) -> object:
        return attend_stored(every[i], query, None, None)

    def by_torch(i: int) -> object:
        with patch.object(kernel, "attend", lambda *given: None):
            return attend(i)

    def floor(i: int) -> object:
        return [x.view(torch.int32).amax() for x in stores[i]]

    ways: dict[str, Callable[[int], object]] = {"floor": floor, "torch's attention": by_torch}
    if kernel.is_on():
        ways["compiled kernel"] = attend
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                for i in range(layers):
                    way(i)
                if turn:  # the first is to warm up
                    seconds[name].append((time.perf_counter() - started) / layers)
    print(f"\nheads of {', '.join(map(str, counts))} entries: {n_bytes / 2**20:.2f} MiB a layer")
    medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    for name, ms in medians.items():
        print(f"  {name:18s} {ms:7.3f} ms  {n_bytes / ms / 1e6:6.2f} GB/s  x {ms / medians['floor']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1024, help="per kv head in the mean")
    parser.add_argument("--heads", type=int, default=3, help="kv heads; default: SmolLM2-135M")
    parser.add_argument("--group", type=int, default=3, help="query heads of a kv head")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    print(describe())
    torch.manual_seed(0)
    total, heads = args.entries * args.heads, args.heads
    steep = [max(1, total * 2 * (i + 1) // (heads * (heads + 1))) for i in range(heads)]
    one_long = [max(1, total // 32)] * (heads - 1)
    for counts in ([args.entries] * heads, steep, [*one_long, total - sum(one_long)]):
        measure(counts, args.head_dim, args.group, getattr(torch, args.dtype), args.layers, args.rounds)


if __name__ == "__main__":
    main()
