"""One relevance predictor per layer: from a token's hidden state to a score per kv head.

Shape letters: B rows, T tokens, H kv heads, C hidden size.

The predictors are submodules, `self_attn.relevance`: they are saved in checkpoints, clipped and synchronised with the
rest of the model. They return logits g; the relevance is r = sigmoid(g), and an entry is kept by its own threshold
where g > 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.learned_scores import NAME, relevance_of
from sparsekv.policies.sizes import check_size

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


@dataclass(frozen=True)
class RelevanceConfig:
    """The shape of the predictors of one model.

    Parameters
    ----------
    width : int >= 0
        Hidden units of a two-layer predictor; 0: a linear one.
    bias : float
        Where the logits start: with 3, training begins with 95 % of every entry kept.
    """

    width: int = 0
    bias: float = 3.0

    def __post_init__(self) -> None:
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
    """

    n_sink: int = 4
    n_recent: int = 16
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_size(NAME, "n_sink", self.n_sink)
        check_size(NAME, "n_recent", self.n_recent)
        if not _is_number(self.threshold) or math.isnan(self.threshold):
            raise ConfigError(f"{NAME}: threshold must be a number, got {self.threshold!r}")


class RelevancePredictor(nn.Module):
    """g = w · norm(h) + b per kv head, or with one hidden layer of `config.width` units between.

    The hidden state is divided by its root mean square first, so that layers whose residual stream has grown score on
    the same scale. Weights and arithmetic are fp32 whatever the model computes in.

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
        self.hidden: nn.Linear | None = None
        n_in = hidden_size
        if self.config.width:
            self.hidden, n_in = (
                nn.Linear(hidden_size, self.config.width, dtype=torch.float32),
                self.config.width,
            )
        self.score = nn.Linear(n_in, n_kv_heads, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=0.1 * n_in**-0.5)
        nn.init.constant_(self.score.bias, self.config.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits g, fp32 [B, T, H], of `hidden_states` [B, T, C]."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = hidden_states.float()
            states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
            if self.hidden is not None:
                states = nn.functional.silu(self.hidden(states))
            return self.score(states)


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
