"""Random blocks leave: of one size (block_dropout) or of drawn sizes (variable_block_dropout). For training.

One row, 20 tokens, n_sink 2, n_recent 3, block_size 4, ratio 0.5: 10 entries leave, so two whole blocks and half of a
third. The grid is absolute; blocks are cut where they reach into sinks or recent entries.

    column   0 1 2 3 4 5 6 7 8 9 ...        19
             s s a a b b b b c c c c d d d d e r r r
    kept     ■ ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ■ ■ ■ ■      order drawn: d, b, c, ...; the end of c makes up the count

Shape letters: L layers or 1, H kv heads or 1, M entries of the middle, S segments (blocks, sentences).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.base import PositionPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import blocks_between, row_generator
from sparsekv.policies.sizes import check_size, require_budget, total_beside

Share = Literal["all", "layer", "head"]
SHARES: tuple[Share, ...] = ("all", "layer", "head")

DEFAULT_RECENT = 64
"""Recent entries that stay where nobody says how many, in tokens."""


@dataclass(frozen=True)
class Middle:
    """What may leave between the entries that always stay.

    Parameters
    ----------
    start, stop : int
        Columns [start, stop) may leave; those before are sinks, those after are recent.
    n_dropped : int
        How many of them do.
    """

    start: int
    stop: int
    n_dropped: int


def middle_of(method: str, budget: Budget, n: int, n_sink: int, n_recent: int | None) -> Middle:
    """The middle of `n` entries under a given budget.

    Parameters
    ----------
    n_sink : int
    n_recent : int, optional
        None: `DEFAULT_RECENT`, at most half of what the sinks leave of the budget (rounded up).

    Raises
    ------
    ConfigError
        If there is no budget, or it does not hold what must stay.
    """
    require_budget(method, budget)
    fixed = {} if n_recent is None else {"n_recent": n_recent}
    total = total_beside(method, budget, n, n_sink=n_sink, **fixed)
    rest = max(0, total - n_sink)
    recent = min(rest, DEFAULT_RECENT, rest - rest // 2) if n_recent is None else n_recent
    start = min(n_sink, n)
    return Middle(start, max(start, n - recent), n - total)


def drop_ranks(edges: Tensor, order: Tensor) -> Tensor:
    """LongTensor [..., M]: when each entry of a middle leaves, 0 first, if whole segments leave in an order.

    Within a segment the last entries leave first, so a segment that leaves in part keeps its beginning.

    Parameters
    ----------
    edges : LongTensor [S + 1]
        Segment s is [edges[s], edges[s + 1]); from 0 to M, strictly ascending.
    order : LongTensor [..., S]
        The segments, the first to leave first.
    """
    size = edges.diff()
    in_order = size[order]
    before = torch.zeros_like(order).scatter(-1, order, in_order.cumsum(-1) - in_order)
    segment = torch.repeat_interleave(torch.arange(size.shape[0]), size)
    from_end = edges[1:][segment] - 1 - torch.arange(int(edges[-1]))
    return before[..., segment] + from_end


def check_share(method: str, share: str, allowed: tuple[Share, ...] = SHARES) -> None:
    """Raise a `ConfigError` unless `share` is one of `allowed`."""
    if share not in allowed:
        raise unknown(f"share of {method}", share, allowed)


def drop_segments(
    row: TokenRow, middle: Middle, edges: Tensor, share: Share, generator: torch.Generator
) -> Tensor:
    """BoolTensor [L or 1, H or 1, n]: what stays of a row once random segments of its middle left.

    Exactly `middle.n_dropped` entries leave; the last segment drawn may leave in part.

    Parameters
    ----------
    edges : LongTensor [S + 1]
        As for `drop_ranks`.
    share : "all", "layer" or "head"
        One draw for the row, one per layer, or one per layer and kv head.
    """
    n_layers = 1 if share == "all" else row.context.n_layers
    n_heads = row.context.n_kv_heads if share == "head" else 1
    kept = torch.ones(n_layers, n_heads, row.n, dtype=torch.bool)
    if middle.n_dropped:
        noise = torch.rand(n_layers, n_heads, edges.shape[0] - 1, dtype=torch.float64, generator=generator)
        ranks = drop_ranks(edges, noise.argsort(-1))
        kept[..., middle.start : middle.stop] = ranks >= middle.n_dropped
    return kept.to(row.ids.device)


@dataclass(frozen=True)
class BlockDropout(PositionPolicy):
    """Random blocks of the absolute grid [b * block_size, (b + 1) * block_size) leave.

    A budget sets the total, exactly: of the last block drawn only as many entries leave as are missing (its last ones).

    Parameters
    ----------
    block_size : int >= 1
        In tokens.
    n_sink : int >= 0
        First entries that always stay.
    n_recent : int >= 0, optional
        Last entries that always stay; a budget under n_sink + n_recent is an error. Default: 64, at most half of
        what the sinks leave of the budget.
    seed : int
        Together with the row's own seed (`TokenContext.seeds`) it fixes the draw, in whatever batch the row is.
    share : "all", "layer" or "head"
        Who loses the same blocks: the whole model, each layer on its own, or each kv head of each layer.
    """

    block_size: int = 64
    n_sink: int = 4
    n_recent: int | None = None
    seed: int = 0
    share: Share = "all"
    name = "block_dropout"

    def __post_init__(self) -> None:
        check_size(self.name, "block_size", self.block_size, 1)
        check_size(self.name, "n_sink", self.n_sink)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        check_share(self.name, self.share)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L or 1, H or 1, n]; every head keeps exactly the budget."""
        middle = middle_of(self.name, budget, row.n, self.n_sink, self.n_recent)
        edges = grid_edges(middle.start, middle.stop, self.block_size)
        return drop_segments(row, middle, edges, self.share, row_generator(self.seed, row.seed))


def grid_edges(start: int, stop: int, block_size: int) -> Tensor:
    """LongTensor [S + 1]: edges of the absolute blocks that meet [start, stop), counted from `start`."""
    blocks = blocks_between(start, stop, block_size)
    return torch.tensor([0, *(end - start for _, end in blocks)])


@dataclass(frozen=True)
class VariableBlockDropout(PositionPolicy):
    """Random blocks of random length leave.

    The middle is cut, from its start, into blocks of min_block..max_block tokens, every length equally likely (the
    last block ends with the middle and may be shorter). The layout is drawn once per row; what leaves, per `share`.
    The budget is met exactly, as in `BlockDropout`.

    Parameters
    ----------
    min_block, max_block : int, 1 <= min_block <= max_block
        In tokens.
    n_sink, n_recent, seed, share
        As in `BlockDropout`.
    """

    min_block: int = 16
    max_block: int = 128
    n_sink: int = 4
    n_recent: int | None = None
    seed: int = 0
    share: Share = "all"
    name = "variable_block_dropout"

    def __post_init__(self) -> None:
        check_size(self.name, "min_block", self.min_block, 1)
        check_size(self.name, "max_block", self.max_block, 1)
        if self.max_block < self.min_block:
            raise ConfigError(
                f"{self.name}: max_block={self.max_block} must be at least min_block={self.min_block}"
            )
        check_size(self.name, "n_sink", self.n_sink)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        check_share(self.name, self.share)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L or 1, H or 1, n]; every head keeps exactly the budget."""
        middle = middle_of(self.name, budget, row.n, self.n_sink, self.n_recent)
        generator = row_generator(self.seed, row.seed)
        edges = self.layout(middle.stop - middle.start, generator)
        return drop_segments(row, middle, edges, self.share, generator)

    def layout(self, n: int, generator: torch.Generator) -> Tensor:
        """LongTensor [S + 1]: edges of drawn blocks over `n` entries."""
        count = -(-n // self.min_block)  # enough even if all are the shortest
        sizes = torch.randint(self.min_block, self.max_block + 1, (count,), generator=generator)
        ends = sizes.cumsum(0)
        return torch.cat([torch.tensor([0]), ends[ends < n], torch.tensor([n] if n else [])]).long()
