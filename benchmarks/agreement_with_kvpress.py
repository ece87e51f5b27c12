"""Do we keep exactly what kvpress keeps, and answer exactly what it answers? SmolLM2 in fp32.

    python benchmarks/agreement_with_kvpress.py

Per row and method: kvpress's own hooks compress a DynamicCache and its pipeline answers from it; ours shares one
prefill for all methods. Kept sets are compared index by index (kvpress's are recovered from the key rows in its cache,
or from what it masks); where answers differ, the gap between the two best logits at the first differing token is
printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import kvpress
import torch
from kvpress.pipeline import KVPressTextGenerationPipeline
from machine import describe
from torch import Tensor
from transformers import DynamicCache

from sparsekv import architecture, load_model, prepare
from sparsekv.benchmarks import BENCHMARKS
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.evaluation.answers import end_ids
from sparsekv.evaluation.prompts import assemble
from sparsekv.generation import greedy_decode
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.probe import Request, prefill

METHODS: dict[str, Callable[[float], kvpress.BasePress]] = {
    "snapkv": lambda r: kvpress.SnapKVPress(compression_ratio=r),
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(compression_ratio=r),
    "knorm": lambda r: kvpress.KnormPress(compression_ratio=r),
    "expected_attention": lambda r: _adakv(kvpress.ExpectedAttentionPress(epsilon=1e-2), r),
    "expected_attention_plain": lambda r: kvpress.ExpectedAttentionPress(compression_ratio=r),
    "tova": lambda r: kvpress.TOVAPress(compression_ratio=r),
}
"""By the names of kvpress's evaluation registry, where `expected_attention` is AdaKV over it; and the plain scorer."""


def _adakv(press: kvpress.ScorerPress, ratio: float) -> kvpress.BasePress:
    wrapped = kvpress.AdaKVPress(press)
    wrapped.compression_ratio = ratio
    return wrapped


def kvpress_kept(model, cache: DynamicCache, whole: list[Tensor]) -> Tensor:
    """BoolTensor [L, H, T]: what kvpress left, by exact match of key rows and by what it masks."""
    kept = []
    for index, module in enumerate(architecture.attention_modules(model)):
        full, left = whole[index][0], cache.layers[index].keys[0]
        n_heads, length, _ = full.shape
        masked = getattr(module, "masked_key_indices", None)
        if masked is not None:
            mask = torch.ones(n_heads, length, dtype=torch.bool)
            mask[masked[1], masked[2]] = False
        else:
            mask = torch.zeros(n_heads, length, dtype=torch.bool)
            for head in range(n_heads):
                rows = {row.numpy().tobytes(): i for i, row in enumerate(full[head])}
                mask[head, [rows[row.numpy().tobytes()] for row in left[head]]] = True
        kept.append(mask)
    return torch.stack(kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=10, help="rows per task")
    parser.add_argument("--ratio", type=float, default=0.5)
    tasks = ["niah_single_1", "niah_single_2", "niah_multikey_1", "vt", "qa_1"]
    parser.add_argument("--tasks", nargs="+", default=tasks)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--max-new-tokens", type=int, help="shorter answers than the tasks allow, to save time"
    )
    args = parser.parse_args()
    print(describe())
    model, tokenizer = load_model(args.model, dtype="float32")
    prepare(model)
    spec = BenchmarkConfig(name="ruler", tasks=args.tasks, context_length=[1024], rows=args.rows)
    examples = BENCHMARKS.get("ruler").load(spec, tokenizer, 0)
    # Row 0 of every task first: a run that is stopped has still seen all tasks.
    examples = sorted(examples, key=lambda example: example.example_id.rsplit("/", 1)[-1])
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    policies = {name: make_policy(name) for name in args.methods}
    stop = end_ids(model)
    same_sets = dict.fromkeys(args.methods, 0)
    same_answers = dict.fromkeys(args.methods, 0)
    unexplained = 0
    for number, example in enumerate(examples, 1):
        prompt = assemble(example, tokenizer, max_new_tokens=args.max_new_tokens)
        requests = [Request(n, p, Budget(compression_ratio=args.ratio)) for n, p in policies.items()]
        read = prefill(model, prompt.context_ids, requests, tokenizer=tokenizer)
        whole = [layer.dense()[0] for _, layer in read.cache.sparse_layers()]
        ours = greedy_decode(
            model,
            read.cache.fork([read.selections[n] for n in args.methods]),
            prompt.question_ids,
            prompt.max_new_tokens,
            stop,
        )
        for name, answer in zip(args.methods, ours, strict=True):
            press, cache = METHODS[name](args.ratio), DynamicCache()
            with torch.no_grad():
                with press(model):
                    model.model(input_ids=prompt.context_ids, past_key_values=cache)
                theirs_kept = kvpress_kept(model, cache, whole)
                ours_kept = read.selections[name].kept_at(prompt.context_tokens)[0]
                same_sets[name] += bool(torch.equal(ours_kept.expand_as(theirs_kept), theirs_kept))
                text = pipeline.generate_answer(
                    prompt.question_ids, cache, prompt.context_tokens, prompt.max_new_tokens
                )
                for module in architecture.attention_modules(model):
                    module.masked_key_indices = None
            mine = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            if mine == text:
                same_answers[name] += 1
                continue
            gap = divergence_gap(model, tokenizer, read, name, prompt, answer.token_ids, text)
            unexplained += gap >= 1e-3
            print(
                f"{example.example_id} {name}: differs at a token whose top-2 logit gap is {gap:.2e}",
                flush=True,
            )
        if number % 5 == 0 or number == len(examples):
            print(f"{number} rows of {', '.join(args.tasks)} at 1024 tokens, ratio {args.ratio}, fp32")
            for name in args.methods:
                print(
                    f"  {name:26s} kept sets identical {same_sets[name]}/{number}, "
                    f"answers equal {same_answers[name]}/{number} = {same_answers[name] / number:.1%}"
                )
            print(f"  disagreements that do not start at a near tie (gap >= 1e-3): {unexplained}", flush=True)


def divergence_gap(model, tokenizer, read, name: str, prompt, token_ids: list[int], other: str) -> float:
    """Gap of our two best logits at the first token after which the texts differ."""
    shared = 0
    while shared < len(token_ids) and other.startswith(
        tokenizer.decode(token_ids[: shared + 1], skip_special_tokens=True)
    ):
        shared += 1
    shared = min(shared, len(token_ids) - 1)
    cache = read.cache.fork([read.selections[name]])
    forced = torch.tensor([token_ids[:shared]], dtype=torch.int64)
    with torch.no_grad():
        ids = torch.cat([prompt.question_ids, forced], dim=1)
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


if __name__ == "__main__":
    main()
