"""Does the threshold reach its target? Achieved compression of many contexts, and while thousands of tokens follow.

    python benchmarks/controller.py --adapter adapters/smollm2-135m-relevance

Contexts are consecutive pieces of a text. After the prefill of each, under `atskv`, the achieved compression stands
beside the target. Then the first few go on together as one batch, token by token, with the text that follows them (real
text, so that scores are what they would be), and after every step what is stored is compared with what the target
allows: achieved compression at the end, and by how much the limit was passed at worst, in tokens per head.
"""

from __future__ import annotations

import argparse
import time

import torch
from loading import book_ids, with_predictors
from machine import describe

from sparsekv import compress, load_model, prepare
from sparsekv.cli.quiet import quieten
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", help="folder with relevance predictors (default: fresh ones)")
    parser.add_argument("--book", default="book_eval", help="a packaged text, or a .txt file")
    parser.add_argument("--contexts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024, help="of a context")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--decode-ratio", type=float, default=0.8)
    parser.add_argument("--decoded", type=int, default=2000, help="tokens after the context")
    parser.add_argument("--streams", type=int, default=3, help="contexts that are decoded on from")
    parser.add_argument("--every", type=int, default=64)
    args = parser.parse_args()
    quieten()
    print(describe())
    model, tokenizer = load_model(args.model, adapter=args.adapter)
    prepare(with_predictors(model))
    ids = book_ids(tokenizer, args.book)[0]
    stride = (len(ids) - args.tokens - args.decoded) // max(1, args.contexts - 1)
    if stride < 1:
        raise SystemExit(f"the text has only {len(ids)} tokens")
    starts = [stride * place for place in range(args.contexts)]
    for ratio in args.ratios:
        errors = []
        for start in starts:
            context = ids[None, start : start + args.tokens]
            cache = compress(
                model, context, make_policy("atskv"), Budget(compression_ratio=ratio), tokenizer=tokenizer
            )
            errors.append(cache.achieved_compression[0] - ratio)
        worst = max(errors, key=abs)
        print(
            f"prefill, target {ratio}: {len(starts)} contexts of {args.tokens} tokens, worst miss {worst:+.4f}"
        )
    streams = torch.stack(
        [ids[start : start + args.tokens + args.decoded] for start in starts[: args.streams]]
    )
    cache = compress(
        model,
        streams[:, : args.tokens],
        make_policy("atskv"),
        Budget(compression_ratio=args.decode_ratio),
        phase="both",
        every=args.every,
        tokenizer=tokenizer,
    )
    budget = Budget(compression_ratio=args.decode_ratio)
    over, misses, began = float("-inf"), [], time.perf_counter()
    for place in range(args.tokens, streams.shape[1]):
        with torch.no_grad():
            model(input_ids=streams[:, place : place + 1], past_key_values=cache, logits_to_keep=1)
        stored = cache.stored_counts().float().mean(dim=(0, 2))  # per row, entries per head
        over = max(over, float(stored.max()) - budget.n_kept(place + 1))
        misses.append(max(abs(1 - float(x) / (place + 1) - args.decode_ratio) for x in stored))
    seconds = (time.perf_counter() - began) / max(1, args.decoded)
    achieved = ", ".join(f"{x:.4f}" for x in cache.achieved_compression)
    print(
        f"decoding, target {args.decode_ratio}: {args.streams} contexts, {args.decoded} tokens each, achieved in the "
        f"end {achieved}; worst miss after any step {max(misses):.4f}; over the limit after a step at most "
        f"{over:+.2f} entries per head; {1e3 * seconds:.0f} ms per step"
    )


if __name__ == "__main__":
    main()
