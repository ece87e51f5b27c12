"""What a trainer is given, made into what it works with: presses to policies, models with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainingArguments

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.models.load import load_config
from sparsekv.models.placement import resolve_device, resolve_dtype
from sparsekv.policies.base import Policy
from sparsekv.policies.soft import SoftThreshold
from sparsekv.policies.soft_scores import SoftScores
from sparsekv.policies.trainable import check_trainable
from sparsekv.relevance.files import load_relevance
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    attach_relevance,
    config_of,
    detach_relevance,
)
from sparsekv.training.config import TrainConfig
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.weights import has_adapter

AnyConfig = TypeVar("AnyConfig", TrainConfig, FitConfig)


def with_dtype(config: AnyConfig) -> AnyConfig:
    """The config with the dtype that "auto" means on this machine.

    So checkpoints and `final/` record what was computed in, and a run that would go on in another dtype, on another
    machine, is refused: its steps would not be those of the run that was interrupted.
    """
    wanted = config.weights_dtype if isinstance(config, TrainConfig) else config.dtype
    dtype = resolve_dtype(wanted, resolve_device(config.device))
    return config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def check_fits_model(config: TrainConfig | FitConfig) -> None:
    """Whether the model can read the sequences, or the contexts, of a config's data; reads no weights.

    Not of question answering, where `seq_len` only says which rows are too long to be used.

    Raises
    ------
    ConfigError
        If some are longer than the model was made for, or there is no such model.
    """
    limit = architecture.max_context(load_config(config.model, trust_remote_code=config.trust_remote_code))
    for field, data in (("data", config.data), ("eval_data", config.eval_data)):
        for part in [] if data is None else data.mix or [data]:
            if part.kind != "qa" and part.length > limit:
                told = f"{field}.{part.length_field} is {part.length} tokens"
                raise ConfigError(f"{told}, the model allows {limit}; give at most so many")


def policy_of(press: Any) -> Policy:
    """The policy behind a press of ours, the same decisions of one of kvpress's, or a policy as it is.

    Raises
    ------
    ConfigError
        For what a training step can't evict by: `policies.trainable` says what that is.
    """
    policy = getattr(press, "policy", None)
    if isinstance(press, Policy):
        policy = press
    if policy is None:
        from sparsekv.policies.press_copies import own_ratio, with_ratio
        from sparsekv.policies.presses import from_press

        # a ratio of its own is the default curriculum, and a curriculum sets every step's
        policy = from_press(with_ratio(press, 0.0) if own_ratio(press) else press)
    made: Policy = policy
    check_trainable(made, getattr(press, "scope", "head"))
    return made


def ratio_of(press: Any) -> float:
    """The ratio of a press of ours or of kvpress's, and of the presses in it; 0 where it has none."""
    from sparsekv.policies.press_copies import own_ratio  # loads kvpress

    return own_ratio(press)


def with_lora(model: Any, options: LoraOptions | None, *, seed: int = 0) -> Any:
    """`model` with a fresh LoRA adapter; as it is without options, or if it has one already.

    `seed`: of the adapter's weights; the global random state is left as it was.

    Raises
    ------
    ConfigError
        For targets that match nothing, and a model that has any adapter but one named "default", which PEFT writes
        where it is looked for.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        if list(model.peft_config) != ["default"]:
            names = ", ".join(repr(name) for name in model.peft_config)
            raise ConfigError(
                f"the model has the adapters {names}: what is trained and saved is one named 'default'; leave out "
                "adapter_name, and delete_adapter others"
            )
        return model
    if options is None:
        return model
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    options.check_targets(linear)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = get_peft_model(model, config)
    architecture.check_supported(made)
    return made


def with_predictors(
    model: Any, wanted: RelevanceConfig, start_from: str | Path | None, *, seed: int = 0
) -> Any:
    """`model` with predictors of a shape: those of a folder, or fresh ones; any that it had are gone.

    `start_from`: folder with relevance.safetensors, or None. `seed`: of fresh weights.

    Raises
    ------
    ConfigError
        If the folder has none, or its predictors are for another model or of another shape.
    """
    detach_relevance(model)
    if start_from is None:
        return attach_relevance(model, wanted, seed=seed)
    load_relevance(model, Path(start_from).expanduser())
    found = config_of(model)
    for key, value in asdict(wanted).items():
        if key != "bias" and found[key] != value:  # where scores start is of no more use
            raise ConfigError(
                f"'{start_from}' has predictors of {key} {found[key]!r}, the config asks for {value!r}"
            )
    return model


def forbid_reentrant(args: TrainingArguments, model: nn.Module) -> None:
    """Make gradient checkpointing, where it is asked for, of the kind that is not reentrant.

    Raises
    ------
    ConfigError
        If reentrant checkpointing is asked for, or was switched on at the model.
    """
    if not args.gradient_checkpointing:
        if any(_checkpoints_reentrantly(module) for module in model.modules()):
            raise ConfigError(
                "the model's gradient checkpointing is reentrant, which loses the gradients of side losses: switch it "
                "on with gradient_checkpointing_enable({'use_reentrant': False}), or with gradient_checkpointing=True "
                "in args"
            )
        return
    given: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})
    if given.setdefault("use_reentrant", False):
        raise ConfigError(
            "gradient_checkpointing_kwargs: use_reentrant must be False; reentrant checkpointing loses the "
            "gradients of side losses"
        )
    args.gradient_checkpointing_kwargs = given


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    """As transformers leaves it: the function stays when checkpointing is switched off again."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(keywords.get("use_reentrant", False))


SOFTEST_TO_HARDEST = 0.1
"""Soft policies of a press start at their own temperature, which falls linearly to this fraction of it."""


def drawn_policy(policy: Policy, seed: int, progress: float) -> Policy:
    """What a press's policy is at `progress` (0 to 1) of training: drawn by `seed` where it draws, and ever harder."""
    draw = getattr(policy, "draw", None)
    drawn: Policy = draw(seed) if callable(draw) else policy
    if isinstance(drawn, (SoftThreshold, SoftScores)):
        share = 1 - (1 - SOFTEST_TO_HARDEST) * min(max(progress, 0.0), 1.0)
        return replace(drawn, temperature=drawn.temperature * share)
    return drawn


def give_own_group(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], *, lr: float, weight_decay: float
) -> None:
    """Move some of an optimizer's parameters to a group of their own."""
    ids = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": list(parameters), "lr": lr, "weight_decay": weight_decay})


def moves_without_adapters(model: nn.Module) -> bool:
    """True if training changes what the model computes with its adapters off: if some parameter is trained that is
    neither an adapter's nor a predictor's (a bias, a norm, the embeddings).
    """
    own = _of_adapters(model)
    return any(
        parameter.requires_grad and id(parameter) not in own and f".{NAME}." not in name
        for name, parameter in model.named_parameters()
    )


def _of_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters that `disable_adapter` takes out of the computation."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not has_adapter(model):
        return set()
    found: set[int] = set()
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            found.update(id(parameter) for parameter in module.parameters())
            kept.update(id(parameter) for parameter in module.get_base_layer().parameters())
        elif isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save, trainable tokens
            found.update(id(parameter) for parameter in module.parameters())
            kept.update(id(parameter) for parameter in module.original_module.parameters())
    return found - kept


REWRITES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""PEFT's initialisations that take out of the base's weights what the fresh adapter holds."""


def check_base(model: Any) -> None:
    """Whether a model with its adapters off is the one that they were put on, as a teacher must be.

    Raises
    ------
    ConfigError
        If an adapter's initialisation changed the base's weights.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        given = getattr(config, "init_lora_weights", None)
        if isinstance(given, str) and given.lower().startswith(REWRITES_BASE):
            raise ConfigError(
                f"init_lora_weights '{given}' changes the base's weights, so with its adapter off the model is no "
                "longer the full-cache teacher that the objective needs; use True, 'gaussian', 'eva' or 'orthogonal', "
                "or an objective without a teacher"
            )
