"""Toy models with predictors whose scores differ widely, and what their caches store."""

from __future__ import annotations

from typing import Any

import torch

from sparsekv import prepare
from sparsekv.relevance import RelevanceConfig, attach_relevance, relevance_modules
from toy import tiny_model

T = 48
ALL = ("hidden", "attention", "handcrafted")


def scored_model(family: str = "llama", features: tuple[str, ...] = ("hidden",), width: int = 0) -> Any:
    """Predictors whose scores differ widely."""
    model = attach_relevance(prepare(tiny_model(family)), RelevanceConfig(width, features=features))
    generator = torch.Generator().manual_seed(2)
    for module in relevance_modules(model).values():
        predictor = module.relevance
        torch.nn.init.normal_(predictor.score.weight, std=0.3, generator=generator)
        if predictor.extra is not None:
            torch.nn.init.normal_(predictor.extra.weight, std=1.0, generator=generator)
    return model


def token_ids(n: int, rows: int = 1, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, 250, (rows, n), generator=torch.Generator().manual_seed(seed))


def kept_of(cache: Any) -> torch.Tensor:
    """BoolTensor [B, compressible layers, H, T seen]."""
    return cache.kept_columns()[:, cache.compressible]


@torch.no_grad()
def decode(
    model: Any, cache: Any, ids: torch.Tensor, steps: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits of the new tokens, what is stored after every step)."""
    logits, stored, begin = [], [], cache.seen
    for size in steps:
        logits.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
        stored.append(kept_of(cache))
        begin += size
    return torch.cat(logits, dim=1), stored
