"""Small policies with no library code behind them, to test the machinery alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.policies.base import LayerContext, LayerPolicy, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget


@dataclass(frozen=True)
class Ends(TokenPolicy):
    """The first two entries and the newest ones: uniform, shared by layers and heads."""

    name: str = "ends"

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        n_kept = budget.n_kept(row.n)
        column = torch.arange(row.n)
        return ((column < min(2, n_kept)) | (column >= row.n - (n_kept - 2)))[None, None]


@dataclass(frozen=True)
class Scatter(TokenPolicy):
    """Random per layer and head, the same count everywhere."""

    name: str = "scatter"

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        generator = torch.Generator().manual_seed(row.seed)
        shape = (row.context.n_layers, row.context.n_kv_heads, row.n)
        best = torch.rand(shape, generator=generator).topk(budget.n_kept(row.n)).indices
        return torch.zeros(shape, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class Ragged(TokenPolicy):
    """Random per layer and head, different counts; head 0 of layer 0 keeps a single entry."""

    name: str = "ragged"

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        generator = torch.Generator().manual_seed(row.seed)
        shape = (row.context.n_layers, row.context.n_kv_heads, row.n)
        kept = torch.rand(shape, generator=generator) < budget.n_kept(row.n) / row.n
        kept[0, 0] = False
        kept[..., -1] = True
        return kept


@dataclass
class SmallKeys(LayerPolicy):
    """Keeps the keys of smallest norm."""

    name: str = "small_keys"
    ratio_free: bool = True

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        return -ctx.keys.norm(dim=-1)
