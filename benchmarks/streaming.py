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
from loading import book_ids
from machine import describe

from sparsekv import compress, load_model, prepare
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
    parser.add_argument(
        "--quick", action="store_true", help="time the first 2048 and the last 1000 tokens only"
    )
    parser.add_argument("--book", default="book_train", help="a packaged text, or a .txt file")
    parser.add_argument("--log", type=Path, help="write token, seconds, nll, bytes as CSV")
    args = parser.parse_args()
    print(describe())
    model, tokenizer = load_model(args.model)
    prepare(model)
    ids = book_ids(tokenizer, args.book)[:, : args.tokens + 1]
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
    seconds: dict[int, float] = {}  # of tokens fed one at a time
    losses, sizes = [], []
    largest = done = 0
    # With --quick the middle is fed `every` tokens at a time, which evicts at the same tokens as one at a time.
    middle = range(2048 // args.every * args.every, (args.tokens - 1001) // args.every * args.every)
    with torch.no_grad():
        while done < args.tokens - 1:
            size = args.every if args.quick and done in middle else 1
            new = ids[:, done + 1 : done + 1 + size]
            begin = time.perf_counter()
            logits = model(input_ids=new, past_key_values=cache).logits[0]
            if size == 1:
                seconds[done] = time.perf_counter() - begin
            target = ids[0, done + 2 : done + 2 + size]
            losses += torch.nn.functional.cross_entropy(logits.float(), target, reduction="none").tolist()
            sizes += [cache.nbytes] * size
            largest = max(largest, int(cache.layers[0].stored().max()))
            done += size
            if done // 1000 > (done - size) // 1000:
                timed = [seconds[i] for i in range(done - 1000, done) if i in seconds]
                pace = f"median {statistics.median(timed) * 1e3:.1f} ms" if timed else "not timed"
                perplexity = math.exp(statistics.fmean(losses[-1000:]))
                peak = max(sizes[-1000:]) / 2**20
                print(
                    f"token {done:6d}: {pace}, perplexity {perplexity:.2f}, cache at most {peak:.2f} MiB",
                    flush=True,
                )
    if args.log:
        rows = (
            f"{i},{seconds.get(i, '')},{n:.5f},{b}"
            for i, (n, b) in enumerate(zip(losses, sizes, strict=True))
        )
        args.log.write_text("token,seconds,nll,bytes\n" + "\n".join(rows) + "\n")
    print(f"most entries held per head after an eviction step: {largest} (slots {args.slots})")
    if args.tokens >= 3000:
        late = [seconds[i] for i in range(done - 1000, done)]
        early = [seconds[i] for i in range(1000, 2000)]
        ratio = statistics.median(late) / statistics.median(early)
        growth = max(sizes[-1000:]) / max(sizes[1000:2000])
        print(f"last thousand / second thousand: time {ratio:.3f}, bytes {growth:.4f}")
    if args.tokens >= 20_000:
        first, last = (math.exp(statistics.fmean(losses[a:b])) for a, b in ((2000, 8000), (12_000, 20_000)))
        print(f"perplexity 2k-8k {first:.2f}, 12k-20k {last:.2f}, ratio {last / first:.3f}")


if __name__ == "__main__":
    main()
