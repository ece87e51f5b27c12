"""The parts of a training config: what is dropped, what is trained, what is minimised. Imports no torch.

Names of presses and methods are looked up where these are made (`training.build`): their registries know them, and name
the nearest one for a wrong name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparsekv.config import Strict
from sparsekv.errors import ConfigError, nearest, unknown
from sparsekv.policies.spellings import names_of
from sparsekv.training.curricula import Curriculum, make_curriculum

FEATURES = ("hidden", "attention", "handcrafted")
"""What predictors may read (`relevance.features.GROUPS`, which can't be imported without torch)."""

TrainModel = Literal["lora", "full", "frozen"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What numpy's global generator takes, which transformers seeds too."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_BUDGETS = (*names_of("compression_ratio"), "tokens")

_SOFT = "soft_threshold"


def named(value: Any) -> Any:
    """`snapkv` is short for `{name: snapkv}`."""
    return {"name": value} if isinstance(value, str) else value


def protected_tokens(args: dict[str, Any]) -> int:
    """Entries that the args of a press or method always keep: first and last ones, as far as they say."""

    def size(parameter: str) -> int:
        given = [args[name] for name in names_of(parameter) if isinstance(args.get(name), int)]
        return given[0] if given else 0

    return size("n_sink") + size("n_recent")


class Named(Strict):
    """A name with arguments."""

    name: str = Field(min_length=1)
    args: dict[str, Any] = Field(default={})


class _Dropping(Named):
    @model_validator(mode="after")
    def _ratio_is_the_curriculums(self) -> _Dropping:
        for key in _BUDGETS:
            if key in self.args:
                raise ValueError(
                    f"args of '{self.name}' has {key}; the curriculum sets the ratio at every step "
                    "(curriculum: {name: fixed, args: {ratio: 0.5}} for one that stays)"
                )
        if self.args.get("scope") == "model":
            raise ValueError(
                f"args of '{self.name}' has scope 'model', which needs the scores of every layer before the first one "
                "attends; allowed while training: 'head' or 'layer'"
            )
        return self

    @property
    def has_threshold(self) -> bool:
        """True if a threshold of its own decides, and no ratio."""
        return self.name == _SOFT and self.args.get("threshold") is not None

    @property
    def trains_predictors(self) -> bool:
        """True if gradients reach relevance predictors through what it hides."""
        return self.name == _SOFT and self.args.get("on") == "relevance"


class PressConfig(_Dropping):
    """A training press: block_dropout, adaptive_block_dropout, variable_block_dropout, sentence_dropout,
    soft_threshold, eviction_aug, sparse_reg.

    Parameters
    ----------
    name : the press
    args : its parameters without a ratio, for example {block_size: 64, n_sink: 4, n_recent: 64}
    """


class TrainMethodConfig(_Dropping):
    """A method of `sparsekv ls methods` that drops entries while training.

    Parameters
    ----------
    name : the method
    args : the parameters of its policy
    budget_scope : over what the count of kept entries is fixed: "head" or "layer" (each layer decides while it runs,
        so none can be shared by the whole model)
    """

    budget_scope: Literal["head", "layer"] = "head"


OWN_OBJECTIVES = ("standard_lm", "sparse_lm", "reconstruction", "eit", "mixed")
"""The objectives of this package (`training.objectives.OBJECTIVES`, which can't be imported without torch)."""

_OWN_ARGS = {"eit": ("lambda_kl", "temperature"), "sparse_lm": ("sparsity_weight",)}
"""Which of ObjectiveConfig's own keys an objective takes."""


class ObjectiveConfig(Strict):
    """What is minimised; every term is a mean over the tokens that have a label.

    Parameters
    ----------
    name : standard_lm, sparse_lm, reconstruction, eit or mixed
    lambda_kl : weight of KL(teacher || student), for eit
    temperature : of both distributions in that KL
    sparsity_weight : weight of the sparsity of attention, for sparse_lm
    weights : objective -> weight, for mixed
    args : further parameters of the objective; for mixed a mapping objective -> its parameters
    """

    name: str = Field(min_length=1)
    lambda_kl: NotNegative = 1.0
    temperature: Positive = 1.0
    sparsity_weight: NotNegative = 0.01
    weights: dict[str, NotNegative] = Field(default={})
    args: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> ObjectiveConfig:
        parts = list(self.weights) or [self.name]
        # first: what belongs to a misspelled name would be the wrong complaint
        for name in [self.name, *parts]:
            _check_objective(name)
        if (self.name == "mixed") != bool(self.weights):
            given = "no weights" if self.name == "mixed" else f"weights {self.weights}"
            raise ValueError(f"objective '{self.name}' with {given}; weights belong to objective mixed alone")
        if self.weights and not sum(self.weights.values()):
            raise ValueError("all weights are 0; give at least one that is more")
        if "mixed" in self.weights:
            raise ValueError("objective mixed cannot be a part of itself")
        for owner, keys in _OWN_ARGS.items():
            for key in keys:
                if owner not in parts and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key} {getattr(self, key):g} belongs to objective {owner}, which is not used here"
                    )
        for key, value in self.args.items() if self.weights else ():
            if key not in self.weights or not isinstance(value, dict):
                raise ValueError(
                    f"args of objective mixed are {{objective: {{parameter: value}}}} for {', '.join(self.weights)}, "
                    f"got {key}: {value!r}"
                )
            if "weight" in value:
                raise ValueError(
                    f"args of '{key}' in objective mixed has weight {value['weight']!r}; weights: {{{key}: …}} sets it"
                )
        return self

    def arguments(self) -> dict[str, Any]:
        """What `training.objectives.make_objective(name, **arguments)` is given."""
        if self.name != "mixed":
            return {**self._own(self.name), **self.args}
        parts = [
            {"name": name, "weight": weight, **self._own(name), **self.args.get(name, {})}
            for name, weight in self.weights.items()
        ]
        return {"objectives": parts}

    def _own(self, name: str) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _OWN_ARGS.get(name, ())}


def _check_objective(name: str) -> None:
    """Raise a ConfigError for an objective that neither this package nor a user has registered."""
    if name not in OWN_OBJECTIVES:
        from sparsekv.training.objectives import OBJECTIVES

        OBJECTIVES.get(name)


class CurriculumConfig(Named):
    """How the ratio changes over training.

    Parameters
    ----------
    name : fixed, linear, cosine, spread, step or adaptive
    args : the parameters of its class, or keep-ratio spellings of them (`training.curricula.make_curriculum`)
    """

    @model_validator(mode="after")
    def _can_be_made(self) -> CurriculumConfig:
        self.make()
        return self

    def make(self) -> Curriculum:
        """The curriculum.

        Raises
        ------
        ConfigError
            For an unknown name or argument, or a ratio outside [0, 1).
        """
        return make_curriculum(self.name, **self.args)


def _known_features(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    for name in names if isinstance(names, (list, tuple)) else ():
        if name not in FEATURES:
            raise unknown("feature group", name, FEATURES)
        if list(names).count(name) > 1:
            raise ValueError(f"the group '{name}' is named twice")
    return names


Features = Annotated[list[str], BeforeValidator(_known_features), Field(min_length=1)]


class RelevanceOptions(Strict):
    """Learned eviction: predictors of relevance, trained through a relaxed Selection.

    Entries of the context get log w, w = sigmoid((g + noise * logistic) / temperature), added to their attention
    logits, g being the predictor's score; w = 1 for those that always stay. The mean of w over a context's entries,
    the latter included, and over the whole model is held at the fraction to keep.

    Parameters
    ----------
    enabled : train predictors; with neither press nor method they are what drops entries
    width : hidden units of a two-layer predictor; 0: linear
    features : what predictors read: "hidden" (the hidden state), "attention", "handcrafted"
    bias : where the scores start; 3 keeps 95 % of every entry at first
    threshold : how the budget is held. "learned": by a penalty on the mean of w. "quantile": the running quantile of
        all scores at the ratio is subtracted from them, and no penalty is needed.
    lr, weight_decay : of the predictors; that of the model's own parameters is the config's
    noise : size of the logistic noise on the scores
    temperature_start, temperature_end : of the relaxation, over the run: soft, then nearly hard
    budget_weight : weight of relu(mean w - kept fraction)², for threshold "learned"
    n_sink, n_recent : first and last entries of the context that always stay
    start_from : folder with predictors (relevance.safetensors) to start from, instead of fresh ones
    start_share : in [0, 1), what final/ holds: this much of the weights that `start_from` gave, the rest of those that
        training ended with (`training.averaging`). It changes no step, and may differ when a run goes on.
    """

    enabled: bool = False
    width: int = Field(default=0, ge=0)
    features: Features = ["hidden"]  # noqa: RUF012 (pydantic copies it)
    bias: float = Field(default=3.0, allow_inf_nan=False)
    threshold: Literal["learned", "quantile"] = "learned"
    lr: Positive = 2e-2
    weight_decay: NotNegative = 0.0
    noise: NotNegative = 0.5
    temperature_start: Positive = 1.0
    temperature_end: Positive = 0.4
    budget_weight: NotNegative = 50.0
    n_sink: int = Field(default=4, ge=0)
    n_recent: int = Field(default=16, ge=0)
    start_from: str | None = None
    start_share: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_start(self) -> RelevanceOptions:
        given = self.enabled and self.start_from is not None and self.threshold == "quantile"
        if self.start_share and not given:
            raise ValueError(
                f"start_share {self.start_share:g} needs enabled: true, start_from (the weights to average with) and "
                "threshold: quantile (that of averaged scores is measured; a learned one can't be)"
            )
        return self


class LoraOptions(Strict):
    """A LoRA adapter (arXiv 2106.09685).

    Parameters
    ----------
    r : rank
    alpha : the product is scaled by alpha / r
    dropout : in [0, 1), on its input
    targets : names of the linear layers that get one; the error for one that the model lacks comes when it is loaded
    """

    r: int = Field(default=64, ge=1)
    alpha: Positive = 128.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)

    def check_targets(self, names: Iterable[str]) -> None:
        """Raise unless every target is the last part of one of a model's module names.

        Parameters
        ----------
        names : qualified names of the model's linear layers

        Raises
        ------
        ConfigError
            Names the first target that matches nothing, and the nearest layer name.
        """
        names = list(names)
        layers = sorted({name.rpartition(".")[2] for name in names})
        for target in self.targets:
            if target in layers or any(name.endswith(f".{target}") for name in names):
                continue
            guess = nearest(target, layers)
            hint = f" (did you mean '{guess}'?)" if guess else ""
            raise ConfigError(
                f"lora.targets: '{target}' matches no linear layer of the model{hint}; it has {', '.join(layers)}"
            )


Press = Annotated[PressConfig, BeforeValidator(named)]
Method = Annotated[TrainMethodConfig, BeforeValidator(named)]
Objective = Annotated[ObjectiveConfig, BeforeValidator(named)]
