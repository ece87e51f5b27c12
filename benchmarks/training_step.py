"""What does a training step under eviction cost, beside an ordinary one? Time side by side, memory process by process.

    python benchmarks/training_step.py                          # SmolLM2, 1024 tokens: time, then memory
    python benchmarks/training_step.py --tokens 256 --repeats 1 --variants eit block_dropout --measure time

The ordinary step is Hugging Face's own: `model(**batch, labels=...)` and backward on a model that sparsekv never
touched, with the same LoRA adapter (r 64 on q, k, v, o), the same tokens and every token labelled. The steps under
eviction are `SparseKVTrainer.compute_loss` and its backward, plans and boundaries included. Neither has an optimizer.

Time: in every round each variant runs once, in an order that rotates; a ratio is the median over rounds of (variant /
reference of the same round). Memory: one process per variant, the most that was resident during two steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import TrainingArguments

import sparsekv
from sparsekv import load_model
from sparsekv.benchmarks.data import haystack_text
from sparsekv.cli.quiet import quieten
from sparsekv.training import Collator, EITObjective, FixedCurriculum, SparseKVTrainer
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.setup import with_lora

Step = Callable[[], None]

FORWARD, TRAINING = "plain forward, no gradient", "plain training"
PLAIN = (FORWARD, TRAINING)

VARIANTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "eit": ("eit", lambda: {"press": sparsekv.BlockDropoutPress(64), "objective": EITObjective()}),
    "block_dropout": ("tokens", lambda: {"press": sparsekv.BlockDropoutPress(64)}),
    "variable_block_dropout": ("tokens", lambda: {"press": sparsekv.VariableBlockDropoutPress(16, 128)}),
    "sentence_dropout": ("tokens", lambda: {"press": sparsekv.SentenceDropoutPress()}),
    "adaptive_block_dropout": ("layer", lambda: {"press": sparsekv.AdaptiveBlockDropoutPress(64)}),
    "eviction_aug_snapkv": ("layer", lambda: {"press": sparsekv.EvictionAugPress(["snapkv"])}),
    "eviction_aug_h2o": ("layer", lambda: {"press": sparsekv.EvictionAugPress(["h2o"])}),
    "soft_threshold": ("layer", lambda: {"press": sparsekv.SoftThresholdPress()}),
    "sparse_reg": ("regulariser", lambda: {"press": sparsekv.SparseRegPress("entropy")}),
    "relevance_eit": ("relaxed", lambda: {"relaxation": Relaxation(), "objective": EITObjective()}),
}
"""Name -> (kind, what the trainer is given)."""

LIMITS: dict[str, float | None] = {
    "eit": 1.15,
    "tokens": 1.10,
    "layer": 1.20,
    "regulariser": 1.30,
    "relaxed": None,
}
"""Kind -> the most that a step may cost. Without a limit: relaxed relevance, which has a soft mask as well."""

WITH_TEACHER = ("eit", "relaxed")
"""Kinds that are compared with plain training plus a plain forward: they have a teacher."""

MEMORY_LIMIT = 1.25


class Bench:
    """One untouched model and one under eviction, and the same tokens for both."""

    def __init__(self, args: argparse.Namespace, names: list[str], folder: str) -> None:
        self.args, self.folder = args, folder
        _, self.tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
        text = haystack_text("book_train")[: 16 * args.tokens]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: args.tokens]
        self.sample = {"input_ids": ids, "labels": ids, "boundary": args.boundary, "sample_index": 0}
        self.steps: dict[str, Step] = {}
        if set(names) & set(PLAIN):
            self.steps |= self.plain()
        own = [name for name in names if name not in PLAIN]
        if own:
            model = self.fresh()
            # Predictors are attached to the shared model; only the variant that uses them computes them.
            for name in sorted(own, key=lambda name: name == "relevance_eit"):
                self.steps[name] = self.under_eviction(model, name)
        self.steps = {name: self.steps[name] for name in names}

    def fresh(self) -> Any:
        """A model with a LoRA adapter, in training mode."""
        model, _ = load_model(self.args.model, dtype=self.args.dtype, device=self.args.device)
        return with_lora(model, LoraOptions()).train()

    def plain(self) -> dict[str, Step]:
        """Hugging Face's own forward, and its own training step."""
        model = self.fresh()
        batch = Collator(self.tokenizer)([self.sample])
        ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))

        def forward() -> None:
            with torch.no_grad(), model.disable_adapter():
                model.eval()(input_ids=ids, use_cache=False)
                model.train()

        def training() -> None:
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        return {FORWARD: forward, TRAINING: training}

    def under_eviction(self, model: Any, name: str) -> Step:
        """The product's step: batch to plan, forward(s), objective, backward."""
        args = TrainingArguments(
            output_dir=self.folder,
            use_cpu=self.args.device == "cpu",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,  # retained attention is measured in logged steps only
        )
        trainer = SparseKVTrainer(
            model,
            args,
            curriculum=FixedCurriculum(self.args.ratio),
            dropping=DroppingConfig(
                "streaming" if self.args.window else "prefill", "end", self.args.window or 1
            ),
            tokenizer=self.tokenizer,
            train_dataset=[self.sample],
            **VARIANTS[name][1](),
        )
        trainer.state.global_step, trainer.state.max_steps = 50, 100

        def step() -> None:
            batch = Collator(self.tokenizer)([self.sample])
            ready, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
            loss = trainer.compute_loss(
                trainer.model, trainer._prepare_inputs(ready[0]), num_items_in_batch=items
            )
            loss.backward()
            trainer.model.zero_grad(set_to_none=True)

        return step

    def timed(self, name: str) -> float:
        """Seconds of one step."""
        gc.collect()
        self._wait()
        begin = time.perf_counter()
        self.steps[name]()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()


def measure_time(args: argparse.Namespace, names: list[str]) -> None:
    """Every variant once per round, and the table."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, [*PLAIN, *names], folder)
        seconds: dict[str, list[float]] = {name: [] for name in bench.steps}
        order = list(bench.steps)
        for name in order:
            bench.timed(name)  # the first step of each is not counted
        for number in range(args.repeats):
            turn = number % len(order)
            for name in order[turn:] + order[:turn]:
                seconds[name].append(bench.timed(name))
    print(f"\n{'step':28s} {'seconds':>8s} {'ratio':>7s} {'limit':>6s}   compared with")
    for name in order:
        line = f"{name:28s} {statistics.median(seconds[name]):8.3f}"
        if name in VARIANTS:
            kind = VARIANTS[name][0]
            against, base = TRAINING, seconds[TRAINING]
            if kind in WITH_TEACHER:
                against = "plain forward + plain training"
                base = [a + b for a, b in zip(seconds[FORWARD], seconds[TRAINING], strict=True)]
            ratio = statistics.median(a / b for a, b in zip(seconds[name], base, strict=True))
            line += f" {ratio:7.3f} {verdict(ratio, LIMITS[kind])}   {against}"
        print(line)


def verdict(ratio: float, limit: float | None) -> str:
    """A limit, and whether it held."""
    return "     –" if limit is None else f"{limit:6.2f} {'held' if ratio <= limit else 'MISSED'}"


def measure_memory(args: argparse.Namespace, names: list[str]) -> None:
    """One process per variant, and the table."""
    found: dict[str, dict[str, float]] = {}
    for name in [TRAINING, *names]:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\n{'step':28s} {'peak MiB':>9s} {'ratio':>7s} {'limit':>6s}        {'above what was resident before':>30s}"
    )
    plain = found[TRAINING]
    for name, memory in found.items():
        line = f"{name:28s} {memory['peak'] / 2**20:9.0f}"
        grown, plainly = (m["peak"] - m["before"] for m in (memory, plain))
        if name != TRAINING:
            ratio = memory["peak"] / plain["peak"]
            limit = verdict(ratio, MEMORY_LIMIT)
            line += f" {ratio:7.3f} {limit:13s} {grown / 2**20:20.0f} MiB, {grown / plainly:5.3f} x"
        else:
            line += f"{'':22s} {grown / 2**20:20.0f} MiB"
        print(line)


def memory_of(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Bytes resident before two steps of one variant, and at most during them."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, [name], folder)
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = forget_peak()
        for _ in range(2):
            bench.steps[name]()
        peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else peak_resident()
    return {"before": float(before), "peak": float(peak)}


def forget_peak() -> int:
    """Start a new peak at what is resident now, where Linux allows it; returns that in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_resident()
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Bytes resident at most since `forget_peak`; since the start of the process where that is not known."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction removed")
    parser.add_argument(
        "--boundary", type=int, help="last column of the context + 1; default: half of the tokens"
    )
    parser.add_argument("--window", type=int, help="streaming with this window instead of a boundary")
    parser.add_argument("--measure", nargs="+", default=["time", "memory"], choices=["time", "memory"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quieten()
    args.boundary = args.tokens // 2 if args.boundary is None else args.boundary
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory_of(args, args.memory_of)))
        return
    print(describe())
    how = f"window {args.window}" if args.window else f"boundary {args.boundary}"
    print(
        f"{args.model}, {args.dtype}, {args.tokens} tokens, ratio {args.ratio}, {how}, {args.repeats} rounds"
    )
    if "time" in args.measure:
        measure_time(args, args.variants)
    if "memory" in args.measure:
        measure_memory(args, args.variants)


if __name__ == "__main__":
    main()
