"""What a training config may say. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparsekv.config import DType, Strict, parse_config
from sparsekv.config_files import load_settings
from sparsekv.training.config_parts import (
    CurriculumConfig,
    LoraOptions,
    Method,
    NotNegative,
    Objective,
    Positive,
    Press,
    PressConfig,
    RelevanceOptions,
    Seed,
    TrainMethodConfig,
    TrainModel,
    protected_tokens,
)
from sparsekv.training.curricula import Curriculum, is_fixed
from sparsekv.training.data_spec import DataConfig


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
    dtype, device, trust_remote_code : how the model is loaded (load_model). With train_model "full" the weights are
        float32, which "auto" then means
    bf16 : compute in bfloat16 where that is safe (autocast), whatever dtype the weights have
    seed : of the data, the random presses and the weights of adapters and predictors
    output_dir : where checkpoints and the result go; the same command again resumes
    data : what is trained on
    eval_data : held-out data, for perplexity under eviction
    held_out : instead of eval_data: so many samples of `data` are set aside and never trained on; self-supervised ones
        are made of the last tenth of the text (about four contexts at least), which no other sample is made of
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
    lora : the fresh adapter; only with train_model "lora" and without `adapter`
    steps : optimizer steps
    batch_size, accumulation : samples per forward on each process, and forwards per step
    optimizer : one of the names of transformers' `TrainingArguments.optim`
    lr, schedule, warmup : learning rate, its course, and steps (or a fraction of all) until it is reached
    weight_decay, max_grad_norm : of the model's parameters, in AdamW's way; 0 switches clipping off
    gradient_checkpointing : compute activations again in the backward pass instead of keeping them
    save_every, keep_checkpoints : steps between checkpoints, and how many of the latest stay (at least 2, so that
        there is one to fall back to)
    save_dtype : dtype of the adapter or model in final/; "auto": as it was trained (an adapter: float32). Checkpoints
        are exact whatever it is
    eval_every : steps between evaluations on held-out data; 0: none
    log_every : steps between rows of metrics.jsonl
    resume : go on from the latest whole checkpoint of output_dir, if there is one. False: output_dir must hold none.
    report_to : further places that metrics go to ("tensorboard", "wandb", …)
    progress : print what happens
    """

    model: str = Field(min_length=1)
    adapter: str | None = None
    dtype: DType = "auto"
    bf16: bool = False
    device: str = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
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
    save_dtype: DType = "auto"
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
        if values.get("adapter") is not None:
            # All defaults count as not given: that is what configs of earlier versions were saved with.
            if values.get("lora") not in (None, {}, LoraOptions(), LoraOptions().model_dump()):
                raise ValueError(
                    f"lora is given beside adapter '{values['adapter']}', whose rank, alpha, dropout and targets are "
                    "its own; leave lora out"
                )
            return {**values, "lora": None}
        if "lora" in values and values["lora"] is None:
            raise ValueError(
                "lora is null, so what is trained? Give train_model: full, or frozen for predictors alone"
            )
        return {"lora": {}, **values}

    @model_validator(mode="after")
    def _check_what_is_trained(self) -> TrainConfig:
        if self.lora is not None and self.train_model != "lora":
            raise ValueError(f"lora is given, but train_model is '{self.train_model}'; give one")
        if self.adapter is not None and self.train_model != "lora":
            raise ValueError(
                f"adapter '{self.adapter}' is given, but train_model is '{self.train_model}'; training goes on from an "
                "adapter with train_model lora only (sparsekv merge makes a model of it)"
            )
        if self.train_model == "full" and self.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"dtype '{self.dtype}' with train_model 'full': updates smaller than a 16-bit weight's last digit "
                "would be lost; give dtype: float32, and bf16: true to compute in bfloat16"
            )
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
        self._check_that_every_step_trains()
        return self

    def _check_that_every_step_trains(self) -> None:
        drops = self.drops
        if drops is None:
            return
        curriculum = self.make_curriculum()
        if drops.has_threshold and not self.relevance.enabled and not is_fixed(curriculum, 0.0):
            raise ValueError(
                f"'{drops.name}' has a threshold of its own, which no ratio can be given beside; give "
                "curriculum: {name: fixed, args: {ratio: 0.0}}"
            )
        if drops.trains_predictors:
            return
        if self.train_model == "frozen":
            raise ValueError(
                f"train_model 'frozen' trains predictors alone, and nothing reaches them in the steps of "
                f"'{drops.name}'; leave it out, or give train_model: lora"
            )
        if self.press_share == 1:
            raise ValueError(
                f"press_share 1 gives every step to '{drops.name}', so predictors would never be trained; give less, "
                "or relevance: {enabled: false}"
            )

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
            length = part.length
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
    def drops(self) -> PressConfig | TrainMethodConfig | None:
        """The press or method; None if predictors alone drop entries."""
        return self.press if self.press is not None else self.method

    @property
    def weights_dtype(self) -> DType:
        """What the weights are loaded in: `dtype`, but float32 for "auto" where all of them are trained."""
        return "float32" if self.train_model == "full" and self.dtype == "auto" else self.dtype

    @property
    def protected(self) -> int:
        """First and last entries that always stay, as far as the config says."""
        if self.drops is not None:
            return protected_tokens(self.drops.args)
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
