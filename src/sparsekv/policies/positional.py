"""Policies that look at nothing but positions: full, random, sink_recent, uniform_middle, sliding_window.

They work on ranks. In a first prefill the rank of an entry is its position; when entries were evicted before,
it is the entry's place among the stored ones, so a budget is met exactly however often a policy is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.policies.base import PositionPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import drawn, row_generator, spread_blocks, strided_blocks
from sparsekv.policies.sizes import check_size, refuse_budget, require_budget, total_beside
from sparsekv.selection import NEVER


def _nothing(row: TokenRow) -> Tensor:
    return torch.zeros(1, 1, row.n, dtype=torch.bool, device=row.ids.device)


def _everything(row: TokenRow) -> Tensor:
    return torch.ones(1, 1, row.n, dtype=torch.bool, device=row.ids.device)


def keep_ends(row: TokenRow, n_sink: int, n_recent: int) -> Tensor:
    """BoolTensor [1, 1, n]: the first `n_sink` and the last `n_recent` entries; they may overlap."""
    kept = _nothing(row)
    kept[..., :n_sink] = True
    kept[..., max(0, row.n - n_recent) :] = True
    return kept


@dataclass(frozen=True)
class Full(PositionPolicy):
    """Keeps everything: the uncompressed baseline. A budget changes nothing."""

    name = "full"

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n] of True."""
        return _everything(row)


@dataclass(frozen=True)
class Random(PositionPolicy):
    """Keeps a uniformly random subset, drawn for every layer and kv head on its own: the baseline to beat.

    Parameters
    ----------
    n_sink : int >= 0
        First entries that always stay; they count in the budget. The default of 0 is pure chance, as in
        kvpress's RandomPress.
    seed : int
        Together with the row's own seed (`TokenContext.seeds`) it fixes the draw, in whatever batch the row
        is.
    """

    n_sink: int = 0
    seed: int = 0
    name = "random"

    def __post_init__(self) -> None:
        check_size(self.name, "n_sink", self.n_sink)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L, H, n]; every head keeps exactly the budget."""
        require_budget(self.name, budget)
        total = total_beside(self.name, budget, row.n, n_sink=self.n_sink)
        n_sink = min(self.n_sink, row.n)
        shape = (row.context.n_layers, row.context.n_kv_heads, row.n)
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[..., :n_sink] = True
        chosen = drawn((*shape[:2], row.n - n_sink), total - n_sink, row_generator(self.seed, row.seed))
        return kept.scatter_(-1, chosen + n_sink, True).to(row.ids.device)


@dataclass(frozen=True)
class SinkRecent(PositionPolicy):
    """Keeps the attention sinks and the most recent entries (StreamingLLM, arXiv 2309.17453, section 3).

    A budget sets the total: the sinks stay and the recent window takes the rest.

    Parameters
    ----------
    n_sink : int >= 0
        First entries that always stay.
    n_recent : int >= 0, optional
        Last entries that stay where there is no budget; giving both is an error.
    """

    n_sink: int = 4
    n_recent: int | None = None
    name = "sink_recent"

    def __post_init__(self) -> None:
        check_size(self.name, "n_sink", self.n_sink)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n]."""
        if self.n_recent is not None:
            refuse_budget(self.name, budget, f"n_recent={self.n_recent}")
            return keep_ends(row, self.n_sink, self.n_recent)
        require_budget(self.name, budget, "n_recent")
        total = total_beside(self.name, budget, row.n, n_sink=self.n_sink)
        return keep_ends(row, self.n_sink, max(0, total - self.n_sink))


@dataclass(frozen=True)
class UniformMiddle(PositionPolicy):
    """Keeps sinks, recent entries, and blocks evenly spread over what lies between.

    By a budget (the total): the sinks stay, then the recent window, and the middle takes the rest, in as few
    blocks of `block_size` as hold it; the last of those blocks is cut so that the budget is met exactly. By
    `stride`: the middle keeps the absolute blocks 0, stride, 2 * stride, ... Blocks are counted on the
    absolute grid [b * block_size, (b + 1) * block_size); one that reaches into the sinks or the recent window
    is cut at the border.

    Parameters
    ----------
    n_sink : int >= 0
        First entries that always stay.
    n_recent : int >= 0, optional
        Last entries that always stay. By default half of what the sinks leave of the budget (rounded up).
        Needed with `stride`.
    block_size : int >= 1
        Tokens per block.
    stride : int >= 0
        0: by budget. Else every stride-th block; giving a budget too is an error.
    """

    n_sink: int = 4
    n_recent: int | None = None
    block_size: int = 128
    stride: int = 0
    name = "uniform_middle"

    def __post_init__(self) -> None:
        check_size(self.name, "n_sink", self.n_sink)
        check_size(self.name, "block_size", self.block_size, 1)
        check_size(self.name, "stride", self.stride)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        elif self.stride:
            check_size(self.name, f"n_recent (beside stride={self.stride})", self.n_recent)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n]."""
        if self.stride and self.n_recent is not None:
            refuse_budget(self.name, budget, f"stride={self.stride}")
            kept = keep_ends(row, self.n_sink, self.n_recent)
            middle = strided_blocks(self.n_sink, row.n - self.n_recent, self.block_size, self.stride)
        else:
            require_budget(self.name, budget, "stride and n_recent")
            fixed = {} if self.n_recent is None else {"n_recent": self.n_recent}
            total = total_beside(self.name, budget, row.n, n_sink=self.n_sink, **fixed)
            rest = max(0, total - self.n_sink)
            n_recent = min(rest, rest - rest // 2 if self.n_recent is None else self.n_recent)
            kept = keep_ends(row, self.n_sink, n_recent)
            middle = spread_blocks(self.n_sink, row.n - n_recent, self.block_size, rest - n_recent)
        kept[..., middle.to(kept.device)] = True
        return kept


@dataclass(frozen=True)
class SlidingWindow(PositionPolicy):
    """Every query sees itself and the `window - 1` entries before it; the prefill itself is windowed.

    So entry k leaves at column k + window, and `window - 1` entries are stored between two tokens.

    Parameters
    ----------
    window : int >= 1, optional
        In tokens, the query's own included. By default it follows from the budget: n entries stored are a
        window of n + 1. Giving both is an error.

    Notes
    -----
    `compression_ratio` 0 evicts nothing, ever. Under any other budget the entries still stored after the
    prefill carry their due step (k + window) too: masks go on sliding over later columns.
    """

    window: int | None = None
    name = "sliding_window"
    own_prefill: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window is not None:
            check_size(self.name, "window", self.window, 1)

    def window_for(self, n: int, budget: Budget) -> int:
        """The window in tokens for a context of `n`; NEVER if nothing is to leave."""
        if self.window is not None:
            refuse_budget(self.name, budget, f"window={self.window}")
            return self.window
        require_budget(self.name, budget, "window")
        if budget.tokens is not None:
            return budget.tokens + 1
        return NEVER if budget.compression_ratio == 0 else budget.n_kept(n) + 1

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n]: what the first query after the row still sees."""
        return self.evicted_at_row(row, budget) > row.n

    def evicted_at_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """IntTensor [1, 1, n]: k + window."""
        leaves = torch.arange(row.n, device=row.ids.device) + self.window_for(row.n, budget)
        return leaves.clamp(max=NEVER).to(torch.int32)[None, None]
