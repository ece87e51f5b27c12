"""What learned relevance costs: at the prefill, and per token of decoding from the ragged cache that it leaves.

    python benchmarks/relevance_cost.py                                   # both; fresh predictors, time does not ask
    python benchmarks/relevance_cost.py --adapter output/relevance_regression/final --measure decode

Prefill: Hugging Face's own, of a model that sparsekv never touched, against `compress` of the same tokens: reading,
scoring, selection and compaction together; KVzip, which reads the context again to score it, stands beside. Decoding:
one token at a time at the ratio given, against Hugging Face's own cache that holds as many entries as are kept per head
in the mean, full attention; kvpress's head-wise eviction, which masks what it evicts and keeps the bytes, beside it.
In every round each variant runs once, in an order that rotates; a ratio is the median over rounds of (variant /
reference of the same round), and beside it stands the ratio of the fastest rounds, which another process disturbs less.
What `compress` does after each layer (scoring, selection, compaction) is timed by itself, too, as a share of the rest
of the same prefill, since two whole prefills differ by some percent from round to round; it leaves out what `compress`
costs without eviction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvpress import AdaKVPress, SnapKVPress
from loading import book_ids, with_predictors
from machine import describe
from transformers import DynamicCache

from sparsekv import compress, generation, load_model, prepare, probe
from sparsekv.cli.quiet import quieten
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget

REFERENCE = "plain"
KEPT = "plain cache of the kept length"
PREFILL_LIMIT, DECODE_LIMIT = 1.03, 1.10
KVZIP = "kvpress's KVzip"
MASKED = "kvpress's AdaKV over SnapKV, masked"
LIMITED = ("sink_recent", "snapkv", "atskv, ragged", "adakv_snapkv, ragged")
"""What the decode limit is for."""


class AfterLayers:
    """Seconds that `compress` spends in what it does after each layer: scoring, selection and compaction."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count while `compress` runs in this context."""

        @contextmanager
        def after_each_layer(model: Any, callback: Callable[..., None]) -> Iterator[None]:
            def timed(*args: Any) -> None:
                started = time.perf_counter()
                callback(*args)
                self.seconds += time.perf_counter() - started

            with probe.after_each_layer(model, timed):
                yield

        theirs = generation.after_each_layer
        generation.after_each_layer = after_each_layer
        try:
            yield
        finally:
            generation.after_each_layer = theirs


def side_by_side(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(-1, rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            started = time.perf_counter()
            variants[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(title: str, seconds: dict[str, list[float]], reference: str, limits: dict[str, float]) -> None:
    """One line per variant: median time, ratio to the reference of the same round, limit."""
    print(f"\n{title}")
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds[reference], strict=True))
        fastest = min(each) / min(seconds[reference])
        limit = f"  limit {limits[name]:.2f}" if name in limits else ""
        times = f"{1e3 * statistics.median(each):9.1f} ms, fastest {1e3 * min(each):9.1f} ms"
        print(f"  {name:34s} {times}   x {ratio:.3f}, fastest x {fastest:.3f}{limit}")


def plain_prefill(model: Any, ids: torch.Tensor) -> DynamicCache:
    """Hugging Face's own, without logits of the context."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def measure_prefill(
    untouched: Any, model: Any, tokenizer: Any, ids: torch.Tensor, ratio: float, rounds: int
) -> None:
    """Reading a context, with and without eviction."""
    budget = Budget(compression_ratio=ratio, scope="model")
    variants: dict[str, Callable[[], Any]] = {REFERENCE: lambda: plain_prefill(untouched, ids)}
    shares: dict[str, list[float]] = {}

    def read(name: str, given: Budget) -> None:
        after = AfterLayers()
        started = time.perf_counter()
        with after.watch():
            compress(model, ids, make_policy(name), given, tokenizer=tokenizer)
        whole = time.perf_counter() - started
        if not after.seconds:
            raise RuntimeError(f"{name}: nothing was timed after a layer; compress takes another way")
        shares.setdefault(name, []).append(after.seconds / (whole - after.seconds))

    for name in ("full", "sink_recent", "snapkv", "atskv", "relevance"):
        given = budget if name in ("atskv", "relevance") else Budget(compression_ratio=ratio)
        given = Budget() if name == "full" else given
        variants[name] = lambda name=name, given=given: read(name, given)
    kvzip: Any = make_policy("kvzip")
    variants[KVZIP] = lambda: kvzip.keep_model(untouched, ids, Budget(compression_ratio=ratio), tokenizer)
    seconds = side_by_side(variants, rounds)
    limits = dict.fromkeys(("atskv", "relevance"), PREFILL_LIMIT)
    show(f"prefill of {ids.shape[1]} tokens, ratio {ratio}", seconds, REFERENCE, limits)
    for name, each in shares.items():  # the round that warms up is not counted
        limit = f"  limit {PREFILL_LIMIT - 1:.3f}" if name in limits else ""
        print(
            f"  {name}: scoring, selection, compaction / the rest: {statistics.median(each[1:]):.4f}{limit}"
        )
    extra = {
        name: statistics.median(each) - statistics.median(seconds[REFERENCE])
        for name, each in seconds.items()
    }
    for name in limits:
        both = zip(seconds[name], seconds["full"], strict=True)
        print(f"  {name} over compress without eviction: x {statistics.median(a / b for a, b in both):.3f}")
    print(f"  extra cost of atskv / extra cost of kvzip: {extra['atskv'] / extra[KVZIP]:.4f}  limit 0.1")


def measure_decode(
    untouched: Any, model: Any, tokenizer: Any, ids: torch.Tensor, ratio: float, rounds: int, steps: int
) -> None:
    """One token after the other from caches that stay as they are between rounds (cropped back)."""
    kept = Budget(compression_ratio=ratio).n_kept(ids.shape[1])
    caches: dict[str, tuple[Any, Any]] = {
        KEPT: (untouched, plain_prefill(untouched, ids[:, :kept])),
        "plain cache, nothing evicted": (untouched, plain_prefill(untouched, ids)),
    }
    for name, method, scope in (
        ("sink_recent", "sink_recent", "head"),
        ("snapkv", "snapkv", "head"),
        ("atskv, ragged", "atskv", "model"),
        ("adakv_snapkv, ragged", "adakv_snapkv", "head"),
    ):
        cache = compress(
            model,
            ids,
            make_policy(method),
            Budget(compression_ratio=ratio, scope=scope),  # type: ignore[arg-type]
            tokenizer=tokenizer,
        )
        caches[name] = model, cache
        counts = cache.stored_counts()
        print(f"  {name}: {counts.float().mean():.0f} entries per head, {counts.min()} to {counts.max()}")
    with AdaKVPress(SnapKVPress(ratio))(untouched):
        masked = plain_prefill(untouched, ids)
    masks = [layer.self_attn.masked_key_indices for layer in untouched.model.layers]
    token = ids[:, :1]

    def run(name: str) -> None:
        used, cache = caches[name]
        hidden = name == MASKED
        for layer, mask in zip(untouched.model.layers, masks, strict=True):
            layer.self_attn.masked_key_indices = mask if hidden else None
        before = cache.get_seq_length()
        with torch.no_grad():
            for place in range(steps):
                used(
                    input_ids=token,
                    past_key_values=cache,
                    position_ids=torch.tensor([[ids.shape[1] + place]]),
                    use_cache=True,
                )
        cache.crop(before)

    caches[MASKED] = untouched, masked
    seconds = side_by_side({name: lambda name=name: run(name) for name in caches}, rounds)
    per_token = {name: [each / steps for each in times] for name, times in seconds.items()}
    limits = dict.fromkeys(LIMITED, DECODE_LIMIT)
    show(f"decoding after {ids.shape[1]} tokens, ratio {ratio}, per token", per_token, KEPT, limits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", help="folder with relevance predictors (default: fresh linear ones)")
    parser.add_argument("--measure", choices=["prefill", "decode", "both"], default="both")
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="tokens that a variant decodes in one round")
    args = parser.parse_args()
    quieten()
    print(describe())
    untouched, tokenizer = load_model(args.model)
    model, _ = load_model(args.model, adapter=args.adapter)
    prepare(with_predictors(model))
    ids = book_ids(tokenizer, "book_eval")
    if args.measure != "decode":
        measure_prefill(untouched, model, tokenizer, ids[:, : args.prefill_tokens], args.ratio, args.rounds)
    if args.measure != "prefill":
        context = ids[:, : args.decode_tokens]
        measure_decode(untouched, model, tokenizer, context, args.ratio, args.rounds, args.steps)


if __name__ == "__main__":
    main()
