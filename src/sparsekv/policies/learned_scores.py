"""Scores of the predictors that a model may carry; how they are trained, stored and served is `sparsekv.relevance`."""

from __future__ import annotations

from torch import Tensor, nn

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext

NAME = "relevance"
"""The attribute of an attention module that holds its predictor."""


def relevance_of(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """g, fp32 [B, H, T], of one attention module's tokens; gradients flow to the predictor.

    Parameters
    ----------
    module : an attention module
    hidden_states : FloatTensor [B, T, C]
        Input to its layer.

    Raises
    ------
    ConfigError
        If the layer has no predictor.
    """
    predictor = getattr(module, NAME, None)
    if predictor is None:
        raise ConfigError(
            "the model has no relevance predictors: load an adapter or folder with relevance.safetensors "
            "(adapter=...), or train one"
        )
    scores: Tensor = predictor(hidden_states)
    return scores.transpose(1, 2).float()


def relevance_of_entries(ctx: LayerContext, method: str) -> Tensor:
    """g, fp32 [B, H, T], of every stored entry; `method` is named in messages.

    Raises
    ------
    ConfigError
        If the layer has no predictor, or earlier entries' hidden states are gone.
    """
    if ctx.hidden_states.shape[1] != ctx.keys.shape[2]:
        raise ConfigError(
            f"method '{method}' scores a token from its hidden state, which is known only while it is read, and only "
            f"{ctx.hidden_states.shape[1]} of {ctx.keys.shape[2]} stored entries are being read now: it compresses a "
            "whole context once (no chunk, phase='prefill', first turn)"
        )
    return relevance_of(ctx.module, ctx.hidden_states)
