"""How fast do entries move between the tiers? Rates of the passive stores against plain memcpy of the same bytes.

    python benchmarks/tiers.py

For every layer of a context, keys and values of all kv heads are checked (a TieredCache moves nothing that is NaN or
infinite), put into a store as one batch, read (peek), bounded by their page summaries, and taken out again: named by
columns, and by pages. Beside each put the same bytes are copied plainly: into memory that was there before ("warm": the
fastest, which nothing that keeps or returns entries can be), into new memory that stays, as a memory store's does, into
memory that is given back at once and so handed out again, as what a caller reads is, and, for the disk store, into a
newly made mapped file and out of it. Printed are medians over all layers and rounds, their ratios to the warm memcpy
and, for the memory store, to the memcpy that does the same.
The disk store's figures contain its checksums; its files are looked at again 0.1 s after the puts, because a file that
has just been written to is checked at every read. A model of 8 billion parameters:

    python benchmarks/tiers.py --heads 8 --head-dim 128 --layers 8 --tokens 4096 16384

What a second tier costs per token, with SmolLM2-135M and contexts of so many tokens: tokens of a text are read one by
one, in turn by a TieredCache and a SparseCache that hold as many entries:

    python benchmarks/tiers.py --decode 1024 4096
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading import book_ids
from machine import describe

from sparsekv import TieredCache, compress, load_model
from sparsekv.cache.disk import DiskStore
from sparsekv.cache.memory import MemoryStore
from sparsekv.cache.passive import PassiveStore
from sparsekv.cache.tiers import all_finite

WARM = "memcpy, warm"
STAYS, RETURNED = "memcpy, new memory that stays", "memcpy, memory given back"

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Rates:
    """Seconds by name; printed as GB/s, as a ratio to the warm memcpy, and to the memcpy that does the same, if any."""

    def __init__(self, n_bytes: int, *, in_files: bool) -> None:
        self.n_bytes = n_bytes
        # files have none: a store keeps its mapping and writes without one
        self.alike = {} if in_files else {"put": STAYS, "peek": RETURNED, "take": RETURNED}
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.seconds[name].append(time.perf_counter() - started)
        return result

    def show(self, title: str) -> None:
        print(f"\n{title}, {self.n_bytes / 2**20:.2f} MiB per layer")
        medians = {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
        for name, median in medians.items():
            like = self.alike.get(name.partition(" ")[0])
            same = f"  x {medians[like] / median:.2f} of {like}" if like else ""
            rate = f"{self.n_bytes / median / 1e9:6.2f} GB/s  x {medians[WARM] / median:.2f}"
            print(f"  {name:34s} {1e3 * median:8.3f} ms  {rate}{same}")


def ragged(rows: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> Batch:
    """One layer's entries: each kv head offloads between half and all of its tokens."""
    counts = torch.randint(tokens // 2, tokens + 1, (rows, heads))
    columns = torch.cat([torch.randperm(tokens)[:n].sort().values for n in counts.flatten().tolist()])
    keys, values = torch.randn(2, len(columns), width).to(dtype)
    return counts, columns, keys, values


def pages_in_random_order(batch: Batch, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The request for all whole pages of a layer, drawn anew: what a recall by page scores asks for."""
    counts, columns, _, _ = batch
    parts, sizes = [], []
    for part in columns.split(counts.flatten().tolist()):
        whole = part[: len(part) // page * page].view(-1, page)
        parts.append(whole[torch.randperm(len(whole))].flatten())
        sizes.append(len(parts[-1]))
    return torch.tensor(sizes).view(counts.shape), torch.cat(parts)


def plain_copies(
    rates: Rates, batch: Batch, warm: list[torch.Tensor], folder: Path | None
) -> list[torch.Tensor]:
    """The same bytes, copied by nothing but memcpy; what is returned is the copy that stays."""
    source = batch[2:]
    rates.time(WARM, lambda: [to[: len(x)].copy_(x) for to, x in zip(warm, source, strict=True)])
    staying: list[torch.Tensor] = rates.time(STAYS, lambda: [x.clone() for x in source])
    if folder is None:
        return staying
    path, size = folder / "plain", sum(x.nbytes for x in source)

    def into_file() -> None:
        with open(path, "w+b") as file:
            file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
            raw = torch.frombuffer(mapped, dtype=torch.uint8)
            start = 0
            for x in source:
                raw[start : start + x.nbytes].copy_(x.view(torch.uint8).flatten())
                start += x.nbytes

    def out_of_file() -> None:
        with open(path, "r+b") as file:
            raw = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        start = 0
        for x, to in zip(source, warm, strict=True):
            to[: len(x)].view(torch.uint8).view(-1).copy_(raw[start : start + x.nbytes])
            start += x.nbytes

    rates.time("memcpy, into a new mapped file", into_file)
    rates.time("memcpy, out of a newly mapped file", out_of_file)
    path.unlink()
    return staying


def measure(name: str, store: PassiveStore, batches: list[Batch], rounds: int, folder: Path | None) -> None:
    n_bytes = sum(2 * batch[2].nbytes for batch in batches) // len(batches)
    width, dtype = batches[0][2].shape[1], batches[0][2].dtype
    longest = max(len(batch[1]) for batch in batches)
    warm = [torch.zeros(longest, width, dtype=dtype) for _ in range(2)]
    rates = Rates(n_bytes, in_files=folder is not None)
    heads = tuple(batches[0][0].shape)
    for turn in range(rounds):
        staying = []
        for layer, batch in enumerate(batches):
            copy = plain_copies(rates, batch, warm, folder)
            if folder is None:
                staying.append(copy)
            rates.time("check before a put", lambda batch=batch: [all_finite(x) for x in batch[2:]])
            rates.time("put", lambda layer=layer, batch=batch: store.put_layer(layer, *batch))
        if turn == 0:
            entries = sum(len(batch[1]) for batch in batches)
            print(
                f"\n{name}: {entries} entries take {store.memory_bytes / entries:.1f} bytes each in memory and "
                f"{store.disk_bytes / entries:.1f} on disk; keys and values are {n_bytes * len(batches) / entries:.1f}"
            )
        if folder is not None:
            time.sleep(0.1)
        for layer, batch in enumerate(batches):
            at = (layer, *batch[:2])
            rates.time(RETURNED, lambda batch=batch: [x.clone() for x in batch[2:]])
            pages = (layer, *pages_in_random_order(batch, store.page_size))
            query = (layer, torch.randn(*heads, 3, width))
            rates.time("peek by columns", lambda at=at: store.peek_layer(*at))
            rates.time("peek by columns, again", lambda at=at: store.peek_layer(*at))
            rates.time("peek by columns, pages shuffled", lambda pages=pages: store.peek_layer(*pages))
            rates.time("bounds, summaries made", lambda query=query: store.bounds_layer(*query))
            bounds = rates.time("bounds, summaries known", lambda query=query: store.bounds_layer(*query))
            every = (layer, bounds.sizes > 0)
            rates.time("peek by pages", lambda every=every: store.peek_pages(*every))
            if turn % 2:
                rates.time("take by pages", lambda every=every: store.take_pages(*every))
            else:
                rates.time("take by columns", lambda at=at: store.take_layer(*at))
        staying.clear()
    rates.show(name)
    store.close()


def decoding(context: int, active: int, tokens: int) -> None:
    """Seconds per token with and without a second tier; apart the first 8 tokens, at which every layer looks."""
    model, tokenizer = load_model("smollm2")
    ids = book_ids(tokenizer, "book_eval")
    caches = {
        "TieredCache": compress(
            model, ids[:, :context], "snapkv", 1 - active / context, cache=TieredCache(model, active)
        ),
        "SparseCache": compress(model, ids[:, :context], "snapkv", 1 - active / context),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for at in range(context, context + tokens):
            for name, cache in caches.items():
                started = time.perf_counter()
                model(input_ids=ids[:, at : at + 1], past_key_values=cache)
                seconds[name].append(time.perf_counter() - started)
    print(f"\n{context} tokens of context, {active} active, {tokens} tokens one by one")
    for part, name in ((slice(8), "first 8"), (slice(8, None), "then")):
        both = [seconds[cache][part] for cache in caches]
        means, medians = ([1e3 * f(x) for x in both] for f in (statistics.mean, statistics.median))
        print(
            f"  {name:8s} mean {means[0]:7.1f} ms against {means[1]:7.1f} ms  x {means[0] / means[1]:.2f}   "
            f"median {medians[0]:7.1f} ms against {medians[1]:7.1f} ms  x {medians[0] / medians[1]:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30, help="default: SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where the disk store lies (default: a temporary folder)")
    parser.add_argument("--decode", type=int, nargs="+", help="contexts; measure tokens, not stores")
    parser.add_argument("--active", type=int, default=256, help="active size for --decode")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens for --decode")
    args = parser.parse_args()
    print(describe())
    torch.manual_seed(0)
    if args.decode:
        for context in args.decode:
            decoding(context, args.active, args.new_tokens)
        return
    for tokens in args.tokens:
        dtype = getattr(torch, args.dtype)
        batches = [ragged(args.rows, args.heads, tokens, args.head_dim, dtype) for _ in range(args.layers)]
        title = (
            f"{tokens} tokens, {args.layers} layers, {args.heads} kv heads x {args.head_dim}, {args.dtype}"
        )
        measure(f"memory store, {title}", MemoryStore(args.page_size), batches, args.rounds, None)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = DiskStore(Path(folder) / "passive", page_size=args.page_size)
            measure(f"disk store, {title}", store, batches, args.rounds, Path(folder))


if __name__ == "__main__":
    main()
