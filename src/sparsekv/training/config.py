"""What a training config may say, and the same as a dataclass for eviction-invariant training. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparsekv.config import DType, Strict, parse_config
from sparsekv.config_files import load_settings
from sparsekv.errors import ConfigError, unknown
from sparsekv.training.config_parts import (
    CurriculumConfig,
    LoraOptions,
    Method,
    NotNegative,
    Objective,
    Positive,
    Press,
    RelevanceOptions,
    TrainModel,
    protected_tokens,
)
from sparsekv.training.curricula import Curriculum
from sparsekv.training.data_spec import DataConfig

if TYPE_CHECKING:
    from sparsekv.policies.anchors import AnchorConfig
    from sparsekv.training.trainer import SparseKVTrainer


def _listed(value: Any) -> Any:
    if value in (None, "none"):
        return []
    return [value] if isinstance(value, str) else value


class TrainConfig(Strict):
    """`sparsekv train`: fine-tune a model while KV entries are missing.

    Parameters
    ----------
    model : a Hub id, a local folder, or a name of `sparsekv ls models`
    adapter : folder of a LoRA adapter (and its predictors) to start from
    dtype, device, trust_remote_code : how the model is loaded (load_model)
    seed : of the data, the random presses and the weights of adapters and predictors
    output_dir : where checkpoints and the result go; the same command again resumes
    data : what is trained on
    eval_data : held-out data, for perplexity under eviction
    held_out : instead of eval_data: so many samples of `data` are set aside and never trained on
    press : a training press that drops entries
    method : a method of `sparsekv ls methods` that does, instead of a press
    relevance : predictors of relevance, trained along; they drop entries in the steps that no press or method takes
    press_share : with relevance and a press or method: the fraction of steps that the latter takes, in (0, 1]
    dropping : "prefill": entries of the context vanish for everything after a boundary. "streaming": an entry
        leaves once it is outside the window, unless it is kept.
    window : the last so many tokens that every query sees, for streaming
    boundary : "end": where a sample's own context ends (a random place where it has none); "random": a random place
        in every sample. For prefill.
    objective : what is minimised
    curriculum : the ratio (fraction REMOVED) at every step
    train_model : "lora", "full" (all parameters) or "frozen" (only the predictors)
    lora : the adapter; only with train_model "lora"
    steps : optimizer steps
    batch_size, accumulation : samples per forward on each process, and forwards per step
    optimizer : one of the names of transformers' `TrainingArguments.optim`
    lr, schedule, warmup : learning rate, its course, and steps (or a fraction of all) until it is reached
    weight_decay, max_grad_norm : of the model's parameters, in AdamW's way; 0 switches clipping off
    gradient_checkpointing : compute activations again in the backward pass instead of keeping them
    save_every, keep_checkpoints : steps between checkpoints, and how many of the latest stay (at least 2, so that
        there is one to fall back to)
    eval_every : steps between evaluations on held-out data; 0: none
    log_every : steps between rows of metrics.jsonl
    resume : go on from the latest whole checkpoint of output_dir, if there is one. False: output_dir must hold none.
    report_to : further places that metrics go to ("tensorboard", "wandb", …)
    progress : print what happens
    """

    model: str = Field(min_length=1)
    adapter: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = Field(default=0, ge=0)
    output_dir: str = Field(default="output/train", min_length=1)
    data: DataConfig
    eval_data: DataConfig | None = None
    held_out: int = Field(default=0, ge=0)
    press: Press | None = None
    method: Method | None = None
    relevance: RelevanceOptions = RelevanceOptions()
    press_share: float = Field(default=0.0, ge=0, le=1)
    dropping: Literal["prefill", "streaming"] = "prefill"
    window: int | None = Field(default=None, ge=1)
    boundary: Literal["end", "random"] = "end"
    objective: Objective
    curriculum: CurriculumConfig
    train_model: TrainModel = "lora"
    lora: LoraOptions | None = None
    steps: int = Field(ge=1)
    batch_size: int = Field(default=1, ge=1)
    accumulation: int = Field(default=1, ge=1)
    optimizer: str = "adamw_torch"
    lr: Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NotNegative = 0
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    gradient_checkpointing: bool = False
    save_every: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=2)
    eval_every: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    resume: bool = True
    report_to: Annotated[list[str], BeforeValidator(_listed)] = Field(default=[])
    progress: bool = True

    @model_validator(mode="before")
    @classmethod
    def _default_adapter(cls, values: Any) -> Any:
        # `lora: null` and no `lora` at all mean different things, which only the unparsed values tell apart.
        if not isinstance(values, dict) or values.get("train_model", "lora") != "lora":
            return values
        if "lora" in values and values["lora"] is None:
            raise ValueError(
                "lora is null, so what is trained? Give train_model: full, or frozen for predictors alone"
            )
        return {"lora": {}, **values}

    @model_validator(mode="after")
    def _check_what_is_trained(self) -> TrainConfig:
        if self.lora is not None and self.train_model != "lora":
            raise ValueError(f"lora is given, but train_model is '{self.train_model}'; give one")
        if self.train_model == "frozen" and not self.relevance.enabled:
            raise ValueError("train_model 'frozen' trains nothing without relevance: {enabled: true}")
        if self.press is not None and self.method is not None:
            raise ValueError(
                f"press '{self.press.name}' and method '{self.method.name}' are both given; give one"
            )
        if self.press is None and self.method is None and not self.relevance.enabled:
            raise ValueError("nothing drops entries; give press, method, or relevance: {enabled: true}")
        both = self.relevance.enabled and (self.press is not None or self.method is not None)
        if both != (self.press_share > 0):
            given = "with" if both else "without"
            raise ValueError(
                f"press_share {self.press_share:g} {given} both relevance and a press or method; it says which share "
                "of the steps the press takes when predictors are trained too"
            )
        return self

    @model_validator(mode="after")
    def _check_dropping(self) -> TrainConfig:
        if (self.dropping == "streaming") != (self.window is not None):
            raise ValueError(
                f"dropping is '{self.dropping}' and window is {self.window}; streaming needs one, prefill has none"
            )
        if self.dropping == "streaming" and self.boundary == "random":
            raise ValueError(
                "boundary 'random' belongs to dropping 'prefill'; streaming has a window instead"
            )
        for part in self.data.mix or [self.data]:
            length = part.context_tokens if part.kind == "selfsup" else part.seq_len
            kept = self.protected
            if kept >= length:
                raise ValueError(
                    f"sequences of {length} tokens are no longer than the {kept} sink and recent tokens that always "
                    "stay: nothing would ever be dropped"
                )
            if self.window is not None and self.window >= length:
                raise ValueError(
                    f"window must be less than the sequences' {length} tokens, got {self.window}: "
                    "nothing would ever be dropped"
                )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> TrainConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps {self.steps}, got {self.warmup}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be whole steps, or a fraction of all below 1, got {self.warmup}")
        if self.eval_data is not None and self.held_out:
            raise ValueError(f"eval_data and held_out {self.held_out} are both given; give one")
        held_out = self.eval_data is not None or self.held_out > 0
        if self.eval_every and not held_out:
            raise ValueError(f"eval_every {self.eval_every} needs eval_data or held_out")
        if held_out and not self.eval_every:
            raise ValueError("eval_data or held_out is given, but eval_every is 0; give the steps between")
        if self.make_curriculum().adaptive and not self.eval_every:
            raise ValueError(
                "curriculum adaptive decides by held-out perplexity; give eval_every, and eval_data or held_out"
            )
        return self

    @property
    def protected(self) -> int:
        """First and last entries that always stay, as far as the config says."""
        if self.press is not None:
            return protected_tokens(self.press.args)
        if self.method is not None:
            return protected_tokens(self.method.args)
        return self.relevance.n_sink + self.relevance.n_recent

    def make_curriculum(self) -> Curriculum:
        """A fresh curriculum."""
        return self.curriculum.make()


def load_train_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A validated config from a YAML file with `key=value` overrides on top.

    Raises
    ------
    ConfigError
        With one line that names the key, the value and what is allowed.
    """
    source = None if path is None else str(path)
    return parse_config(TrainConfig, load_settings(path, overrides), source=source)


@dataclass
class EITConfig:
    """Eviction-invariant training: anchors and some others stay, and the model is to answer as with the full cache.

    EITConfig(model_name="smollm2", lambda_kl=0.5).build_trainer().train()

    Parameters
    ----------
    model_name : as `TrainConfig.model`
    anchor : AnchorConfig, optional
        What always stays, as far as the budget allows. The rest of the budget is filled by other tokens, drawn at
        random.
    lambda_kl : float >= 0
        Weight of the KL to the full-cache teacher, beside a cross-entropy of weight 1.
    temperature : float > 0
        Of both distributions in that KL.
    scheduler_mode : "adaptive", "linear", "cosine" or "fixed"
        How the kept fraction goes from the first to the second of the next two; "fixed" stays at the second.
    initial_keep_ratio, min_keep_ratio : float in (0, 1]
        Fractions that STAY. Everything else here counts what is removed.
    warmup_steps : int or float, optional
        Steps (a fraction: of all) from one to the other, for "linear" and "cosine"; by default 0.6 of all.
    num_train_samples : int >= 1
        Samples seen; with batch_size and accumulation they make the steps.
    data : DataConfig or its settings as a dict, optional
        By default questions made from the packaged book.
    held_out : int
        Samples set aside for "adaptive"; others need none.
    settings : dict, optional
        Further keys of TrainConfig, on top of all this.
    output_dir, seed, dtype, learning_rate, lora_r, lora_alpha, batch_size, accumulation, gradient_checkpointing
        As in TrainConfig.
    """

    model_name: str
    anchor: AnchorConfig | None = None
    lambda_kl: float = 0.5
    temperature: float = 1.0
    scheduler_mode: str = "adaptive"
    initial_keep_ratio: float = 0.9
    min_keep_ratio: float = 0.3
    warmup_steps: float | None = None
    num_train_samples: int = 1600
    output_dir: str = "output/eit"
    data: DataConfig | dict[str, Any] | None = None
    held_out: int = 32
    batch_size: int = 1
    accumulation: int = 8
    learning_rate: float = 2e-4
    lora_r: int = 64
    lora_alpha: float = 128
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: str = "auto"
    settings: dict[str, Any] | None = None

    def to_train_config(self) -> TrainConfig:
        """The same as a TrainConfig.

        Raises
        ------
        ConfigError
            For a value that is not allowed.
        """
        for field in ("num_train_samples", "batch_size", "accumulation"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} must be a whole number >= 1, got {value!r}")
        steps = -(-self.num_train_samples // (self.batch_size * self.accumulation))
        adaptive = self.scheduler_mode == "adaptive"
        every = max(1, steps // 20)
        data = self.data.model_dump() if isinstance(self.data, DataConfig) else self.data or {}
        made: dict[str, Any] = {
            "model": self.model_name,
            "dtype": self.dtype,
            "seed": self.seed,
            "output_dir": self.output_dir,
            "data": data,
            "method": {"name": "anchors", "args": {**self._anchor_args(), "fill": "random"}},
            "objective": {"name": "eit", "lambda_kl": self.lambda_kl, "temperature": self.temperature},
            "curriculum": self._curriculum(),
            "lora": {"r": self.lora_r, "alpha": self.lora_alpha},
            "steps": steps,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "lr": self.learning_rate,
            "gradient_checkpointing": self.gradient_checkpointing,
            "held_out": self.held_out if adaptive else 0,
            "eval_every": every if adaptive else 0,
        }
        return parse_config(TrainConfig, {**made, **(self.settings or {})}, source="EITConfig")

    def build_trainer(self) -> SparseKVTrainer:
        """The trainer, with its model loaded; `.train()` runs it."""
        config = self.to_train_config()
        from sparsekv.training.build import build_trainer

        return build_trainer(config)

    def _anchor_args(self) -> dict[str, Any]:
        from sparsekv.policies.anchors import AnchorConfig

        anchor = self.anchor or AnchorConfig()
        args = {field.name: getattr(anchor, field.name) for field in fields(anchor)}
        return {**args, "extra_punctuation": list(anchor.extra_punctuation)}

    def _curriculum(self) -> dict[str, Any]:
        keep = {"initial_keep_ratio": self.initial_keep_ratio, "min_keep_ratio": self.min_keep_ratio}
        mode = self.scheduler_mode
        if mode == "fixed":
            return {"name": mode, "args": {"keep_ratio": self.min_keep_ratio}}
        if mode == "adaptive":
            return {"name": mode, "args": keep}
        if mode in ("linear", "cosine"):
            length = 0.6 if self.warmup_steps is None else self.warmup_steps
            return {"name": mode, "args": {**keep, "warmup_steps": length}}
        raise unknown("scheduler_mode", mode, ("adaptive", "linear", "cosine", "fixed"))
