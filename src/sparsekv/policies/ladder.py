"""LaCache's ladder: of the past, shallow layers keep earlier entries and deep layers later ones.

Source: Shi et al., "LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language
Models", ICML 2025, arXiv 2507.14204, section 3 (ladder pattern, iterative compaction), and its released code
for the counts.

One ladder, D = 6 layers, span S = 3, overlap O = 1 (width W = 3 entries, R = 2 of them kept in each layer),
and the same three entries under S = 2, O = 0 (W = 3, R = 1):

               entry 0 1 2                       entry 0 1 2
    layer 0          ■ ■ ⬚           layer 0           ■ ⬚ ⬚
    layer 1          ■ ■ ⬚           layer 1           ■ ⬚ ⬚
    layer 2          ■ ■ ⬚           layer 2           ⬚ ■ ⬚
    layer 3          ⬚ ■ ■           layer 3           ⬚ ■ ⬚
    layer 4          ⬚ ■ ■           layer 4           ⬚ ⬚ ■
    layer 5          ⬚ ■ ■           layer 5           ⬚ ⬚ ■

Every layer keeps the same number of entries, and between them the layers keep every entry somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.base import PositionPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import evenly
from sparsekv.policies.sizes import check_size, total_beside


@dataclass(frozen=True)
class Ladder(PositionPolicy):
    """Keeps sinks and recent entries in all layers, and of the rest a span that shifts with depth (LaCache).

    The middle is cut into ladders of W = 1 + ceil((D - S) / (S - O)) consecutive entries, D being the number
    of compressible layers; each layer keeps R = ceil(S / (S - O)) of them, later ones the deeper it lies.

    A budget is met exactly, in every layer. Where it needs fewer ladders than the middle holds, they are
    spread evenly over it. Where one ladder pattern is not enough, a ladder takes in t times as many steps
    (width 1 + t (W - 1), R entries at a distance of t), t being the smallest that suffices: as thin as the
    pattern applied t times, but with the layers still shifted over all of it. Without a budget the plain
    pattern (t = 1) is applied once to the whole middle.

    Iterative compaction: applied again to the stored entries when the cache is full (decoding, chunked
    prefill), each layer counts ladders over its OWN stored entries. What was thinned before is thinned again,
    so the density of the kept entries falls off with age instead of ending at a window.

    Two things differ from the released code. There layer i takes step i mod (W - R + 1) of a ladder, here
    i (W - R + 1) // D, the contiguous span of layers that the paper draws. And there a cursor sweeps over the
    cache between two compactions; a policy has no state, so the ladders are spread evenly instead.

    Parameters
    ----------
    span : int >= 1, optional
        S, in layers: in how many layers an entry is kept. Default half of them, rounded up.
    overlap : int in [0, span)
        O, in layers: in how many layers two neighbouring entries are both kept.
    n_sink : int >= 0
        First entries, kept in every layer.
    n_recent : int >= 0, optional
        Last entries, kept in every layer. Default: as many as there are compressible layers (as in the
        released code), at most half of what the sinks leave of the budget.
    """

    span: int | None = None
    overlap: int = 0
    n_sink: int = 4
    n_recent: int | None = None
    name = "ladder"

    def __post_init__(self) -> None:
        check_size(self.name, "overlap", self.overlap)
        check_size(self.name, "n_sink", self.n_sink)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        if self.span is not None:
            check_size(self.name, "span", self.span, 1)
            if self.overlap >= self.span:
                raise ConfigError(f"ladder: overlap={self.overlap} must be under span={self.span}")

    def shape_for(self, depth: int) -> tuple[int, int]:
        """(W, R): width of a ladder in entries, and how many of them each of `depth` layers keeps.

        Raises
        ------
        ConfigError
            If the ladder would drop nothing on so few layers.
        """
        span = -(-depth // 2) if self.span is None else self.span
        if depth == 1 and self.span is None:
            return 2, 1  # a single layer has no depth to shift over: every second entry stays
        if span >= depth or self.overlap >= span:
            raise ConfigError(
                f"ladder: span must be under the number of compressible layers and over the overlap, "
                f"got span={span}, overlap={self.overlap} on {depth} layers"
            )
        step = span - self.overlap
        width, kept = 1 + -(-(depth - span) // step), -(-span // step)
        if kept >= width:
            raise ConfigError(
                f"ladder: span={span} and overlap={self.overlap} on {depth} layers keep all {width} entries "
                f"of a ladder in every layer; lower the overlap or the span"
            )
        return width, kept

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L, 1, n]; layers that cannot be compressed keep everything."""
        layers = row.context.depth
        depth, n = len(layers), row.n
        out = torch.ones(max(row.context.n_layers, 1), 1, n, dtype=torch.bool)
        if depth == 0:
            return out.to(row.ids.device)
        width, per_layer = self.shape_for(depth)
        if budget.given:
            fixed = {} if self.n_recent is None else {"n_recent": self.n_recent}
            total = total_beside(self.name, budget, n, n_sink=self.n_sink, **fixed)
        else:
            total = None
        rest = max(0, (n if total is None else total) - self.n_sink)
        n_recent = min(rest, min(depth, rest - rest // 2) if self.n_recent is None else self.n_recent)
        start, stop = min(self.n_sink, n), n - n_recent
        if stop > start:
            target = None if total is None else total - start - n_recent
            out[list(layers), 0, start:stop] = ladders(stop - start, target, depth, width, per_layer)
        return out.to(row.ids.device)


def ladders(m: int, target: int | None, depth: int, width: int, kept: int) -> Tensor:
    """BoolTensor [depth, m]: which of m entries each layer keeps.

    Parameters
    ----------
    m : int >= 1
        Entries of the middle.
    target : int in [0, m], optional
        Entries that each layer keeps. None: the plain pattern once over all m.
    depth : int >= 1
        Layers.
    width, kept : int
        W and R of one ladder, W > R >= 1.
    """
    out = torch.ones(depth, m, dtype=torch.bool)
    if target is None:
        target = m - (m // width) * (width - kept)
    surplus = m - target
    if surplus == 0:
        return out
    times = 1  # t: how often the pattern would have to be applied
    while (w := 1 + times * (width - 1)) <= m and (m // w) * (w - kept) < surplus:
        times += 1
    if w > m:
        # Too few entries for even one ladder of the shape: one as wide as the middle, one run per layer.
        return _ladder(depth, m, target, 1)
    n_ladders = -(-surplus // (w - kept))
    starts = evenly(n_ladders, m // w) * w
    columns = starts[:, None] + torch.arange(w)
    out[:, columns.flatten()] = _ladder(depth, w, kept, times).repeat(1, n_ladders)
    # The last ladder drops only what is still missing, so that the count is exact.
    last = w - (surplus - (n_ladders - 1) * (w - kept))
    if last > kept:
        out[:, columns[-1]] = _ladder(depth, w, last, 1)
    return out


def _ladder(depth: int, width: int, kept: int, distance: int) -> Tensor:
    """BoolTensor [depth, width]: `kept` entries per layer, `distance` apart, starting later the deeper."""
    n_starts = width - distance * (kept - 1) if kept else 1
    starts = torch.arange(depth) * n_starts // depth
    columns = starts[:, None] + distance * torch.arange(kept)
    return torch.zeros(depth, width, dtype=torch.bool).scatter_(1, columns, True)
