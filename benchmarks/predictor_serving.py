"""How should trained predictors be served? The likelihood of reference answers after eviction, against the full cache.

    python benchmarks/predictor_serving.py --rows 60                       # docs/experiments.md, entry 11, in short
    python benchmarks/predictor_serving.py --task niah_single_3 --haystack a_book.txt --first 0 --rows 16

An answer is right or wrong, which is one bit a row: two ways of serving that differ by some points need hundreds of
rows. How likely the reference is after question and answer prefix tells more of each. Every row of a task is read once;
all choices are made from that prefill, and their compacted caches score the reference side by side. Choices are:

    share x        predictors that are x of those that training started from (--start) and the rest of the trained ones;
                   the adapter's own are --share of them
    heads, layers  the budget per kv head, per layer, in place of the whole model
    mean k, max k  scores smoothed over k neighbouring tokens
    centred        half of every score is taken relative to its kv head's own quantile: heads get more equal parts
    by token       half of every score is the mean over the layer's heads: tokens stay or leave more as a whole

Printed: by how many nats the reference's negative log-likelihood (of the whole answer) rises over the full cache's, the
mean over rows with its standard error, and how often every token of it is the most likely one. Rows from --first on: a
choice must not be made on the rows that a score is reported on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from machine import describe
from torch import Tensor

from sparsekv import load_model, prepare
from sparsekv.cli.progress import Bar
from sparsekv.cli.quiet import quieten
from sparsekv.config import EvalConfig, parse_config
from sparsekv.evaluation.plan import load_prompts
from sparsekv.evaluation.prompts import Prompt
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.learned_scores import extra_of
from sparsekv.probe import Request, prefill
from sparsekv.relevance import load_relevance
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import NAME, relevance_modules

Change = Callable[[Tensor, float], Tensor]
AT_ONCE = 8
"""Choices whose caches score an answer in one batch."""


@dataclass
class Both:
    """Scores [1, H, T] of a layer by the served predictors and by those that training started from."""

    served: dict[int, Any]
    start: dict[int, Any]
    _known: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def of(self, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Worked out once per layer, whoever asks."""
        hidden = ctx.hidden_states
        if self._known is None or self._known[0] is not hidden:
            extra, layer = extra_of(ctx), ctx.layer_idx
            found = [by[layer](hidden, extra).transpose(1, 2).float() for by in (self.served, self.start)]
            self._known = hidden, (found[0], found[1])
        return self._known[1]


@dataclass(frozen=True, eq=False)
class Choice(Relevance):
    """Scores that are `share` of the start's, changed by `change`. Linear predictors mix as their scores do."""

    both: Both | None = None
    share: float = 0.5
    has: float = 0.5
    change: Change | None = field(default=None)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        assert self.both is not None and budget.compression_ratio is not None
        served, start = self.both.of(ctx)
        scores = served if self.share == self.has else torch.lerp(served, start, self._step())
        if self.change is not None:
            scores = self.change(scores, budget.compression_ratio)
        return scores.masked_fill(self.protected(scores.shape[-1], ctx), torch.inf)

    def _step(self) -> float:
        return (self.share - self.has) / (1 - self.has)


def smoothed(size: int, *, most: bool) -> Change:
    pool = torch.nn.functional.max_pool1d if most else torch.nn.functional.avg_pool1d
    more: dict[str, Any] = {} if most else {"count_include_pad": False}
    return lambda scores, ratio: pool(scores, size, stride=1, padding=size // 2, **more)


def centred(scores: Tensor, ratio: float) -> Tensor:
    return scores - 0.5 * scores.quantile(ratio, dim=-1, keepdim=True)


def by_token(scores: Tensor, ratio: float) -> Tensor:
    return 0.5 * (scores + scores.mean(dim=1, keepdim=True))


def choices_of(both: Both, has: float) -> dict[str, tuple[Choice, Scope]]:
    """Name -> (policy, scope of its budget)."""

    def one(share: float = has, change: Change | None = None) -> Choice:
        return Choice(both=both, share=share, has=has, change=change)

    shares = sorted({0.0, 0.25, has, 0.75, 0.85, 1.0})
    found: dict[str, tuple[Choice, Scope]] = {f"share {share}": (one(share), "model") for share in shares}
    found |= {"heads": (one(), "head"), "layers": (one(), "layer")}
    for size in (3, 5):
        found[f"mean {size}"] = one(change=smoothed(size, most=False)), "model"
        found[f"max {size}"] = one(change=smoothed(size, most=True)), "model"
    found["by token"] = one(change=by_token), "model"
    found["centred"] = one(change=centred), "model"
    found["centred, share 1.0"] = one(1.0, centred), "model"
    return found


@torch.no_grad()
def judged(
    model: Any, tokenizer: Any, prompt: Prompt, requests: list[Request]
) -> tuple[list[float], list[bool]]:
    """Of every request: the reference's negative log-likelihood, and whether all of its tokens are the likeliest."""
    references = prompt.example.references
    answer = references[0] if prompt.example.task == "qa_1" else ", ".join(references)
    ids = tokenizer(" " + answer, add_special_tokens=False, return_tensors="pt").input_ids
    read = prefill(model, prompt.context_ids, requests, tokenizer=tokenizer)
    following = torch.cat([prompt.question_ids, ids], dim=1)[:, :-1]
    losses: list[float] = []
    likeliest: list[bool] = []
    for first in range(0, len(requests), AT_ONCE):
        part = requests[first : first + AT_ONCE]
        cache = read.cache.fork([read.selections[request.key] for request in part])
        logits = model(
            input_ids=following.expand(len(part), -1), past_key_values=cache, logits_to_keep=ids.shape[1]
        ).logits
        targets = ids.expand(len(part), -1)
        chosen = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        losses += (-chosen.sum(dim=1)).tolist()
        likeliest += (logits.argmax(-1) == targets).all(dim=1).tolist()
    return losses, likeliest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default="adapters/smollm2-135m-eit")
    parser.add_argument(
        "--start", default="adapters/smollm2-135m-relevance", help="what its predictors started from"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the start, in the adapter's predictors")
    parser.add_argument("--task", default="qa_1", help="of RULER")
    parser.add_argument("--haystack", default="book_eval")
    parser.add_argument("--squad", default="builtin")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=2024, help="of the rows")
    parser.add_argument("--first", type=int, default=304, help="the first row that is asked")
    parser.add_argument("--rows", type=int, default=180)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.9])
    args = parser.parse_args()
    if not 0 <= args.share < 1:
        parser.error(f"--share must be in [0, 1), got {args.share}")
    quieten()
    print(describe())
    benchmark = {
        "name": "ruler",
        "context_length": args.context_length,
        "rows": args.first + args.rows,
        "haystack": args.haystack,
        "squad": args.squad,
        "tasks": [args.task],
    }
    settings = {"model": args.model, "seed": args.seed, "methods": ["full"], "benchmarks": [benchmark]}
    config = parse_config(EvalConfig, settings)
    model, tokenizer = load_model(args.model, adapter=args.adapter)
    prepare(model)
    (prompts,) = load_prompts(config, tokenizer, args.context_length + 1024).values()
    modules = relevance_modules(model)

    def predictors(folder: str) -> dict[int, Any]:
        load_relevance(model, folder)
        return {index: copy.deepcopy(getattr(module, NAME)) for index, module in modules.items()}

    start, served = predictors(args.start), predictors(args.adapter)  # the adapter's stay on the model
    choices = choices_of(Both(served, start), args.share)
    requests = [Request("full", make_policy("full"), Budget())]
    for name, (choice, scope) in choices.items():
        requests += [
            Request((name, r), choice, Budget(compression_ratio=r, scope=scope)) for r in args.ratios
        ]
    losses, likeliest = [], []
    asked = prompts[args.first :]
    with Bar(True) as bar:
        bar.start(args.task, len(asked), 0)
        for prompt in asked:
            loss, hit = judged(model, tokenizer, prompt, requests)
            losses.append(loss)
            likeliest.append(hit)
            bar.advance(1)
    show(requests, np.array(losses), np.array(likeliest), f"{args.task}, rows {args.first} to {len(prompts)}")


def show(requests: list[Request], losses: Any, likeliest: Any, title: str) -> None:
    """One line per request: against the full cache, which is the first."""
    rows = len(losses)
    print(f"\n{title}: full cache {losses[:, 0].mean():.3f} nats, all likeliest {likeliest[:, 0].mean():.1%}")
    for at, request in enumerate(requests[1:], 1):
        name, ratio = cast(tuple[str, float], request.key)
        more = losses[:, at] - losses[:, 0]
        print(
            f"  {ratio:.2f} removed  {name:20s} {more.mean():+7.3f} +- {more.std() / rows**0.5:.3f} nats"
            f"   all likeliest {likeliest[:, at].mean():6.1%}"
        )


if __name__ == "__main__":
    main()
