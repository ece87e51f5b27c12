"""How long does a sweep take, here and with kvpress's pipeline? Same rows, dtype, tasks, token limits and stop rule.

    python benchmarks/sweep_vs_kvpress.py

4 methods x 3 ratios on RULER tasks at 1024 tokens, SmolLM2. For every row: ours with all cells decoded as one batch,
ours one cell at a time, kvpress's pipeline once per cell; the order of the three rotates from row to row. Then where
our time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable

import kvpress
import torch
from kvpress.pipeline import KVPressTextGenerationPipeline
from machine import describe

from sparsekv import load_model, prepare
from sparsekv.architecture import max_context
from sparsekv.benchmarks import BENCHMARKS
from sparsekv.config import EvalConfig
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.cells import settings
from sparsekv.evaluation.prompts import Prompt, assemble

PRESSES: dict[str, Callable[[float], kvpress.BasePress]] = {
    "snapkv": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
    "knorm": lambda ratio: kvpress.KnormPress(compression_ratio=ratio),
    "tova": lambda ratio: kvpress.TOVAPress(compression_ratio=ratio),
    "keydiff": lambda ratio: kvpress.KeyDiffPress(compression_ratio=ratio),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=1, help="rows per task")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument(
        "--tasks", nargs="+", default=["niah_single_2", "niah_multikey_1", "vt", "fwe", "qa_1"]
    )
    args = parser.parse_args()
    print(describe())
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    prepare(model)
    config = EvalConfig(
        model=args.model,
        benchmarks=[{"name": "ruler", "tasks": args.tasks, "context_length": [1024], "rows": args.rows}],
        methods=list(PRESSES),
        compression_ratios=args.ratios,
        output_dir="unused",
    )
    cells = settings(config)
    examples = BENCHMARKS.get("ruler").load(config.benchmarks[0], tokenizer, 0)
    prompts = [assemble(example, tokenizer) for example in examples]
    longest = max_context(model)
    batched = Answerer(model, tokenizer, 0, longest, batch_cells=True)
    single = Answerer(model, tokenizer, 0, longest, batch_cells=False)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)

    def by_kvpress(prompt: Prompt) -> list[str]:
        inputs = {"context_ids": prompt.context_ids, "questions_ids": [prompt.question_ids]}
        answers = []
        with torch.no_grad():
            for cell in cells:
                press = PRESSES[cell.method](cell.compression_ratio or 0.0)
                answers += pipeline._forward(dict(inputs), max_new_tokens=prompt.max_new_tokens, press=press)
        return answers

    runs: dict[str, Callable[[Prompt], list[str]]] = {
        "batched": lambda p: [r.prediction for r in batched.answer(p, cells)],
        "one cell at a time": lambda p: [r.prediction for r in single.answer(p, cells)],
        "kvpress": by_kvpress,
    }
    runs["batched"](prompts[0])  # warm up kernels and caches; not timed
    seconds = dict.fromkeys(runs, 0.0)
    same = total = 0
    for turn, prompt in enumerate(prompts):
        answers = {}
        names = list(runs)
        for name in names[turn % 3 :] + names[: turn % 3]:
            begin = time.perf_counter()
            answers[name] = runs[name](prompt)
            seconds[name] += time.perf_counter() - begin
        same += sum(a == b for a, b in zip(answers["batched"], answers["kvpress"], strict=True))
        total += len(cells)
    print(
        f"{len(prompts)} rows of {', '.join(args.tasks)} at 1024 tokens; {len(cells)} cells each; {args.dtype}"
    )
    for name, value in seconds.items():
        print(f"{name:20s} {value:8.1f} s   kvpress / this = {seconds['kvpress'] / value:.2f}")
    print(f"answers equal to kvpress's: {same} of {total} ({args.dtype}: rounding may flip near ties)")

    profile = cProfile.Profile()
    profile.enable()
    for prompt in prompts:
        runs["batched"](prompt)
    profile.disable()
    stats = pstats.Stats(profile)
    whole = stats.total_tt  # type: ignore[attr-defined]
    print("where our time goes (cProfile, cumulative share):")
    wanted = ("prefill", "run_decoder", "score", "fork", "greedy_decode", "_sizes", "attend_stored", "select")
    for (file, _, name), (_, calls, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        if "sparsekv" in file and name in wanted:
            print(f"  {name:16s} {cumulative / whole:6.1%}  ({calls} calls)")


if __name__ == "__main__":
    main()
