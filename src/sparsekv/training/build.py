"""From a TrainConfig to a trainer, and the whole run: resume, train, write `final/`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from sparsekv.errors import ConfigError, unknown
from sparsekv.files import check_output_dir
from sparsekv.models import load_model
from sparsekv.models.load import add_adapter
from sparsekv.models.locate import ADAPTER_CONFIG, check_adapter_folder
from sparsekv.policies import make_policy
from sparsekv.relevance.files import RELEVANCE_FILE
from sparsekv.relevance.predictor import RelevanceConfig
from sparsekv.training.checkpoints import check_config, latest_whole, list_checkpoints, step_of
from sparsekv.training.config import TrainConfig
from sparsekv.training.data_split import split_data
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.objectives import make_objective
from sparsekv.training.output import METRICS_FILE, MetricsLog, save_final
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.setup import check_fits_model, policy_of, with_dtype, with_predictors
from sparsekv.training.sharded import is_sharded
from sparsekv.training.trainer import SparseKVTrainer

logger = logging.getLogger(__name__)


def build_trainer(config: TrainConfig) -> SparseKVTrainer:
    """The trainer of a config, with its model and data loaded.

    Raises
    ------
    ConfigError
        For an unknown press, method or objective, LoRA targets that match nothing, predictors to start from of another
        shape, sequences longer than the model allows, or data without a usable row.
    """
    config = with_dtype(config)
    objective = make_objective(config.objective.name, **config.objective.arguments())
    press = press_of(config)
    if press is not None:
        policy_of(press)
    adapter = None if config.adapter is None else _checked_adapter(config.adapter)
    arguments = training_arguments(config, evaluates=config.eval_data is not None or config.held_out > 0)
    check_fits_model(config)
    model, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    train, held_out = split_data(config.data, config.eval_data, config.held_out, config.seed, tokenizer)
    if adapter is not None:
        model = add_adapter(model, adapter, name=config.model, trainable=True)
    if config.train_model == "frozen":
        model.requires_grad_(False)
    options = config.relevance
    relaxation = None
    if options.enabled:
        relaxation = Relaxation(
            threshold=options.threshold,
            noise=options.noise,
            temperature_start=options.temperature_start,
            temperature_end=options.temperature_end,
            budget_weight=options.budget_weight,
            n_sink=options.n_sink,
            n_recent=options.n_recent,
        )
    shape = RelevanceConfig(options.width, options.bias, tuple(options.features))
    if adapter is not None and options.enabled and (adapter / RELEVANCE_FILE).exists():
        with_predictors(model, shape, adapter)
    if options.enabled and options.start_from is not None:
        with_predictors(model, shape, options.start_from)
    return SparseKVTrainer(
        model,
        arguments,
        press=press,
        curriculum=config.make_curriculum(),
        objective=objective,
        dropping=DroppingConfig(config.dropping, config.boundary, config.window or 1),
        relaxation=relaxation,
        relevance=shape,
        relevance_lr=options.lr,
        relevance_weight_decay=options.weight_decay,
        relevance_start_share=options.start_share,
        press_share=config.press_share,
        lora=config.lora,
        tokenizer=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        config=config,
    )


def run_training(
    config: TrainConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = logger.warning,
) -> Path:
    """Train to the end, going on from the newest whole checkpoint, and return `output_dir/final`.

    Parameters
    ----------
    progress : hears one line per thing that a user may want to know
    warn : hears one line per thing that a user has to know: checkpoints that are passed over

    Raises
    ------
    ConfigError
        Also if output_dir can't be a folder, or holds a run that may not be resumed or checkpoints of another config.
    """
    config = with_dtype(config)
    output = Path(config.output_dir).expanduser()
    check_output_dir(output)
    latest = latest_whole(output)
    if not config.resume and list_checkpoints(output):
        raise ConfigError(
            f"output_dir '{output}' holds checkpoints and resume is false; use another output_dir, or resume: true"
        )
    for path, reason in latest.skipped.items():
        warn(f"{path} is passed over: {reason}")
    if latest.path is not None:
        check_config(latest.path, config)
        progress(f"going on from {latest.path}")
    trainer = build_trainer(config)
    main = trainer.is_world_process_zero()
    log = MetricsLog(output / METRICS_FILE)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        # A run that starts anew also forgets the rows before the first step.
        log.start(-1 if latest.path is None else step_of(latest.path))
        trainer.add_callback(_ToFile(log))
    trainer.train(resume_from_checkpoint=None if latest.path is None else str(latest.path))
    final = output / "final"
    if main:
        save_dtype = None if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
        return save_final(
            output,
            config,
            save_weights=partial(trainer.save_weights, dtype=save_dtype),
            tokenizer=trainer.processing_class,
            curriculum=trainer.curriculum,
        )
    if is_sharded(trainer.model):  # the first process gathers what the others hold
        trainer.save_weights(final)
    return final


def training_arguments(config: TrainConfig, *, evaluates: bool) -> TrainingArguments:
    """transformers' arguments of a config.

    Raises
    ------
    ConfigError
        For an unknown optimizer, or metrics that would go to something that is not installed.
    """
    warmup = config.warmup if config.warmup >= 1 else math.ceil(config.warmup * config.steps)
    optimizers = [str(name.value) for name in OptimizerNames]
    if config.optimizer not in optimizers:
        raise unknown("optimizer", config.optimizer, optimizers)
    places = [*get_available_reporting_integrations(), "all"]
    for place in config.report_to:
        if place not in places:
            raise unknown("installed report_to", place, places)
    return TrainingArguments(
        output_dir=str(Path(config.output_dir).expanduser()),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        optim=config.optimizer,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        warmup_steps=int(warmup),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep_checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every or None,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to) or "none",
        disable_tqdm=not config.progress,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=config.device == "cpu",
        # Every process reads the data by itself: one that hands out to the others needs samples of equal length.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def press_of(config: TrainConfig) -> Any:
    """The press, or the method as a press; None if predictors alone drop entries."""
    from sparsekv.policies.as_press import PolicyPress

    if config.press is not None:
        from sparsekv.policies.training_presses import PRESSES

        kind = PRESSES.get(config.press.name)
        parameters = signature(kind).parameters.values()
        if not any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
            allowed = [each.name for each in parameters]
            for key in config.press.args:
                if key not in allowed:
                    raise unknown(f"argument of press {config.press.name}", key, allowed)
        return kind(**config.press.args)
    if config.method is not None:
        policy = policy_of(make_policy(config.method.name, **config.method.args))
        return PolicyPress(policy, 0.0, scope=config.method.budget_scope)
    return None


def _checked_adapter(given: str) -> Path:
    """The folder of the LoRA adapter that training goes on from.

    Raises
    ------
    ConfigError
        If it can't be loaded, or holds no adapter.
    """
    folder = check_adapter_folder(given)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"adapter '{given}' holds relevance predictors alone; relevance: {{start_from: {given}}} goes on from them"
        )
    return folder


class _ToFile(TrainerCallback):
    """Every log row into metrics.jsonl."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append what was logged, without Trainer's running totals at the end."""
        if logs and "train_runtime" not in logs:
            self.log.append(state.global_step, {key: value for key, value in logs.items() if key != "epoch"})
