"""A Hugging Face Trainer that trains while KV entries are missing.

    SparseKVTrainer(press=BlockDropoutPress(block_size=64), curriculum=LinearCurriculum(0.0, 0.5, 1000), model=model,
                    args=TrainingArguments(...), train_dataset=dataset, tokenizer=tokenizer).train()

One step: the teacher's forward if the objective needs one (no gradient, nothing evicted, adapters off) -> the policy's
plan -> `model(**batch, selection=plan)` -> the objective. Nothing is patched and nothing global is set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainingArguments

from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.plan import Observer, SelectionPlan
from sparsekv.policies.base import Policy
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.positional import Full
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    attach_relevance,
    has_relevance,
    relevance_modules,
)
from sparsekv.training.averaging import predictor_weights
from sparsekv.training.collate import collator_for
from sparsekv.training.config import TrainConfig
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.curricula import FixedCurriculum
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.described import described
from sparsekv.training.dropping import (
    BOUNDARY,
    SEEDS,
    DroppingConfig,
    contexts_of_rows,
    evicted_share,
    labels_of_rows,
    make_plan,
    ready_batch,
    seed_of,
)
from sparsekv.training.evaluating import EvaluatingTrainer
from sparsekv.training.given import (
    WarnOfNoDrops,
    always_kept,
    check_best,
    check_drops,
    check_heard,
    check_lengths,
    check_objective,
    check_optimizer,
    check_start_share,
    own_arguments,
    own_budget,
    prepare_arguments,
    relevance_press,
    sparsity_of,
)
from sparsekv.training.held_out import Baseline, samples_of_each
from sparsekv.training.measure import measure, observers_of_step
from sparsekv.training.meter import Meter
from sparsekv.training.objective import Objective
from sparsekv.training.objectives import EITObjective, StandardLMObjective
from sparsekv.training.relaxation import (
    Relaxation,
    RelaxedRelevance,
    ScoreQuantiles,
    mean_over_processes,
)
from sparsekv.training.resumable import LogWithCheckpoints, TodaysIntervals
from sparsekv.training.samples import Samples
from sparsekv.training.setup import (
    check_base,
    drawn_policy,
    forbid_reentrant,
    give_own_group,
    moves_without_adapters,
    policy_of,
    ratio_of,
    with_lora,
)
from sparsekv.training.sharded import check_dtypes, check_plugin, expect_idle
from sparsekv.training.student import student_output, teacher_output
from sparsekv.training.weights import has_adapter


class SparseKVTrainer(EvaluatingTrainer):
    """Trains a model under eviction; everything else is `transformers.Trainer`.

    Parameters
    ----------
    model : a supported causal language model, plain or wrapped by PEFT
    args : TrainingArguments
        Copied: what a trainer changes (`trainer.args`) is its own.
    press : one of `sparsekv`'s presses or kvpress's, optional
        What drops entries; its compression_ratio is the default curriculum. Without one, relevance predictors do.
        The temperature of a SoftThresholdPress, or of soft scores, falls to a tenth of it over the run. One with
        on="relevance" trains the predictors.
    curriculum : Curriculum, optional
        The ratio at every step.
    objective : Objective, optional
        `EITObjective()` with predictors, else `StandardLMObjective()`.
    dropping : DroppingConfig, optional
        After a boundary (default), or streaming.
    relaxation : Relaxation, optional
        Train relevance predictors through soft evictions.
    relevance : RelevanceConfig, optional
        Shape of fresh predictors, which a model gets that has none and is to train them.
    relevance_lr, relevance_weight_decay : float
        Of the predictors.
    relevance_start_share : float in [0, 1)
        What `save_weights` writes: this much of the predictors that the model came with, the rest of the trained ones
        (`averaging`). For a relaxation whose threshold is "quantile".
    press_share : float in (0, 1], with both press and relaxation
        The fraction of the steps that run under the press.
    lora : LoraOptions, optional
        The adapter that a plain model gets; None leaves the model as it is (full fine-tuning, or what is unfrozen).
    tokenizer : of the data collator, and of policies that look at the text
    data_collator : optional
        From a list of samples to a batch padded on the left: input_ids, attention_mask, labels [B, T] (-100: ignored).
        boundary and sample_index [B] are added where a row is a sample. A collator that makes other rows gives both:
        the column, padding counted, of the first token after the row's context (0: a drawn one), and a number that
        the row's draws follow.
    train_dataset, eval_dataset : items with input_ids (and labels, boundary, sample_index), or with text
        Held-out data may be several such sets, by name.
    config : TrainConfig, optional
        What the trainer was built from; written into its checkpoints.
    seq_len : int
        Items with text are cut to so many tokens.

    Raises
    ------
    ConfigError
        For anything that would train nothing: no press and no relaxation, both without a press_share, no trainable
        parameter, an optimizer without some of them, no sample long enough to lose entries; for what of Trainer's would
        be ignored (model_init, metrics and losses made of logits); and for DataParallel and some ways of FSDP
        (`sharded.check_plugin`).
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        press: Any = None,
        curriculum: Curriculum | None = None,
        objective: Objective | None = None,
        dropping: DroppingConfig | None = None,
        relaxation: Relaxation | None = None,
        relevance: RelevanceConfig | None = None,
        relevance_lr: float = 2e-2,
        relevance_weight_decay: float = 0.0,
        relevance_start_share: float = 0.0,
        press_share: float = 0.0,
        lora: LoraOptions | None = LoraOptions(),  # noqa: B008 (frozen)
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        config: TrainConfig | None = None,
        seq_len: int = 1024,
        **kwargs: Any,
    ) -> None:
        tokenizer = tokenizer if tokenizer is not None else kwargs.pop("processing_class", None)
        args = own_arguments(args)
        check_heard(model, args, kwargs)
        self.policy = None if press is None else policy_of(press)
        check_drops(self.policy, relaxation, press_share)
        trains_predictors = relaxation is not None or relevance_press(self.policy) is not None
        if isinstance(model, str):
            from sparsekv.models import load_model

            model, loaded = load_model(model)
            tokenizer = loaded if tokenizer is None else tokenizer
        forbid_reentrant(args, model)
        before = {id(parameter) for parameter in model.parameters()}
        # Not in a press's steps, and not in those of a soft one while its ratio is 0.
        prepare_arguments(args, idle_predictors=trains_predictors and press is not None)
        self.press, self.relaxation, self.press_share = press, relaxation, press_share
        self.scope: Scope = getattr(press, "scope", "head")
        self.dropping = dropping or DroppingConfig()
        self.own_budget = own_budget(press, curriculum, alone=relaxation is None)
        self.curriculum = curriculum or FixedCurriculum(ratio_of(press))
        self.sparsity = sparsity_of(press, objective)
        self.objective = objective or (EITObjective() if trains_predictors else StandardLMObjective())
        check_objective(self.objective, self.dropping)
        check_best(args, self.curriculum, own_sized=self.own_budget is not None)
        self.relevance_lr, self.relevance_weight_decay = relevance_lr, relevance_weight_decay
        self.setup = {
            "press": described(self.policy),
            "budget": described(self.own_budget),
            "scope": self.scope,
            "sparsity": described(self.sparsity),
            "press_share": press_share,
            "curriculum": described(self.curriculum),
            "objective": described(self.objective),
            "dropping": described(self.dropping),
            "relaxation": described(relaxation),
            "relevance_lr": relevance_lr if trains_predictors else None,
            "relevance_weight_decay": relevance_weight_decay if trains_predictors else None,
        }
        self.quantiles = ScoreQuantiles()
        self.meter = Meter()
        self.config, self.seq_len = config, seq_len
        self._scores: list[Tensor] = []
        prepare(model)
        if self.objective.needs_teacher:
            check_base(model)
        stays = lora is None or has_adapter(model)  # else a fresh adapter freezes the rest
        moves = self.objective.needs_teacher and stays and moves_without_adapters(model)
        self.frozen_teacher = copy.deepcopy(model).eval().requires_grad_(False) if moves else None
        model = with_lora(model, lora, seed=args.seed)
        check_start_share(relevance_start_share, relaxation, press_share, has_start=has_relevance(model))
        if trains_predictors and not has_relevance(model):
            attach_relevance(model, relevance, seed=args.seed)
        for module in relevance_modules(model).values():
            getattr(module, NAME).requires_grad_(trains_predictors)
        self.relevance_start_share = relevance_start_share
        self.relevance_start = predictor_weights(model) if relevance_start_share else {}
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                "no parameter of the model is trainable: give lora=LoraOptions(), or unfreeze some"
            )
        self.n_checkpoints, args.save_total_limit = args.save_total_limit, None  # whole ones only: `rotate`
        own_collator = kwargs.pop("data_collator", None)
        collator = collator_for(own_collator, tokenizer)
        labelled = not self.objective.changes_batch  # it may append something to be learned
        samples = Samples.of(train_dataset, tokenizer, seq_len, endless=True, labelled=labelled)
        if own_collator is None:  # else its rows may be no samples
            check_lengths(samples, self.dropping, always_kept(self.policy, relaxation))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=samples,
            eval_dataset=samples_of_each(eval_dataset, tokenizer, seq_len),
            processing_class=tokenizer,
            **kwargs,
        )
        check_optimizer(self.optimizer, self.model, before)
        if self.args.n_gpu > 1:
            raise ConfigError(
                "several GPUs in one process (DataParallel) are not supported: start with torchrun"
            )
        if self.is_fsdp_enabled:
            check_plugin(
                self.accelerator.state.fsdp_plugin,
                loads_best=self.args.load_best_model_at_end,
                predictors=has_relevance(self.model),
            )
            check_dtypes(self.model)
        if self.frozen_teacher is not None:
            self.frozen_teacher.to(self.args.device)
        # compute_loss divides by the items of the whole step; this version pair would divide once more.
        self.accelerator.gradient_accumulation_steps = 1
        self.model_accepts_loss_kwargs = True
        self.add_callback(Baseline(self))
        self.add_callback(LogWithCheckpoints)
        self.add_callback(TodaysIntervals)
        if not isinstance(self.policy, Full):
            self.add_callback(WarnOfNoDrops())

    # ---- batches ----------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step, made ready, and the number of label tokens in all of them on all processes."""
        self.fold_scores()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        epoch = int(self.state.epoch or 0)
        ready = [self.ready(batch, epoch) for batch in batches]
        count = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in ready)
        items = torch.as_tensor(count, device=device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return ready, items.clamp_min(1)

    def ready(self, batch: Mapping[str, Any], epoch: int, *, judged: bool = False) -> dict[str, Tensor]:
        """Seeds and boundaries; then what the objective makes of the batch, unless it is to be `judged`."""
        made_of = self._prepared if self.objective.changes_batch and not judged else None
        return ready_batch(batch, self.dropping, seed=self.args.seed, epoch=epoch, prepare=made_of)

    def _prepared(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the objective makes of a batch, knowing what its step will evict as far as that can be known."""
        policy, ratio = self._at_this_step()
        evicted = evicted_share(self.plan(batch, policy, ratio), batch["attention_mask"])
        return self.objective.prepare(batch, evicted)

    def _at_this_step(self) -> tuple[Policy, float]:
        step, total = self.state.global_step, max(self.state.max_steps, 1)
        ratio = self.curriculum.ratio(step, total)
        return self.policy_at(step, step / total, ratio), ratio

    # ---- one micro-batch ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective under eviction, as a share of the whole step's loss."""
        items = (
            float(num_items_in_batch)
            if num_items_in_batch is not None
            else float(labels_of_rows(inputs).sum())
        )
        policy, ratio = self._at_this_step()
        plan = self.plan(inputs, policy, ratio, observe=True)
        plan.keep_scores = isinstance(policy, RelaxedRelevance)
        plain = self.accelerator.unwrap_model(model)
        if self.is_fsdp_enabled:
            expect_idle(plain, isinstance(policy, RelaxedRelevance) or relevance_press(policy) is not None)
        teacher = None
        # Two contexts: what the teacher casts without gradient must not be what the student finds cached.
        with self.accelerator.autocast():
            if self.objective.needs_teacher:
                teacher = teacher_output(plain, inputs, self.frozen_teacher)
        with self.accelerator.autocast():
            student = student_output(model, plain, inputs, plan)
            weight = 0.0 if self.sparsity is None else self.sparsity.weight
            losses = self.objective(student, teacher, inputs, plan, items, sparsity=weight)
        loss = losses.total
        share = float(labels_of_rows(inputs).sum()) / items
        if self.relaxation is not None:
            rows = labels_of_rows(inputs) / items
            contexts = contexts_of_rows(inputs, self.dropping.way)
            penalty = self.relaxation.penalty(plan.soft_kept, ratio, rows, contexts)
            if penalty is not None:
                loss = loss + penalty
                self.meter.add({"budget_penalty": float(penalty.detach())}, {"budget_penalty": share})
        measure(self.meter, plan, inputs, losses, ratio)
        self._hear_scores(plan)
        loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def plan(
        self,
        inputs: Mapping[str, Tensor],
        policy: Policy,
        ratio: float,
        *,
        observe: bool = False,
        hard: bool = False,
    ) -> SelectionPlan:
        """What the student's forward over a batch of `get_batch_samples` hides at a ratio.

        `hard`: soft policies decide as they do when served.
        """
        seeds = inputs[SEEDS].tolist()
        budget = self.own_budget or Budget(compression_ratio=ratio, scope=self.scope)
        plan = make_plan(
            self.accelerator.unwrap_model(self.model),
            dict(inputs),
            policy,
            Budget() if isinstance(policy, RelaxedRelevance) else budget,  # its threshold holds the budget
            self.dropping,
            boundaries=inputs[BOUNDARY].tolist(),
            seeds=seeds,
            tokenizer=self.processing_class or getattr(self.press, "tokenizer", None),
            observers=self._observers(seeds, labels_of_rows(inputs).tolist()) if observe else (),
        )
        plan.hard = hard
        return plan

    def policy_at(self, step: int, progress: float, ratio: float, *, judged: bool = False) -> Policy:
        """The policy of a step; what is drawn depends on the step alone, so that batching changes nothing.

        `judged`: always the same one, so that evaluations compare: predictors if they train, else the first draw.
        """
        seed = seed_of(self.args.seed, 0 if judged else step, 3)
        taken = not judged and (seed % 1_000_000) / 1_000_000 < self.press_share
        if self.relaxation is not None and not (taken and self.policy is not None):
            return self.relaxation.policy(progress, ratio, self.quantiles)
        policy = getattr(self.press, "policy", None) or self.policy  # a press's own settings may have changed
        if policy is None:
            raise ConfigError("nothing drops entries")
        return drawn_policy(policy, seed, progress)

    def _observers(self, seeds: list[int], weights: list[float]) -> tuple[Observer, ...]:
        every = max(int(self.state.logging_steps or 1), 1)
        logged = (self.state.global_step + 1) % every == 0
        kind = self.objective.sparsity_kind if self.sparsity is None else self.sparsity.kind
        return observers_of_step(kind, seeds, weights, logged=logged)

    def _hear_scores(self, plan: SelectionPlan) -> None:
        if plan.scores and self.relaxation is not None and self.relaxation.threshold == "quantile":
            self._scores += [scores for rows in plan.scores.values() for scores in rows]

    def fold_scores(self) -> None:
        """Let the running quantiles hear the scores of the step that ended; every process takes part."""
        if self.relaxation is None or self.relaxation.threshold != "quantile":
            return
        heard = ScoreQuantiles.of(self._scores) if self._scores else None
        self._scores = []
        if self.args.world_size > 1:
            heard = mean_over_processes(heard, self.accelerator)
        if heard is not None:
            self.quantiles.observe(heard)

    # ---- optimizer, logging, checkpoints ------------------------------------------------------------------

    def create_optimizer(self) -> torch.optim.Optimizer:
        """As Trainer's, with the predictors in a group of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer()
        own = [p for m in relevance_modules(self.model).values() for p in getattr(m, NAME).parameters()]
        own = [p for p in own if p.requires_grad]
        if made and own:
            give_own_group(optimizer, own, lr=self.relevance_lr, weight_decay=self.relevance_weight_decay)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds CE, KL, requested and achieved compression, retained attention and tokens/s to Trainer's logs: those of
        all processes, which all log a loss at the same step.
        """
        if "loss" in logs:
            logs = {**logs, **self.meter.read(gather_object if self.args.world_size > 1 else None)}
        super().log(logs, start_time)
