"""What a config of `sparsekv relevance fit` may say. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparsekv.config import DType, Ratio, Strict, parse_config
from sparsekv.config_files import load_settings
from sparsekv.training.config import TrainConfig
from sparsekv.training.config_parts import (
    CurriculumConfig,
    Features,
    NotNegative,
    Objective,
    ObjectiveConfig,
    Positive,
    Seed,
)
from sparsekv.training.data_spec import DataConfig

TRAINING = "training"
"""Sub-folder of output_dir that holds the training run of way "end_to_end"."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class PredictorOptions(Strict):
    """The predictors, and how they are to be served.

    Parameters
    ----------
    width : hidden units of a two-layer predictor; 0: linear
    features : what it reads: "hidden" (the hidden state), "attention", "handcrafted"
    bias : where the scores start, for "end_to_end"; a regression starts at the mean of its first targets
    n_sink, n_recent : first and last entries of a context that always stay; nothing is fitted on them
    serve_ratio : the fraction REMOVED, of what may leave of held-out contexts, over the whole model, where g = 0: what
        the method `relevance` evicts without a budget. For "regression"; "end_to_end" holds its own budget.
    """

    width: int = Field(default=0, ge=0)
    features: Features = ["hidden"]  # noqa: RUF012 (pydantic copies it)
    bias: float = Field(default=3.0, allow_inf_nan=False)
    n_sink: int = Field(default=4, ge=0)
    n_recent: int = Field(default=16, ge=0)
    serve_ratio: Ratio = 0.7


class FutureOptions(Strict):
    """Whose attention tells which entries matter: a target is the most that any query of any future gives an entry.

    Parameters
    ----------
    kinds : "continuation": what follows the context, its questions and answers or the rest of the text;
        "reconstruction": the model repeats the context after it (KVzip, arXiv 2505.23416, section 3)
    chunk_tokens : "reconstruction": the context is repeated in pieces of so many tokens
    floor : attention below it counts as it, so that the logarithms of nothing do not decide
    """

    kinds: Annotated[list[Literal["continuation", "reconstruction"]], BeforeValidator(_as_list)] = Field(
        default=["continuation", "reconstruction"], min_length=1
    )
    chunk_tokens: int = Field(default=2048, ge=16)
    floor: float = Field(default=1e-6, gt=0, lt=1)


class RegressionOptions(Strict):
    """How predictors are fitted to the targets.

    Parameters
    ----------
    loss : "mse" on the logarithm of the target; "bce" on whether an entry is among the model's top ones; "ranking":
        the logistic loss of pairs of entries of the whole model, by which of them has the larger target
    solver : "adamw", or "least_squares": the exact minimum of mse, for linear predictors
    ridge : "least_squares": penalty on the weights, as a fraction of the mean square of a feature
    top_ratio : "bce": the fraction that is NOT among the top
    pairs : "ranking": pairs drawn per sample
    """

    loss: Literal["mse", "bce", "ranking"] = "mse"
    solver: Literal["adamw", "least_squares"] = "adamw"
    ridge: Positive = 1e-3
    top_ratio: Ratio = 0.7
    pairs: int = Field(default=16_384, ge=1)

    @model_validator(mode="after")
    def _solvable(self) -> RegressionOptions:
        if self.solver == "least_squares" and self.loss != "mse":
            raise ValueError(f"solver 'least_squares' minimises loss 'mse', got loss '{self.loss}'")
        return self


class EndToEndOptions(Strict):
    """Distillation through the relaxed Selection; see `sparsekv train`, whose keys these are.

    Parameters
    ----------
    objective : what is minimised
    curriculum : the ratio (fraction REMOVED) at every step
    threshold, noise, temperature_start, temperature_end, budget_weight : of the relaxation
    gradient_checkpointing : compute activations again in the backward pass instead of keeping them
    """

    objective: Objective = ObjectiveConfig(name="eit")
    curriculum: CurriculumConfig = CurriculumConfig(
        name="spread",
        args={"start_ratio": 0.1, "end_ratio": 0.6, "top_ratio": 0.85, "warmup_steps": 0.5},
    )
    threshold: Literal["learned", "quantile"] = "quantile"
    noise: NotNegative = 0.5
    temperature_start: Positive = 1.0
    temperature_end: Positive = 0.4
    budget_weight: NotNegative = 50.0
    gradient_checkpointing: bool = False


class FitConfig(Strict):
    """`sparsekv relevance fit`: fit relevance predictors on a frozen model.

    Parameters
    ----------
    model, dtype, device, trust_remote_code : as for `sparsekv train`
    seed : of the data, its order, and the predictors' first weights
    output_dir : where checkpoints and `final/` go; the same command again resumes
    way : "regression" on what later queries attend to, or "end_to_end" through the relaxed Selection
    start_from : folder with predictors (relevance.safetensors) to start from
    data : what is fitted on
    held_out : samples that are never fitted on and judge the result
    eval_data : where they come from; by default they are set aside from `data`, whose text they then share
    predictor : the predictors, and how they are to be served
    futures : what a regression is fitted to, and what held-out rank correlations are with, either way
    regression, end_to_end : what the way needs
    steps : optimizer steps
    batch_size : samples per step, read one after the other
    lr, schedule, warmup, weight_decay : of the predictors; warmup is steps, or a fraction of all below 1
    save_every, keep_checkpoints, log_every, resume, progress : as for `sparsekv train`
    """

    model: str = Field(min_length=1)
    dtype: DType = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
    output_dir: str = Field(default="output/relevance", min_length=1)
    way: Literal["regression", "end_to_end"] = "regression"
    start_from: str | None = None
    data: DataConfig
    held_out: int = Field(default=16, ge=1)
    eval_data: DataConfig | None = None
    predictor: PredictorOptions = PredictorOptions()
    futures: FutureOptions = FutureOptions()
    regression: RegressionOptions = RegressionOptions()
    end_to_end: EndToEndOptions = EndToEndOptions()
    steps: int = Field(ge=1)
    batch_size: int = Field(default=1, ge=1)
    lr: Positive = 2e-2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NotNegative = 0
    weight_decay: NotNegative = 0.0
    save_every: int = Field(default=25, ge=1)
    keep_checkpoints: int = Field(default=2, ge=2)
    log_every: int = Field(default=10, ge=1)
    resume: bool = True
    progress: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> FitConfig:

        def given(key: str) -> bool:
            return bool(getattr(self, key) != type(self).model_fields[key].default)

        other = {"regression": "end_to_end", "end_to_end": "regression"}[self.way]
        if given(other):
            raise ValueError(f"{other} is given, but way is '{self.way}'; give one")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps {self.steps}, got {self.warmup}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be whole steps, or a fraction of all below 1, got {self.warmup}")
        if self.regression.solver == "least_squares":
            if self.predictor.width:
                raise ValueError(
                    f"solver 'least_squares' needs linear predictors (width 0), got width {self.predictor.width}"
                )
            for key in ("lr", "schedule", "warmup", "weight_decay", "start_from"):
                if given(key):
                    raise ValueError(
                        f"{key} is of no use to solver 'least_squares', which needs no steps downhill"
                    )
        kept = self.predictor.n_sink + self.predictor.n_recent
        for part in self.data.mix or [self.data]:
            length = part.context_tokens if part.kind == "selfsup" else part.seq_len
            if kept >= length:
                raise ValueError(
                    f"sequences of {length} tokens are no longer than the {kept} sink and recent tokens that always "
                    "stay: there would be nothing to fit"
                )
        if self.way == "end_to_end":
            self.train_config()
        return self

    def judged_data(self) -> DataConfig | None:
        """`eval_data` with as many samples as are judged; None: they are set aside from `data`."""
        if self.eval_data is None:
            return None
        return self.eval_data.model_copy(update={"n_samples": self.held_out})

    def train_config(self) -> TrainConfig:
        """The training run of way "end_to_end": predictors alone, one sample per forward.

        Raises
        ------
        ConfigError
            For a combination that training refuses.
        """
        own, relaxed, judged = self.predictor, self.end_to_end, self.judged_data()
        settings: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "seed": self.seed,
            "output_dir": str(Path(self.output_dir) / TRAINING),
            "data": self.data.model_dump(),
            "eval_data": None if judged is None else judged.model_dump(),
            "held_out": self.held_out if judged is None else 0,
            "eval_every": self.steps,
            "relevance": {
                "enabled": True,
                "width": own.width,
                "features": own.features,
                "bias": own.bias,
                "n_sink": own.n_sink,
                "n_recent": own.n_recent,
                "start_from": self.start_from,
                "threshold": relaxed.threshold,
                "noise": relaxed.noise,
                "temperature_start": relaxed.temperature_start,
                "temperature_end": relaxed.temperature_end,
                "budget_weight": relaxed.budget_weight,
                "lr": self.lr,
                "weight_decay": self.weight_decay,
            },
            "objective": relaxed.objective.model_dump(),
            "curriculum": relaxed.curriculum.model_dump(),
            "train_model": "frozen",
            "gradient_checkpointing": relaxed.gradient_checkpointing,
            "steps": self.steps,
            "batch_size": 1,
            "accumulation": self.batch_size,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "save_every": self.save_every,
            "keep_checkpoints": self.keep_checkpoints,
            "log_every": self.log_every,
            "resume": self.resume,
            "progress": self.progress,
        }
        return parse_config(TrainConfig, settings)


def load_fit_config(path: str | Path | None, overrides: Sequence[str] = ()) -> FitConfig:
    """A validated config from a YAML file with `key=value` overrides on top.

    Raises
    ------
    ConfigError
        With one line that names the key, the value and what is allowed.
    """
    return parse_config(FitConfig, load_settings(path, overrides), source=None if path is None else str(path))
