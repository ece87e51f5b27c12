"""Scores of the predictors that a model may carry; how they are trained, stored and served is `sparsekv.relevance`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext

NAME = "relevance"
"""The attribute of an attention module that holds its predictor."""


def predictor_of(module: nn.Module) -> Any:
    """The predictor of an attention module.

    Raises
    ------
    ConfigError
        If the layer has none.
    """
    predictor = getattr(module, NAME, None)
    if predictor is None:
        raise ConfigError(
            "the model has no relevance predictors: load an adapter or folder with relevance.safetensors "
            "(adapter=...), or train one"
        )
    return predictor


def relevance_of(module: nn.Module, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
    """g, fp32 [B, H, T], of one attention module's tokens; gradients flow to the predictor.

    Parameters
    ----------
    module : an attention module
    hidden_states : FloatTensor [B, T, C]
        Input to its layer.
    extra : FloatTensor [B, H, T, F], optional
        The features that the predictor takes beside it (`extra_of`).

    Raises
    ------
    ConfigError
        If the layer has no predictor, or the predictor takes other features.
    """
    predictor = predictor_of(module)
    scores: Tensor = predictor(hidden_states) if extra is None else predictor(hidden_states, extra)
    return scores.transpose(1, 2).float()


def extra_of(ctx: LayerContext) -> Tensor | None:
    """The features [B, H, T, F] that a layer's predictor takes beside the hidden state; None if it takes none."""
    features: Tensor | None = predictor_of(ctx.module).extra_of(ctx)
    return features


def relevance_of_entries(ctx: LayerContext, method: str) -> Tensor:
    """g, fp32 [B, H, T], of every stored entry; `method` is named in messages.

    Raises
    ------
    ConfigError
        If the layer has no predictor, some entry's own hidden state is gone, or a score is not a number.
    """
    if not ctx.covers_entries:
        raise ConfigError(
            f"method '{method}' scores a token from its hidden state, which is known only while it is read, and those "
            f"of some of the {ctx.keys.shape[2]} stored entries are gone: it compresses a whole context once (no "
            "chunk, phase='prefill', first turn)"
        )
    return finite_scores(relevance_of(ctx.module, ctx.hidden_states, extra_of(ctx)), method, ctx.layer_idx)


def finite_scores(scores: Tensor, method: str, layer_idx: int) -> Tensor:
    """The scores, if all are numbers: NaN or infinite activations must not pass for a choice.

    Raises
    ------
    ConfigError
        It names the layer.
    """
    if math.isfinite(scores.detach().sum()):  # one number tells of all: nothing can make it finite again
        return scores
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise ConfigError(
            f"method '{method}': {int(bad.sum())} of {bad.numel()} relevance scores in layer {layer_idx} are NaN or "
            "infinite, so its activations or its predictor are broken (half precision may overflow: try float32)"
        )
    return scores
