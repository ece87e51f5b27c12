"""What a trainer is given, checked: refused where it would train nothing, or not what it says."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from sparsekv.errors import ConfigError
from sparsekv.policies.base import Policy
from sparsekv.policies.blocks import DEFAULT_RECENT
from sparsekv.policies.budget import Budget
from sparsekv.policies.soft import SoftThreshold
from sparsekv.policies.sparsity import Sparsity
from sparsekv.relevance.predictor import Served
from sparsekv.training.curricula import is_fixed
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.dropping import DroppingConfig, last_drawn
from sparsekv.training.objective import Objective
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.samples import Samples

logger = logging.getLogger(__name__)


def relevance_press(policy: Policy | None) -> SoftThreshold | None:
    """The policy, or the one among those that it draws from, through which gradients reach relevance predictors."""
    for one in getattr(policy, "policies", (policy,)):
        if isinstance(one, SoftThreshold) and one.on == "relevance":
            return one
    return None


def served_after(press: SoftThreshold) -> Served:
    """How predictors are to be served that a soft press trained: with what it keeps, by its threshold if it has one.

    Without an n_recent it kept `DEFAULT_RECENT` entries, or fewer where the budget was small.
    """
    recent = DEFAULT_RECENT if press.n_recent is None else press.n_recent
    return Served(press.n_sink, recent, 0.0 if press.threshold is None else press.threshold)


def check_drops(policy: Policy | None, relaxation: Relaxation | None, press_share: float) -> None:
    """Who drops entries, and in which share of the steps.

    Raises
    ------
    ConfigError
        If nobody does; if a share is given without both, or none with both; if predictors are never trained.
    """
    if policy is None and relaxation is None:
        raise ConfigError("nothing drops entries: give press=..., or relaxation=Relaxation() for predictors")
    if isinstance(press_share, bool) or not (isinstance(press_share, (int, float)) and 0 <= press_share <= 1):
        raise ConfigError(f"press_share must be a number in [0, 1], got {press_share!r}")
    both = policy is not None and relaxation is not None
    if both != (press_share > 0):
        given = "with" if both else "without"
        raise ConfigError(
            f"press_share {press_share:g} {given} both press and relaxation; it says which share of the steps, in "
            "(0, 1], the press takes when predictors are trained too"
        )
    if press_share == 1 and relevance_press(policy) is None:
        raise ConfigError(
            "press_share 1 gives every step to the press, so predictors would never be trained; give less, or no "
            "relaxation"
        )


def own_budget(press: Any, curriculum: Curriculum | None, *, alone: bool = True) -> Budget | None:
    """The budget of a press that decides by sizes of its own: it has no ratio, and no curriculum to set one.

    `alone`: no predictors are trained that a curriculum could be meant for.

    Raises
    ------
    ConfigError
        For a press with a threshold or a number of tokens to keep beside a curriculum, whose ratios would have no
        meaning.
    """
    budget: Budget | None = press.budget() if hasattr(press, "budget") else None
    if budget is None or budget.compression_ratio is not None:
        return None
    if alone and getattr(press, "own_sized", False) and not (curriculum is None or is_fixed(curriculum, 0.0)):
        raise ConfigError(
            f"press {type(press).__name__} has a {press.own_size} of its own, and curriculum {curriculum.name} sets a "
            "ratio; give one"
        )
    if curriculum is not None and budget.tokens is not None:
        raise ConfigError(
            f"press {type(press).__name__} keeps {budget.tokens} tokens, and curriculum {curriculum.name} sets a "
            "ratio; give one"
        )
    return budget if getattr(press, "own_sized", False) or curriculum is None else None


def check_best(args: TrainingArguments, curriculum: Curriculum, *, own_sized: bool) -> None:
    """Whether "the best" step, of `load_best_model_at_end` and the like, is that of the best model.

    Raises
    ------
    ConfigError
        Where evaluations under eviction at different ratios would be compared: the least evicted would win. And where a
        perplexity or a loss would be the better the greater it is.
    """
    if not (args.load_best_model_at_end or args.metric_for_best_model or args.save_strategy == "best"):
        return
    metric = args.metric_for_best_model or "loss"
    evicted, full = metric.endswith(("loss", "perplexity_evicted")), metric.endswith("perplexity")
    if evicted and not (own_sized or is_fixed(curriculum)):
        raise ConfigError(
            f"metric_for_best_model would compare {metric} under eviction at other ratios, which curriculum "
            f"{curriculum.name} sets: the least evicted would win; give curriculum fixed, or "
            "metric_for_best_model='perplexity' (with the full cache) and greater_is_better=False"
        )
    if (evicted or full) and args.greater_is_better:
        raise ConfigError(
            f"metric_for_best_model {metric} is better the less it is: give greater_is_better=False"
        )


def check_objective(objective: Objective, dropping: DroppingConfig) -> None:
    """Whether a way of dropping leaves what an objective judges.

    Raises
    ------
    ConfigError
        If it holds tokens of the context to the teacher as ones that lost nothing, which under streaming they do.
    """
    if objective.judges_context and dropping.way == "streaming":
        raise ConfigError(
            f"objective {objective.name} with lambda_context is for dropping 'prefill': under 'streaming' the "
            "context's own tokens have lost entries, too"
        )


def check_start_share(
    share: float, relaxation: Relaxation | None, press_share: float, *, has_start: bool
) -> None:
    """How much of the predictors' first weights is to be served.

    `has_start`: the model came with predictors.

    Raises
    ------
    ConfigError
        For no number in [0, 1), predictors that begin with random weights, and a threshold that is not a quantile.
    """
    if isinstance(share, bool) or not (isinstance(share, (int, float)) and 0 <= share < 1):
        raise ConfigError(f"relevance_start_share must be a number in [0, 1), got {share!r}")
    by_quantile = relaxation is not None and relaxation.threshold == "quantile" and press_share < 1
    if share and not (has_start and by_quantile):
        raise ConfigError(
            f"relevance_start_share {share:g} needs a model that has predictors, and a relaxation with threshold "
            "'quantile': that of averaged scores is measured, a learned one can't be"
        )


def own_arguments(args: TrainingArguments | None) -> TrainingArguments:
    """A copy for a trainer to change: another trainer may be made of the same arguments.

    A shallow one, since the devices and processes that transformers found are kept in it too.
    """
    own = TrainingArguments(output_dir="output/train") if args is None else copy.copy(args)
    own.accelerator_config = copy.copy(own.accelerator_config)
    return own


_NO_LOGITS = "the logits of a whole sequence never exist here"
_UNHEARD = {
    "compute_loss_func": "the loss is the objective's: give objective=...",
    "compute_metrics": f"{_NO_LOGITS}, so evaluations measure perplexity alone; give callbacks=[...] to measure more",
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "model_init": "a trainer is made of a model: give model=..., and a new trainer for each trial",
}
"""Arguments of `transformers.Trainer` that this one has no use for, and why."""


def check_heard(model: Any, args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Whether what plain Trainer would heed is heeded here.

    `given`: what goes on to Trainer.

    Raises
    ------
    ConfigError
        For an argument that would be ignored, and where there is no model.
    """
    for name, reason in _UNHEARD.items():
        if given.get(name) is not None:
            raise ConfigError(f"{name} is not supported: {reason}")
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor:g}: the loss is the objective's"
        )
    if model is None:
        raise ConfigError("model is missing: give a causal language model, or the name of one")


def prepare_arguments(args: TrainingArguments, *, idle_predictors: bool) -> None:
    """Set what this trainer needs where nothing is said.

    Parameters
    ----------
    idle_predictors : True if predictors that train take no part in some steps

    Raises
    ------
    ConfigError
        For batches that one process hands out to the others: they would have to be of equal length.
    """
    if args.accelerator_config.dispatch_batches:
        raise ConfigError(
            "accelerator_config: dispatch_batches must be False; every process reads its own samples, of any length"
        )
    args.accelerator_config.dispatch_batches = False  # where nothing is said it would be True for a stream
    if idle_predictors and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True
    args.remove_unused_columns = False


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module, before: Set[int]) -> None:
    """Whether a given optimizer (None: Trainer makes one) moves what was added to the model to be trained.

    Parameters
    ----------
    before : ids of the parameters that the model had when it was given; to train some of these alone is the caller's
        right

    Raises
    ------
    ConfigError
        If it does not: it was made before the adapter, or the predictors, were added to the model.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missed = [name for name, parameter in trained.items() if id(parameter) not in held | before]
    if missed:
        raise ConfigError(
            f"optimizers: the given optimizer holds {len(trained) - len(missed)} of {len(trained)} trainable "
            f"parameters, not {missed[0]}: adapters and predictors are added after it was made. Give "
            "optimizer_cls_and_kwargs=, or make it of a model that has them (wrapped with LoRA, attach_relevance), or "
            "train the model as it is (lora=None, no relaxation)"
        )


def always_kept(policy: Policy | None, relaxation: Relaxation | None) -> int:
    """The longest context of which nothing is ever dropped: sinks and recent ones.

    Of the predictors and the press, and of several methods that a press draws from, the one that keeps least counts.
    """
    sizes = [] if policy is None else [one.always_kept for one in getattr(policy, "policies", (policy,))]
    if relaxation is not None:
        sizes.append(relaxation.n_sink + relaxation.n_recent)
    return min(sizes, default=0)


def check_lengths(dataset: Any, dropping: DroppingConfig, kept: int) -> None:
    """Whether some context of a data set is longer than what always stays of it.

    Looks at samples drawn from all over the data set, as far as the first that is; not at streams, which may be read
    once.

    Parameters
    ----------
    kept : entries that always stay, `always_kept`

    Raises
    ------
    ConfigError
        If none of those looked at is: nothing would be dropped at any ratio.
    """
    if not isinstance(dataset, Samples):
        return
    longest, looked_at = 0, min(len(dataset), _LOOKED_AT)
    # drawn: every so many-th could be all of one kind where several take turns
    for index in random.Random(0).sample(range(len(dataset)), looked_at):
        longest = max(longest, _longest_context(dataset[index], dropping))
        if longest > kept:
            return
    way = f"window {dropping.window}" if dropping.way == "streaming" else "a boundary"
    raise ConfigError(
        f"train_dataset: with {way}, the longest context that could lose entries has {longest} ({looked_at} of "
        f"{len(dataset)} samples looked at), and {kept} sink and recent ones always stay: nothing would be dropped; "
        "give longer samples, or a smaller n_sink and n_recent"
    )


_LOOKED_AT = 256
"""Samples whose length is looked at, at most."""


def _longest_context(sample: Mapping[str, Any], dropping: DroppingConfig) -> int:
    """How many entries can be asked for at once; 0 where none is ever a window behind."""
    real, boundary = len(sample["input_ids"]), int(sample["boundary"])
    if dropping.way == "streaming":
        return real if real > dropping.window else 0
    return boundary if boundary and dropping.boundary == "end" else last_drawn(real)


class WarnOfNoDrops(TrainerCallback):
    """Says once if the first logged steps that were to drop entries dropped none."""

    def __init__(self) -> None:
        self.looked = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called with what a training step logs, an evaluation, and the end."""
        requested = (logs or {}).get("requested_compression", 0.0)
        if self.looked or requested <= 0:
            return
        self.looked = True
        if logs["achieved_compression"] <= 0 and state.is_world_process_zero:
            logger.warning(
                "up to step %d nothing was dropped, where a fraction of %.3g of the context was to be: contexts are no "
                "longer than the sink and recent tokens that always stay",
                state.global_step,
                requested,
            )


def sparsity_of(press: Any, objective: Objective | None) -> Sparsity | None:
    """The sparsity loss that a press asks for; None for other presses.

    Raises
    ------
    ConfigError
        If the objective has one of its own.
    """
    sparsity: Sparsity | None = getattr(press, "sparsity", None)
    if sparsity is not None and objective is not None and objective.sparsity_kind is not None:
        raise ConfigError(
            f"press {type(press).__name__} and objective {objective.name} each ask for a sparsity loss; give one"
        )
    return sparsity
