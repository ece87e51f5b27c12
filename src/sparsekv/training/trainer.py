"""A Hugging Face Trainer that trains while KV entries are missing.

    SparseKVTrainer(press=BlockDropoutPress(block_size=64), curriculum=LinearCurriculum(0.0, 0.5, 1000), model=model,
                    args=TrainingArguments(...), train_dataset=dataset, tokenizer=tokenizer).train()

One step: the teacher's forward if the objective needs one (no gradient, nothing evicted, adapters off) -> the policy's
plan -> `model(**batch, selection=plan)` -> the objective. Nothing is patched and nothing global is set.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.observers import AttentionSparsity, RetainedAttention
from sparsekv.plan import Observer, SelectionPlan
from sparsekv.policies.base import Policy
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.soft import SoftThreshold
from sparsekv.relevance.files import load_relevance, save_relevance
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    attach_relevance,
    has_relevance,
    relevance_modules,
)
from sparsekv.training.checkpoints import clear, damage, latest_whole, seal
from sparsekv.training.collate import Collator
from sparsekv.training.config import TrainConfig
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.curricula import FixedCurriculum
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.dropping import (
    DroppingConfig,
    achieved_compression,
    make_plan,
    resolve_boundaries,
    row_seeds,
    seed_of,
)
from sparsekv.training.meter import Meter
from sparsekv.training.objectives import EITObjective, Objective, StandardLMObjective
from sparsekv.training.output import (
    load_curriculum,
    write_atomically,
    write_curriculum,
    write_training_config,
)
from sparsekv.training.relaxation import Relaxation, RelaxedRelevance, ScoreQuantiles
from sparsekv.training.samples import Samples
from sparsekv.training.setup import policy_of, with_lora
from sparsekv.training.student import student_output, teacher_output

logger = logging.getLogger(__name__)

SOFTEST_TO_HARDEST = 0.1
"""A SoftThresholdPress starts at its own temperature, which falls linearly to this fraction of it."""

QUANTILES_FILE = "score_quantiles.json"
BOUNDARY, SEEDS = "boundary", "seeds"


class SparseKVTrainer(Trainer):
    """Trains a model under eviction; everything else is `transformers.Trainer`.

    Parameters
    ----------
    model : a supported causal language model, plain or wrapped by PEFT
    args : TrainingArguments
    press : one of `sparsekv`'s presses or kvpress's, optional
        What drops entries; its compression_ratio is the default curriculum. Without one, relevance predictors do.
        The temperature of a SoftThresholdPress falls to a tenth of it over the run.
    curriculum : Curriculum, optional
        The ratio at every step.
    objective : Objective, optional
        `EITObjective()` with predictors, else `StandardLMObjective()`.
    dropping : DroppingConfig, optional
        After a boundary (default), or streaming.
    relaxation : Relaxation, optional
        Train relevance predictors through soft evictions; they are attached if the model has none. With a press too,
        `press_share` of the steps run under the press instead.
    relevance : RelevanceConfig, optional
        Shape of fresh predictors.
    relevance_lr, relevance_weight_decay : float
        Of the predictors.
    lora : LoraOptions, optional
        The adapter that a plain model gets; None leaves the model as it is (full fine-tuning, or what is unfrozen).
    tokenizer : of the data collator, and of policies that look at the text
    train_dataset, eval_dataset : items with input_ids (and labels, boundary, sample_index), or with text
    config : TrainConfig, optional
        What the trainer was built from; written into its checkpoints.
    seq_len : int
        Items with text are cut to so many tokens.

    Raises
    ------
    ConfigError
        For anything that would train nothing: no press and no relaxation, no trainable parameter, DataParallel.
    """

    control: TrainerControl

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
        args = args if args is not None else TrainingArguments(output_dir="output/train")
        if press is None and relaxation is None:
            raise ConfigError(
                "nothing drops entries: give press=..., or relaxation=Relaxation() for predictors"
            )
        if isinstance(model, str):
            from sparsekv.models import load_model

            model, loaded = load_model(model)
            tokenizer = loaded if tokenizer is None else tokenizer
        self.press, self.relaxation, self.press_share = press, relaxation, press_share
        self.policy: Policy | None = None if press is None else policy_of(press)
        self.scope: Scope = getattr(press, "scope", "head")
        self.dropping = dropping or DroppingConfig()
        # A press that was given no ratio, and no curriculum to set one, decides by sizes of its own.
        budget = press.budget() if curriculum is None and hasattr(press, "budget") else None
        self.own_budget: Budget | None = (
            None if budget is None or budget.compression_ratio is not None else budget
        )
        self.curriculum = curriculum or FixedCurriculum(
            float(getattr(press, "compression_ratio", 0.0) or 0.0)
        )
        self.objective = objective or (EITObjective() if relaxation else StandardLMObjective())
        self.relevance_lr, self.relevance_weight_decay = relevance_lr, relevance_weight_decay
        self.quantiles = ScoreQuantiles()
        self.meter = Meter()
        self.config, self.seq_len = config, seq_len
        self._scores: list[Tensor] = []
        prepare(model)
        moves = self.objective.needs_teacher and lora is None and _moves_without_adapters(model)
        self.frozen_teacher = copy.deepcopy(model).eval().requires_grad_(False) if moves else None
        model = with_lora(model, lora, seed=args.seed)
        if relaxation is not None and not has_relevance(model):
            attach_relevance(model, relevance, seed=args.seed)
        for module in relevance_modules(model).values():
            getattr(module, NAME).requires_grad_(relaxation is not None)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                "no parameter of the model is trainable: give lora=LoraOptions(), or unfreeze some"
            )
        args.remove_unused_columns = False
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            args.gradient_checkpointing_kwargs = {
                "use_reentrant": False
            }  # reentrant loses side losses' gradients
        collator = kwargs.pop("data_collator", None)
        if collator is None and tokenizer is not None:
            collator = Collator(tokenizer)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=Samples.of(train_dataset, tokenizer, seq_len),
            eval_dataset=Samples.of(eval_dataset, tokenizer, seq_len),
            processing_class=tokenizer,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise ConfigError(
                "several GPUs in one process (DataParallel) are not supported: start with torchrun"
            )
        # compute_loss divides by the items of the whole step; this version pair would divide once more.
        self.accelerator.gradient_accumulation_steps = 1
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Baseline(self))
        self.add_callback(_LogWithCheckpoints)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. True goes on from the latest whole checkpoint of output_dir.

        Raises
        ------
        ConfigError
            For a checkpoint that is broken or missing, and for a fresh start where output_dir has whole ones.
        """
        output = Path(self.args.output_dir)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            latest = latest_whole(output)
            if latest.path is None:
                raise ConfigError(f"output_dir '{output}' has no whole checkpoint to go on from")
            for path, reason in latest.skipped.items():
                logger.warning("%s is passed over: %s", path, reason)
            checkpoint = str(latest.path)
        elif checkpoint:
            problem = damage(Path(checkpoint))
            if problem is not None:
                raise ConfigError(f"checkpoint '{checkpoint}' can't be resumed from: {problem}")
        elif self.state.global_step == 0 and latest_whole(output).path is not None:
            raise ConfigError(
                f"output_dir '{output}' holds checkpoints of an earlier run; use another output_dir, or go on from "
                "them: train(resume_from_checkpoint=True)"
            )
        return super().train(checkpoint, *args, **kwargs)

    # ---- batches ----------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step, made ready, and the number of label tokens in all of them on all processes."""
        self._fold_scores()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        epoch = int(self.state.epoch or 0)
        ready = [self._ready(batch, epoch) for batch in batches]
        count = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in ready)
        items = torch.as_tensor(count, device=device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return ready, items.clamp_min(1)

    def _ready(self, batch: Mapping[str, Any], epoch: int) -> dict[str, Tensor]:
        """Seeds and boundaries; then what the objective makes of the batch."""
        made = dict(batch)
        first = made["attention_mask"].cumsum(1) <= 1  # a row's first token follows nothing, or padding
        made["labels"] = made["labels"].masked_fill(first, IGNORED)
        seeds = row_seeds(self.args.seed, epoch, made.pop("sample_index"))
        boundaries = resolve_boundaries(made[BOUNDARY], made["attention_mask"], seeds, self.dropping.boundary)
        made = self.objective.prepare(made, boundaries, seeds)
        made[BOUNDARY], made[SEEDS] = torch.tensor(boundaries), torch.tensor(seeds)
        return made

    # ---- one micro-batch ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective under eviction, as a share of the whole step's loss."""
        items = float(num_items_in_batch) if num_items_in_batch is not None else _labels(inputs)
        step, total = self.state.global_step, max(self.state.max_steps, 1)
        ratio = self.curriculum.ratio(step, total)
        policy = self._policy(step, step / total, ratio)
        plan = self.plan(inputs, policy, ratio, observe=True)
        plan.keep_scores = isinstance(policy, RelaxedRelevance)
        plain = self.accelerator.unwrap_model(model)
        teacher = teacher_output(plain, inputs, self.frozen_teacher) if self.objective.needs_teacher else None
        student = student_output(model, plain, inputs, plan)
        losses = self.objective(student, teacher, inputs, plan, items)
        loss = losses.total
        share = _labels(inputs) / items
        sparsity = getattr(self.press, "sparsity", None)
        if sparsity is not None and plan.collected.get("sparsity"):
            loss = (
                loss + sparsity.weight * share * torch.stack(list(plan.collected["sparsity"].values())).mean()
            )
        if self.relaxation is not None:
            rows = _labels_of_rows(inputs) / items
            penalty = self.relaxation.penalty(plan.soft_kept, ratio, rows)
            if penalty is not None:
                loss = loss + penalty
                self.meter.add({"budget_penalty": float(penalty.detach())}, {"budget_penalty": share})
        self._measure(plan, inputs, losses.parts, losses.counts, ratio)
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

        `hard`: soft policies decide as they do when served; predictors by their threshold.
        """
        plain = self.accelerator.unwrap_model(self.model)
        seeds = inputs[SEEDS].tolist()
        budget = self.own_budget or Budget(compression_ratio=ratio, scope=self.scope)
        if isinstance(policy, Relevance):
            budget = Budget()
        plan = make_plan(
            plain,
            dict(inputs),
            policy,
            budget,
            self.dropping,
            boundaries=inputs[BOUNDARY].tolist(),
            seeds=seeds,
            tokenizer=self.processing_class,
            observers=self._observers(seeds, _labels_of_rows(inputs).tolist()) if observe else (),
        )
        plan.hard = hard
        return plan

    def _policy(self, step: int, progress: float, ratio: float) -> Policy:
        """The policy of a step; what is drawn depends on the step alone, so that batching changes nothing."""
        seed = seed_of(self.args.seed, step, 3)
        if self.relaxation is not None and (
            self.policy is None or (seed % 1_000_000) / 1_000_000 >= self.press_share
        ):
            return self.relaxation.policy(progress, self.quantiles.threshold(ratio))
        if self.policy is None:
            raise ConfigError("nothing drops entries")
        draw = getattr(self.policy, "draw", None)
        drawn: Policy = draw(seed) if callable(draw) else self.policy
        if isinstance(drawn, SoftThreshold):
            share = 1 - (1 - SOFTEST_TO_HARDEST) * min(max(progress, 0.0), 1.0)
            return replace(drawn, temperature=drawn.temperature * share)
        return drawn

    def _observers(self, seeds: list[int], weights: list[float]) -> tuple[Observer, ...]:
        found: list[Observer] = []
        kind: Any = self.objective.sparsity_kind or getattr(
            getattr(self.press, "sparsity", None), "kind", None
        )
        if kind is not None:
            found.append(AttentionSparsity(kind=kind, seeds=tuple(seeds), weights=tuple(weights)))
        if (
            self.args.logging_steps
            and (self.state.global_step + 1) % max(int(self.args.logging_steps), 1) == 0
        ):
            found.append(RetainedAttention())
        return tuple(found)

    def _measure(
        self,
        plan: SelectionPlan,
        inputs: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        counts: Mapping[str, int],
        ratio: float,
    ) -> None:
        self.meter.add({name: float(value) for name, value in parts.items()}, counts)
        self.meter.add_tokens(int(inputs["attention_mask"].sum()))
        self.meter.add_mean("requested_compression", ratio)
        achieved = achieved_compression(plan, inputs["attention_mask"], inputs[BOUNDARY].tolist())
        self.meter.add_mean("achieved_compression", achieved)
        retained = plan.collected.get("retained_attention")
        if retained:
            self.meter.add_mean("retained_attention", float(torch.stack(list(retained.values())).mean()))
        if plan.scores and self.relaxation is not None and self.relaxation.threshold == "quantile":
            self._scores += list(plan.scores.values())

    def _fold_scores(self) -> None:
        """Let the running quantiles hear the scores of the step that ended."""
        if self._scores:
            quantiles = ScoreQuantiles.of(self._scores)
            if self.args.world_size > 1:
                quantiles = self.accelerator.reduce(quantiles, "mean")
            self.quantiles.observe(quantiles)
            self._scores = []

    # ---- held-out perplexity ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out perplexity of what follows the boundary: with the full cache, and under eviction at today's ratio.

        The curriculum hears the latter.
        """
        loader = self.get_eval_dataloader(Samples.of(eval_dataset, self.processing_class, self.seq_len))
        step, total = self.state.global_step, max(self.state.max_steps, 1)
        ratio = self.curriculum.ratio(step, total)
        policy = self._policy(step, step / total, ratio)
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        try:
            for batch in loader:
                ready = self._prepare_inputs(self._ready(batch, epoch=-1))
                column = torch.arange(ready["labels"].shape[1], device=ready["labels"].device)
                early = column <= ready[BOUNDARY].to(column.device)[:, None]
                ready["labels"] = ready["labels"].masked_fill(early, IGNORED)
                for place, plan in enumerate((None, self.plan(ready, policy, ratio, hard=True))):
                    output = student_output(model, model, ready, plan)
                    sums[place] += StandardLMObjective()(output, None, ready, None, 1.0).parts["ce"].double()
                sums[2] += _labels(ready)
        finally:
            model.train()
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        count = max(float(sums[2]), 1.0)
        full, evicted = (float(torch.exp(sums[i] / count)) for i in (0, 1))
        self.curriculum.observe(full if self.curriculum.needs_baseline else evicted)
        metrics = {
            f"{metric_key_prefix}_perplexity": full,
            f"{metric_key_prefix}_perplexity_evicted": evicted,
            f"{metric_key_prefix}_ratio": ratio,
            f"{metric_key_prefix}_loss": float(sums[1] / count),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- optimizer, logging, checkpoints ------------------------------------------------------------------

    def create_optimizer(self) -> torch.optim.Optimizer:
        """As Trainer's, with the predictors in a group of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer()
        own = [p for m in relevance_modules(self.model).values() for p in getattr(m, NAME).parameters()]
        own = [p for p in own if p.requires_grad]
        if made and own:
            ids = {id(p) for p in own}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            optimizer.add_param_group(
                {"params": own, "lr": self.relevance_lr, "weight_decay": self.relevance_weight_decay}
            )
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds CE, KL, requested and achieved compression, retained attention and tokens/s to Trainer's logs."""
        if "loss" in logs:
            logs = {**logs, **self.meter.read()}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        if has_relevance(self.model) and not hasattr(self.model, "disable_adapter"):
            state = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in state.items() if f".{NAME}." not in name}
        super()._save(folder, state_dict)
        if has_relevance(self.model):
            save_relevance(self.model, folder)

    def save_weights(self, folder: str | Path) -> None:
        """The adapter or the model, and the predictors; nothing of this machine or of the run."""
        plain: Any = self.accelerator.unwrap_model(self.model)
        state = plain.state_dict()
        own = {name: value for name, value in state.items() if f".{NAME}." not in name}
        plain.save_pretrained(
            str(folder), **({} if hasattr(plain, "disable_adapter") else {"state_dict": own})
        )
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        if has_relevance(plain):
            save_relevance(plain, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clear(folder)
        self.accelerator.wait_for_everyone()
        self._fold_scores()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.is_dir():
            write_curriculum(folder, self.curriculum)
            write_atomically(folder / QUANTILES_FILE, json.dumps(self.quantiles.state_dict()) + "\n")
            if self.config is not None:
                write_training_config(folder, self.config)
            seal(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        if has_relevance(self.model):
            load_relevance(self.model, folder)
        load_curriculum(folder, self.curriculum)
        if (folder / QUANTILES_FILE).exists():
            self.quantiles.load_state_dict(json.loads((folder / QUANTILES_FILE).read_text(encoding="utf-8")))


class _LogWithCheckpoints(TrainerCallback):
    """Logs before every checkpoint: no sum is pending then, so a resumed run logs the same rows."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Called after Trainer's own decision to save."""
        if control.should_save:
            control.should_log = True


class _Baseline(TrainerCallback):
    """Measures the full-cache perplexity before the first step, where a curriculum needs it."""

    def __init__(self, trainer: SparseKVTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate once, if nothing was observed yet."""
        if self.trainer.curriculum.needs_baseline:
            if self.trainer.eval_dataset is None:
                raise ConfigError("curriculum adaptive decides by held-out perplexity: give eval_dataset=...")
            self.trainer.evaluate()


def _labels_of_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """FloatTensor [B]: how many tokens of each row have a label."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1).float()


def _labels(batch: Mapping[str, Tensor]) -> float:
    return float(_labels_of_rows(batch).sum())


def _moves_without_adapters(model: nn.Module) -> bool:
    """True if training changes what the model computes with its adapters off."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return not hasattr(model, "disable_adapter") and any(f".{NAME}." not in name for name in names)
