"""Endless decoding in bounded memory: 20,000 tokens of a book, one at a time, with 1024 slots.

    python benchmarks/streaming.py --log streaming.csv

Every token of the book is fed as if it had just been generated (the text is real and its perplexity can be measured);
sink_recent evicts while decoding, kept keys are re-rotated. Prints the cache's bytes and the median time per token for
each thousand, and the perplexity of tokens 12k-20k against 2k-8k.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from machine import describe

from sparsekv import compress, load_model, prepare
from sparsekv.benchmarks.data import haystack_text
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--slots", type=int, default=1024, help="most entries ever held per head")
    parser.add_argument("--every", type=int, default=64, help="evict once per that many tokens")
    parser.add_argument("--no-rerotate", action="store_true")
    parser.add_argument("--log", type=Path, help="write token, seconds, nll, bytes as CSV")
    args = parser.parse_args()
    print(describe())
    model, tokenizer = load_model(args.model)
    prepare(model)
    text = haystack_text("book_train")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[
        :, : args.tokens + 1
    ]
    if ids.shape[1] <= args.tokens:
        raise SystemExit(f"the book has only {ids.shape[1]} tokens")
    cache = compress(
        model,
        ids[:, :1],
        make_policy("sink_recent"),
        Budget(tokens=args.slots - args.every),
        phase="decode",
        every=args.every,
        rerotate=not args.no_rerotate,
    )
    seconds, losses, sizes = [], [], []
    largest = 0
    with torch.no_grad():
        for step in range(1, args.tokens):
            begin = time.perf_counter()
            logits = model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits
            seconds.append(time.perf_counter() - begin)
            losses.append(float(torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, step + 1])))
            sizes.append(cache.nbytes)
            largest = max(largest, int(cache.layers[0].stored().max()))
            if step % 1000 == 0:
                last = slice(-1000, None)
                print(
                    f"token {step:6d}: median {statistics.median(seconds[last]) * 1e3:.1f} ms, "
                    f"perplexity {math.exp(statistics.fmean(losses[last])):.2f}, "
                    f"cache at most {max(sizes[last]) / 2**20:.2f} MiB",
                    flush=True,
                )
    if args.log:
        rows = (
            f"{i},{s:.6f},{n:.5f},{b}"
            for i, (s, n, b) in enumerate(zip(seconds, losses, sizes, strict=True), 1)
        )
        args.log.write_text("token,seconds,nll,bytes\n" + "\n".join(rows) + "\n")
    print(f"most entries held per head: {largest} (slots {args.slots})")
    if args.tokens >= 3000:
        ratio = statistics.median(seconds[-1000:]) / statistics.median(seconds[1000:2000])
        growth = max(sizes[-1000:]) / max(sizes[1000:2000])
        print(f"last thousand / second thousand: time {ratio:.3f}, bytes {growth:.4f}")
    if args.tokens >= 20_000:
        early, late = (math.exp(statistics.fmean(losses[a:b])) for a, b in ((2000, 8000), (12_000, 20_000)))
        print(f"perplexity 2k-8k {early:.2f}, 12k-20k {late:.2f}, ratio {late / early:.3f}")


if __name__ == "__main__":
    main()
