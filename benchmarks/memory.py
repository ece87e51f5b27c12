"""Is the memory really freed? Bytes of a compacted cache against the ideal, and live tensor storages before and after.

    python benchmarks/memory.py

Prints, on SmolLM2 in bf16 with 4096 tokens at ratio 0.75: `cache.nbytes` (metadata included) over the bytes of the kept
keys and values alone, for a uniform and for a head-wise (ragged) method; the fall of the sum of distinct live tensor
storages over the bytes that should have been freed; and the peak of a 20,000-token text read in chunks.
"""

from __future__ import annotations

import argparse
import gc

import torch
from loading import book_ids
from machine import describe

from sparsekv import architecture, compress, load_model, prepare
from sparsekv.cache.sparse import SparseCache
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.probe import run_decoder


def live_bytes() -> int:
    """Sum of the distinct storages of all live tensors."""
    gc.collect()
    storages = {}
    for obj in gc.get_objects():
        if isinstance(obj, torch.Tensor) and obj.device.type != "meta":
            storage = obj.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def ideal_bytes(cache: SparseCache) -> int:
    """Keys and values of the stored entries, nothing else."""
    config = cache.config
    item = cache.layers[cache.compressible[0]].store.keys.element_size()  # type: ignore[attr-defined]
    return int(cache.stored_counts().sum()) * 2 * architecture.head_dim(config) * item


def freed(model, tokenizer, ids: torch.Tensor, method: str, ratio: float) -> None:
    """Compact a whole cache and compare."""
    with torch.no_grad():
        cache = SparseCache(model.config)
        run_decoder(model, ids, cache, None)
    before, whole = live_bytes(), cache.nbytes
    small = compress(model, ids, make_policy(method), Budget(compression_ratio=ratio), tokenizer=tokenizer)
    selection = small.selection()
    del small
    cache.apply(selection)
    del selection
    after = live_bytes()
    should = whole - ideal_bytes(cache)
    print(
        f"{method:16s} ratio {ratio}: achieved {cache.achieved_compression[0]:.4f}, "
        f"{whole / 2**20:.1f} MiB -> {cache.nbytes / 2**20:.1f} MiB; "
        f"nbytes / ideal = {cache.nbytes / ideal_bytes(cache):.4f}; "
        f"live storages fell by {(before - after) / should:.4f} of the bytes to free"
    )


def chunked(model, ids: torch.Tensor, slots: int, chunk: int) -> None:
    """Read a long text in chunks; count entries and bytes at every forward."""
    peak = {"entries": 0, "bytes": 0}

    def watch(module, args, kwargs, output) -> None:
        cache = kwargs[
            "past_key_values"
        ]  # registered before compress's own hook: it sees the layer before eviction
        layer = cache.layers[module.layer_idx]
        peak["entries"] = max(peak["entries"], int(layer.stored().max()))
        peak["bytes"] = max(peak["bytes"], cache.nbytes)

    handles = [
        module.register_forward_hook(watch, with_kwargs=True)
        for module in architecture.attention_modules(model)
    ]
    cache = compress(model, ids, make_policy("sink_recent"), Budget(tokens=slots), chunk=chunk, rerotate=True)
    for handle in handles:
        handle.remove()
    one = ideal_bytes(cache) / int(cache.stored_counts().max())
    print(
        f"chunked sink_recent over {ids.shape[1]} tokens, {slots} slots, chunk {chunk}: before a layer's eviction "
        f"at most {peak['entries']} entries per head; cache peak {peak['bytes'] / 2**20:.1f} MiB = "
        f"{peak['bytes'] / one:.0f} entries' worth (slots + chunk = {slots + chunk}); "
        f"a full cache would take {ids.shape[1] * one / 2**20:.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--long", type=int, default=20_000)
    parser.add_argument("--methods", nargs="+", default=["sink_recent", "snapkv", "adakv_snapkv"])
    args = parser.parse_args()
    print(describe())
    model, tokenizer = load_model(args.model)
    prepare(model)
    ids = book_ids(tokenizer, "book_train")
    for method in args.methods:
        freed(model, tokenizer, ids[:, : args.tokens], method, args.ratio)
    chunked(model, ids[:, : args.long], 1024, 512)


if __name__ == "__main__":
    main()
