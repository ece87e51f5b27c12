"""Held-out perplexity of what follows the boundary: with the full cache, and as it would be served at a ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import TrainerCallback

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.plan import SelectionPlan
from sparsekv.policies.base import keep_top
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.dropping import BOUNDARY, labels_of_rows
from sparsekv.training.objectives import StandardLMObjective
from sparsekv.training.relaxation import RelaxedRelevance
from sparsekv.training.samples import Samples
from sparsekv.training.sharded import in_step, is_sharded
from sparsekv.training.student import student_output

if TYPE_CHECKING:
    from sparsekv.training.trainer import SparseKVTrainer


class StreamShare(IterableDataset):
    """Every `count`-th sample of a stream, from the one at `index`."""

    def __init__(self, inner: Iterable[Any], index: int, count: int) -> None:
        self.inner, self.index, self.count = inner, index, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self.inner, self.index, None, self.count)


def share_of(dataset: Any, index: int, count: int) -> Dataset[Any]:
    """The samples that process `index` of `count` judges. Every sample is judged once, so shares may differ in size:
    Trainer's own loader would repeat some until all are equal.
    """
    if isinstance(dataset, IterableDataset):
        return StreamShare(dataset, index, count)
    return Subset(dataset, range(index, len(dataset), count))


def samples_of_each(dataset: Any, tokenizer: Any, seq_len: int) -> Any:
    """`Samples.of` a held-out data set, or of each of several by name.

    Raises
    ------
    ConfigError
        For a mapping without any, and for what `Samples` refuses.
    """
    if not isinstance(dataset, Mapping):
        return Samples.of(dataset, tokenizer, seq_len)
    if not dataset:
        raise ConfigError("eval_dataset is an empty mapping; give a data set, or several by name")
    return {name: Samples.of(one, tokenizer, seq_len) for name, one in dataset.items()}


def by_prefix(prefix: str, given: Any, own: Any) -> dict[str, Any]:
    """What an evaluation judges, by the prefix of its metrics, as `get_eval_dataloader` takes it.

    `given`: to `evaluate`; None for the trainer's `own`, of which several go by their names (Trainer keeps loaders so).
    """
    several = own if given is None else given
    if not isinstance(several, Mapping):
        return {prefix: given}
    return {f"{prefix}_{name}": name if given is None else one for name, one in several.items()}


def after_the_boundary(batch: Mapping[str, Tensor], boundary: Tensor) -> dict[str, Tensor]:
    """The batch with labels only where the prediction is made from after the boundary [B]."""
    labels = batch["labels"]
    column = torch.arange(labels.shape[1], device=labels.device)
    early = column <= boundary.to(labels.device)[:, None]
    return {**batch, "labels": labels.masked_fill(early, IGNORED)}


@torch.no_grad()
def summed_losses(model: Any, batch: Mapping[str, Tensor], plans: Iterable[SelectionPlan | None]) -> Tensor:
    """float64 [len(plans)]: cross-entropy summed over the batch's labels, under each plan."""
    judge = StandardLMObjective()
    sums = [
        judge(student_output(model, model, batch, plan), None, batch, None, 1.0).parts["ce"].double()
        for plan in plans
    ]
    return torch.stack(sums)


@torch.no_grad()
def scored_plan(
    model: Any, batch: Mapping[str, Tensor], plan: SelectionPlan, policy: RelaxedRelevance
) -> SelectionPlan:
    """A plan like the one given, with what predictors score of the batch: one forward, with nothing hidden."""
    looking = plan.asking(replace(policy, threshold=float("-inf"), noise=0.0))
    student_output(model, model, batch, looking)
    return looking


@torch.no_grad()
def served_by_scores(
    model: Any, batch: Mapping[str, Tensor], plan: SelectionPlan, ratio: float
) -> SelectionPlan:
    """The plan that serves what predictors score: the exact top entries of the whole model, for every row.

    `plan` is that of a `RelaxedRelevance`; one more forward gathers the scores.
    """
    if not isinstance(plan.policy, RelaxedRelevance):
        return plan
    looking = scored_plan(model, batch, plan, plan.policy)
    rows, total = batch["input_ids"].shape
    n_layers, heads = architecture.num_layers(model), architecture.num_kv_heads(model)
    at = torch.full((rows, n_layers, heads, total), NEVER, dtype=torch.int32)
    layers = sorted(looking.scores)
    place = 0
    for row in range(rows):
        start, end = looking.span(row, total)
        at[row, :, :, :start] = 0
        if end == start:
            continue
        scores = torch.stack([looking.scores[layer][place] for layer in layers])[None]
        place += 1
        kept = keep_top(scores, Budget(compression_ratio=ratio, scope="model"))[0].cpu()
        leaves = looking.leaves(start, end, kept.device)
        at[row, layers, :, start:end] = torch.where(kept, NEVER, leaves).to(torch.int32)
    return SelectionPlan(selection=Selection(at.to(batch["input_ids"].device)), window=plan.window)


@torch.no_grad()
def held_out_sums(
    model: Any,
    batches: Iterable[tuple[Mapping[str, Tensor], bool]],
    plan_of: Callable[[Mapping[str, Tensor]], SelectionPlan],
    ratio: float,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """float64 [3], over all batches: cross-entropy with the full cache, that under eviction, and labels.

    Parameters
    ----------
    model : in whatever mode; it is left in the same
    batches : as `SparseKVTrainer` makes them ready, each with whether it counts (`sharded.in_step`)
    plan_of : from a batch to what is hidden of it
    ratio : fraction to remove, where predictors decide
    precision : the context in which training computes (autocast)
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch, counts in batches:
            ready = after_the_boundary(batch, batch[BOUNDARY])
            with precision():
                served = served_by_scores(model, ready, plan_of(ready), ratio)
                losses = summed_losses(model, ready, (None, served))
            if counts:
                sums[:2] += losses
                sums[2] += float(labels_of_rows(ready).sum())
    finally:
        model.train(training)
    return sums


@torch.no_grad()
def held_out_perplexity(trainer: SparseKVTrainer, loader: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What `SparseKVTrainer.evaluate` tells of collated batches: the curriculum's ratio at the trainer's step, the
    perplexity with the full cache, that under eviction, and the latter's log (loss). Every process takes part.

    Raises
    ------
    ConfigError
        If no sample has a label after its boundary: there is nothing to judge, and 1 would be the best perplexity.
    """
    step, total = trainer.state.global_step, max(trainer.state.max_steps, 1)
    ratio = trainer.curriculum.ratio(step, total)
    policy = trainer.policy_at(step, step / total, ratio, judged=True)
    hard = not isinstance(policy, RelaxedRelevance)
    plain = trainer.accelerator.unwrap_model(trainer.model)
    batches = (trainer._prepare_inputs(trainer.ready(batch, epoch=-1, judged=True)) for batch in loader)
    sums = held_out_sums(
        plain,
        in_step(batches, trainer.accelerator) if is_sharded(plain) else ((batch, True) for batch in batches),
        lambda ready: trainer.plan(ready, policy, ratio, hard=hard),
        ratio,
        trainer.args.device,
        trainer.accelerator.autocast,
    )
    if trainer.args.world_size > 1:
        sums = trainer.accelerator.reduce(sums, "sum")
    count = float(sums[2])
    if not count:
        raise ConfigError(
            "eval_dataset: no sample has a label after its boundary, so there is no perplexity to measure; the "
            "boundary must come before the last token, and labels after it must be token ids, not -100"
        )
    full, evicted = (float(torch.exp(sums[i] / count)) for i in (0, 1))
    loss = float(sums[1] / count)
    return {"perplexity": full, "perplexity_evicted": evicted, "ratio": ratio, "loss": loss}


class Baseline(TrainerCallback):
    """Sees that a curriculum that listens will hear, and measures the full-cache perplexity before the first step where
    it needs that.
    """

    def __init__(self, trainer: SparseKVTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate once, if nothing was observed yet.

        Raises
        ------
        ConfigError
            If an adaptive curriculum would never hear of an evaluation.
        """
        curriculum = self.trainer.curriculum
        if not curriculum.adaptive:
            return
        if self.trainer.eval_dataset is None:
            raise ConfigError("curriculum adaptive decides by held-out perplexity: give eval_dataset=...")
        if args.eval_strategy == "no":
            raise ConfigError(
                "curriculum adaptive decides by held-out perplexity, and eval_strategy 'no' never measures it: give "
                "eval_strategy='steps' and eval_steps, or 'epoch'"
            )
        if curriculum.needs_baseline:
            self.trainer.evaluate()
