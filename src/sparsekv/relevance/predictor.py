"""One relevance predictor per layer: from a token's hidden state, and features of its entry, to a score per kv head.

Shape letters: B rows, T tokens, H kv heads, C hidden size, F features beside the hidden state.

The predictors are submodules, `self_attn.relevance`: they are saved in checkpoints, clipped and synchronised with the
rest of the model. They return logits g; the relevance is r = sigmoid(g), and an entry is kept by its own threshold
where g > 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext
from sparsekv.policies.learned_scores import NAME, relevance_of
from sparsekv.policies.sizes import check_size
from sparsekv.relevance.features import checked_groups, extra_features, n_features

__all__ = [
    "NAME",
    "RelevanceConfig",
    "RelevancePredictor",
    "Served",
    "attach_relevance",
    "config_of",
    "detach_relevance",
    "has_relevance",
    "relevance_modules",
    "relevance_of",
    "serve_as",
    "served_by",
    "served_of",
]


_CPU_NUMBERS = 256 * 576
"""Numbers of hidden states that are scored at once on a CPU: in fp32 0.6 MB, which stays in its cache."""

_FEATURE_UNITS = 16
"""Most hidden units of the features' part: there are few features."""


@dataclass(frozen=True)
class RelevanceConfig:
    """The shape of the predictors of one model.

    Parameters
    ----------
    width : int >= 0
        Hidden units of a two-layer predictor; 0: a linear one.
    bias : float
        Where the logits start: with 3, training begins with 95 % of every entry kept.
    features : groups of "hidden", "attention", "handcrafted"
        What the predictors look at: each token's hidden state, attention that its entry received, handcrafted features
        (`relevance.features`).
    """

    width: int = 0
    bias: float = 3.0
    features: tuple[str, ...] = ("hidden",)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "features", checked_groups(self.features)
        )  # a YAML or JSON list, made hashable
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 0:
            raise ConfigError(f"relevance width must be a whole number >= 0 (0: linear), got {self.width!r}")
        if not _is_number(self.bias) or not math.isfinite(self.bias):
            raise ConfigError(f"relevance bias must be a finite number, got {self.bias!r}")


@dataclass(frozen=True)
class Served:
    """How predictors are to be served: as they were trained. Policy `relevance` goes by it where it is told nothing.

    Parameters
    ----------
    n_sink, n_recent : int >= 0
        First and last entries that always stay.
    threshold : float
        In logits: without a budget, what scores above it stays. 0 is a relevance of one half; -inf keeps everything.
    betas : one float > 0 per compressible layer, optional
        Factors on a threshold shared by layers (`relevance.threshold`): above 1 a layer keeps less. None given: 1.
    """

    n_sink: int = 4
    n_recent: int = 16
    threshold: float = 0.0
    betas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_size(NAME, "n_sink", self.n_sink)
        check_size(NAME, "n_recent", self.n_recent)
        if not _is_number(self.threshold) or math.isnan(self.threshold):
            raise ConfigError(f"{NAME}: threshold must be a number, got {self.threshold!r}")
        object.__setattr__(self, "betas", checked_betas(self.betas))


def checked_betas(betas: Any) -> tuple[float, ...]:
    """The factors as a tuple; raises ConfigError unless each is a finite number over 0."""
    if isinstance(betas, str) or not isinstance(betas, (list, tuple)):
        raise ConfigError(f"{NAME}: betas must be a list of numbers over 0, one per layer, got {betas!r}")
    for beta in betas:
        if not _is_number(beta) or not (math.isfinite(beta) and beta > 0):
            raise ConfigError(f"{NAME}: betas must be numbers over 0, got {beta!r}")
    return tuple(float(beta) for beta in betas)


class FeatureScore(nn.Module):
    """The features' part of a predictor: w · e per kv head, or with one hidden layer shared by the heads between.

    Parameters
    ----------
    n_in : int >= 1
        F.
    n_kv_heads : int
    width : int >= 0
        Of the predictor; at most 16 units are used here.
    """

    def __init__(self, n_in: int, n_kv_heads: int, width: int) -> None:
        super().__init__()
        units = min(width, _FEATURE_UNITS)
        self.hidden = nn.Linear(n_in, units, dtype=torch.float32) if units else None
        self.weight = nn.Parameter(torch.empty(n_kv_heads, units or n_in, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.1 * (units or n_in) ** -0.5)

    def forward(self, extra: Tensor, head: int | None = None) -> Tensor:
        """[B, H, T] of `extra` [B, H, T, F]; with `head`, of that kv head alone: `extra` [B, 1, T, F]."""
        inner = extra.float()
        if self.hidden is not None:
            inner = nn.functional.silu(self.hidden(inner))
        weight = self.weight if head is None else self.weight[head : head + 1]
        return (inner @ weight[:, :, None]).squeeze(-1)


class RelevancePredictor(nn.Module):
    """g = w · [norm(h); a; f] + b per kv head, or with one hidden layer of `config.width` units between.

    The hidden state h is divided by its root mean square first, so that layers whose residual stream has grown score on
    the same scale. Weights and arithmetic are fp32 whatever the model computes in.

    h and the features [a; f] have a summand each (with a hidden layer: each has its own), so that the part of h, which
    is known only while a token is read, can be remembered as one number while the features change.

    Parameters
    ----------
    hidden_size : int
        C, of the states that enter the attention layer.
    n_kv_heads : int
    config : RelevanceConfig

    Attributes
    ----------
    served : Served
        How to serve it; stored beside the weights, and the same in every layer (`serve_as`).
    """

    def __init__(self, hidden_size: int, n_kv_heads: int, config: RelevanceConfig | None = None) -> None:
        super().__init__()
        self.config = config or RelevanceConfig()
        self.served = Served()
        self.reads_hidden = "hidden" in self.config.features
        self.hidden: nn.Linear | None = None
        n_in = hidden_size if self.reads_hidden else 0
        if n_in and self.config.width:
            self.hidden, n_in = nn.Linear(n_in, self.config.width, dtype=torch.float32), self.config.width
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Initializing zero-element"
            )  # without hidden states: only a bias
            self.score = nn.Linear(n_in, n_kv_heads, dtype=torch.float32)
        if n_in:
            nn.init.normal_(self.score.weight, std=0.1 * n_in**-0.5)
        nn.init.constant_(self.score.bias, self.config.bias)
        n_extra = n_features(self.config.features)
        self.extra = FeatureScore(n_extra, n_kv_heads, self.config.width) if n_extra else None

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
        """Logits g, fp32 [B, T, H], of `hidden_states` [B, T, C] and features `extra` [B, H, T, F].

        Raises
        ------
        ConfigError
            If the predictor takes features and gets none, or another number of them.
        """
        if self.extra is None:
            return self.hidden_part(hidden_states)
        wanted = n_features(self.config.features)
        if extra is None or extra.shape[-1] != wanted:
            found = "none" if extra is None else extra.shape[-1]
            raise ConfigError(
                f"relevance predictors with features {', '.join(self.config.features)} take {wanted} numbers beside "
                f"the hidden state, got {found}"
            )
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.hidden_part(hidden_states) + self.extra(extra).transpose(1, 2)

    def hidden_part(self, hidden_states: Tensor) -> Tensor:
        """What the hidden states [B, T, C] contribute to g, fp32 [B, T, H]; only the bias if they are switched off."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            if not self.reads_hidden or self.hidden is not None:
                return cast(Tensor, self.score(self.score_inputs(hidden_states)))
            # W (s x) + b without a copy of every scaled state, and some tokens at a time, so that their fp32 copies
            # stay in a CPU's cache. bmm: as nn.Linear would have it, products with as few columns as there are heads
            # take twice the time.
            weight = self.score.weight.expand(len(hidden_states), -1, -1)
            parts: Sequence[Tensor] = (hidden_states,)
            if hidden_states.device.type == "cpu":
                parts = hidden_states.split(max(16, _CPU_NUMBERS // hidden_states.shape[-1]), dim=1)
            products, norms = [], []
            for part in parts:
                states = part.float()
                products.append(torch.bmm(weight, states.mT))
                norms.append(_norms(states))
            scale = _scale(torch.cat(norms, dim=1), hidden_states.shape[-1])
            return torch.addcmul(self.score.bias, torch.cat(products, dim=2).mT, scale)

    def score_inputs(self, hidden_states: Tensor) -> Tensor:
        """What the last linear map reads of the hidden states [B, T, C]: fp32 [B, T, C], or [B, T, width], or nothing
        [B, T, 0] if they are switched off.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            if not self.reads_hidden:
                return hidden_states[..., :0].float()
            states = hidden_states.float()
            scale = _scale(_norms(states), states.shape[-1])
            if self.hidden is None:
                return states * scale
            inner = nn.functional.linear(states, self.hidden.weight)
            return nn.functional.silu(torch.addcmul(self.hidden.bias, inner, scale))

    def extra_of(self, ctx: LayerContext) -> Tensor | None:
        """The features [B, H, T, F] of a layer's entries that `forward` takes; see `features.extra_features`."""
        return extra_features(ctx, self.config)


def attach_relevance(model: Any, config: RelevanceConfig | None = None, *, seed: int = 0) -> Any:
    """Give every compressible layer a fresh predictor (an existing one is replaced) and return the model.

    Parameters
    ----------
    model : a supported causal language model, plain or wrapped by PEFT
    seed : int
        Of the initial weights, which are drawn on the CPU; the global random states are left as they were.
    """
    architecture.check_supported(model)
    modules = architecture.attention_modules(model)
    size, heads = int(architecture.text_config(model).hidden_size), architecture.num_kv_heads(model)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would also seed the GPUs, whose state is not saved here
        torch.default_generator.manual_seed(seed)
        for index in architecture.compressible_layers(model):
            predictor = RelevancePredictor(size, heads, config)
            setattr(modules[index], NAME, predictor.to(next(modules[index].parameters()).device))
    return model


def detach_relevance(model: Any) -> Any:
    """Take the predictors off again and return the model."""
    for module in relevance_modules(model).values():
        delattr(module, NAME)
    return model


def relevance_modules(model: Any) -> dict[int, nn.Module]:
    """Layer index -> the attention module that has a predictor."""
    modules = architecture.attention_modules(model)
    return {index: module for index, module in enumerate(modules) if hasattr(module, NAME)}


def has_relevance(model: Any) -> bool:
    """True if the model's layers have predictors."""
    return bool(relevance_modules(model))


def reads_text(model: Any) -> bool:
    """True if a model's predictors take features that need token ids and a tokenizer."""
    found = (getattr(module, NAME) for module in relevance_modules(model).values())
    return any("handcrafted" in predictor.config.features for predictor in found)


def config_of(model: Any) -> dict[str, Any]:
    """The RelevanceConfig of a model's predictors, as JSON."""
    for module in relevance_modules(model).values():
        predictor: Any = getattr(module, NAME)
        return asdict(predictor.config)
    raise ConfigError("the model has no relevance predictors")


def served_of(model: Any) -> Served:
    """How a model's predictors are to be served.

    Raises
    ------
    ConfigError
        If the model has no predictors.
    """
    for module in relevance_modules(model).values():
        return served_by(module)
    raise ConfigError("the model has no relevance predictors")


def served_by(module: nn.Module) -> Served:
    """How one attention module's predictor is to be served; the defaults if nothing is said."""
    return getattr(getattr(module, NAME, None), "served", None) or Served()


def serve_as(model: Any, served: Served) -> Any:
    """Say how a model's predictors are to be served (a trainer does, before it saves them) and return the model.

    Raises
    ------
    ConfigError
        If the model has no predictors.
    """
    found = relevance_modules(model)
    if not found:
        raise ConfigError("the model has no relevance predictors")
    for module in found.values():
        predictor: Any = getattr(module, NAME)
        predictor.served = served
    return model


def _norms(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=-1, keepdim=True)


def _scale(norms: Tensor, size: int) -> Tensor:
    """The factor that makes the root mean square of states of `size` numbers 1."""
    return torch.rsqrt(norms.square() / size + 1e-6)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
