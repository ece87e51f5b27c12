"""One threshold for a whole model, which follows a target and the memory in use.

Shape letters: L compressible layers, H kv heads, n entries of one head, S = L * H segments of a row.

    keep entry i of layer l  iff  r_i > tau_l          tau_l = beta_l * quantile({r_i}, q(t))
    q(t) = 1 - allowed(t) / in use(t)                  cut to its bounds

{r_i} are the relevances of all that a row stores, in all layers and heads. So heads and layers compete for one number
of places, and each keeps what it wins. All is done in log r, where sigmoid(g) does not saturate.

Every layer's scores are known before anything leaves (eviction after a layer does not change a prefill), so the
quantile is that of the very entries it judges and the count is met exactly, for any distribution: entries that stand on
the threshold itself (ties, constant scores) stay or go by age, the newest first. A running quantile would miss the
target wherever a context's scores differ from those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import AcrossLayers

Segments = Sequence[Sequence[Tensor]]
"""Scores of one row: layer -> kv head -> log r, FloatTensor [n], oldest entry first. n may differ."""


@dataclass
class RowState:
    """What the last round left of one row.

    Parameters
    ----------
    q : fraction of the stored entries that was to leave
    log_quantile : float
        log of the shared quantile of r; -inf before the first round.
    in_use, allowed : entries that were stored before the round, and that may be stored
    rounds : rounds in which something left
    """

    q: float = 0.0
    log_quantile: float = -math.inf
    in_use: int = 0
    allowed: int = 0
    rounds: int = 0


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """(low, high), if these are two numbers with 0 <= low <= high <= 1; else a ConfigError."""
    numbers = isinstance(bounds, (list, tuple)) and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) for each in bounds
    )
    if not (numbers and len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1):
        raise ConfigError(
            f"threshold controller: bounds must be (low, high) with 0 <= low <= high <= 1, got {bounds!r}"
        )
    return float(bounds[0]), float(bounds[1])


class ThresholdController:
    """Holds a row's stored entries within a budget, by one quantile for all layers and heads.

    Parameters
    ----------
    budget : Budget, optional
        A ratio follows the tokens seen; a number of tokens is entries per kv head, in the mean over the model.
    betas : one factor > 0 per layer, optional
        tau_l = beta_l * quantile: above 1 a layer keeps less. Default: 1.
    max_bytes, entry_bytes : int >= 1, optional
        Memory that a row's keys and values may take, and what one entry (key and value) of a head takes.
    bounds : (low, high) in [0, 1]
        Of q: the least and the most of what is stored that may leave in one round. A high below 1 spreads a large
        excess over several rounds; the budget is not met meanwhile.
    hysteresis : float in [0, 1)
        While decoding, a round makes room below the limit, so that the next is not due at once: this fraction of the
        tokens seen (0.01: one point of compression), at most `every` tokens and an eighth of what is allowed.

    Notes
    -----
    Decisions depend on the scores and sizes given only; the state tells what was decided. A head keeps at least one
    entry, so a limit under one entry per head is not met.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        betas: Sequence[float] = (),
        max_bytes: int | None = None,
        entry_bytes: int | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        hysteresis: float = 0.01,
    ) -> None:
        self.budget = budget or Budget()
        self.betas = tuple(float(beta) for beta in betas)
        self.max_bytes, self.entry_bytes = max_bytes, entry_bytes
        self.bounds, self.hysteresis = checked_bounds(bounds), float(hysteresis)
        self.rows: dict[int, RowState] = {}
        self._check()

    def _check(self) -> None:
        if not self.budget.given and self.max_bytes is None:
            raise ConfigError(
                "a threshold controller needs a budget (compression_ratio or tokens) or max_bytes"
            )
        for name in ("max_bytes", "entry_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"threshold controller: {name} must be a whole number >= 1, got {value!r}")
        if self.max_bytes is not None and self.entry_bytes is None:
            raise ConfigError(
                "threshold controller: max_bytes needs entry_bytes, the bytes of one key and value"
            )
        if not 0 <= self.hysteresis < 1:
            raise ConfigError(f"threshold controller: hysteresis must be in [0, 1), got {self.hysteresis}")
        if any(not (math.isfinite(beta) and beta > 0) for beta in self.betas):
            raise ConfigError(f"threshold controller: betas must be numbers over 0, got {list(self.betas)}")

    # ---- how much ---------------------------------------------------------------------------------------------

    def allowed(self, n_seen: int, n_segments: int) -> int:
        """Entries that a row may store in all its layers and heads, once it has seen `n_seen` tokens."""
        limits = []
        if self.budget.given:
            limits.append(self.budget.n_kept(n_seen) * n_segments)
        if self.max_bytes is not None and self.entry_bytes is not None:
            limits.append(self.max_bytes // self.entry_bytes)
        return min(*limits, n_seen * n_segments) if limits else n_seen * n_segments

    def is_due(self, in_use: int, n_seen: int, n_segments: int) -> bool:
        """True if more is stored than may be: a round is due."""
        return in_use > max(self.allowed(n_seen, n_segments), n_segments)

    def room(self, n_seen: int, n_segments: int, every: int) -> int:
        """Entries below the limit that a round while decoding frees for the tokens to come."""
        per_head = min(every, max(1, int(self.hysteresis * n_seen)))
        return min((per_head - 1) * n_segments, self.allowed(n_seen, n_segments) // 8)

    def q(self, in_use: int, n_kept: int) -> float:
        """Fraction of the stored entries to leave, within the bounds."""
        low, high = self.bounds
        return min(max(1 - n_kept / in_use, low), high) if in_use else 0.0

    # ---- which ------------------------------------------------------------------------------------------------

    def cut(
        self, scores: Segments, n_seen: int, *, row: int = 0, every: int | None = None
    ) -> list[list[Tensor]] | None:
        """What stays of one row; None if it is within its limit.

        Parameters
        ----------
        scores : layer -> kv head -> FloatTensor [n]
            log r of every stored entry, oldest first; what always stays has a score above all others.
        n_seen : int
            Tokens that the row has seen.
        row : int
            Whose state to keep.
        every : int >= 1, optional
            While decoding: make room, at most for that many tokens (see `room`). None: cut to the limit.

        Returns
        -------
        layer -> kv head -> BoolTensor [n]

        Raises
        ------
        ConfigError
            For a score that is NaN (the layer is named), or betas for another number of layers.
        """
        sizes = [[len(segment) for segment in layer] for layer in scores]
        n_segments, in_use = sum(map(len, sizes)), sum(map(sum, sizes))
        state = self.rows.setdefault(row, RowState())
        state.in_use, state.allowed = in_use, self.allowed(n_seen, n_segments)
        if not self.is_due(in_use, n_seen, n_segments):
            state.q = 0.0
            return None
        n_kept = state.allowed - (0 if every is None else self.room(n_seen, n_segments, every))
        state.q = self.q(in_use, n_kept)
        if state.q != 1 - n_kept / in_use:
            n_kept = in_use - int(state.q * in_use)
        flat = self._scaled(scores)
        kept, state.log_quantile = keep_above_quantile(flat, [n for layer in sizes for n in layer], n_kept)
        state.rounds += 1
        parts = iter(kept.split([n for layer in sizes for n in layer]))
        return [[next(parts) for _ in layer] for layer in sizes]

    def _scaled(self, scores: Segments) -> Tensor:
        """log(r / beta) of all entries, flat: r > beta * Q is r / beta > Q."""
        if self.betas and len(self.betas) != len(scores):
            raise ConfigError(f"threshold controller: {len(self.betas)} betas for {len(scores)} layers")
        flat = []
        for place, layer in enumerate(scores):
            together = torch.cat([segment.float() for segment in layer])
            if bool(together.isnan().any()):
                raise ConfigError(
                    f"relevance scores of compressible layer {place} are NaN: nothing can be chosen"
                )
            flat.append(together - math.log(self.betas[place]) if self.betas else together)
        return torch.cat(flat)

    def thresholds(self, n_layers: int, row: int = 0, betas: Sequence[float] = ()) -> Tensor:
        """FloatTensor [L]: tau_l = beta_l * quantile of the last round, in units of r; 0 before any.

        Infinite where nothing is left but what always stays.

        `betas`: those that the scores had in them already (`ATSKV.ranked`), where the controller has none.
        """
        state = self.rows.get(row, RowState())
        factors = torch.tensor(self.betas or tuple(betas) or (1.0,) * n_layers)
        return factors * torch.tensor(state.log_quantile, dtype=torch.float64).exp().to(factors.dtype)

    # ---- state ------------------------------------------------------------------------------------------------

    def reorder(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]` (beam search)."""
        old = self.rows
        self.rows = {new: RowState(**asdict(old[row])) for new, row in enumerate(rows.tolist()) if row in old}

    def state_dict(self) -> dict[str, Any]:
        """JSON, except that a quantile may be -inf."""
        return {"rows": {str(row): asdict(state) for row, state in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.rows = {int(row): RowState(**values) for row, values in state["rows"].items()}


def keep_above_quantile(scores: Tensor, sizes: Sequence[int], n_kept: int) -> tuple[Tensor, float]:
    """The `n_kept` best of some segments' scores, found by their quantile; every segment keeps its best.

    Parameters
    ----------
    scores : FloatTensor [N]
        Segment after segment, oldest entry first.
    sizes : entries of each segment
    n_kept : int
        Raised to one per segment that has any.

    Returns
    -------
    (BoolTensor [N], the quantile: what is above stays, what is below leaves, equals go by age, newest first)
    """
    n = scores.numel()
    n_kept = min(max(n_kept, sum(size > 0 for size in sizes)), n)
    if n_kept == n:
        return torch.ones(n, dtype=torch.bool, device=scores.device), -math.inf
    best = _best_of_each(scores, sizes)
    competing = scores.index_fill(0, best, torch.inf)
    quantile = competing.kthvalue(n - n_kept).values
    kept = competing > quantile
    kept[best] = True  # also where others are infinite, too
    missing = n_kept - int(kept.sum())
    if missing:
        equal = ((competing == quantile) & ~kept).nonzero().flatten()
        kept[equal[_newest_first(equal, sizes)[:missing]]] = True
    return kept, float(quantile)


def _best_of_each(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """LongTensor: the flat place of the best entry of every segment that has any, the newest of equals."""
    if len(set(sizes)) == 1:
        size = sizes[0]
        from_end = scores.view(-1, size).flip(1).argmax(dim=1)
        return torch.arange(len(sizes), device=scores.device) * size + (size - 1) - from_end
    found, start = [], 0
    for size in sizes:
        if size:
            found.append(start + size - 1 - int(scores[start : start + size].flip(0).argmax()))
        start += size
    return torch.tensor(found, device=scores.device)


def _newest_first(index: Tensor, sizes: Sequence[int]) -> Tensor:
    """LongTensor: the order of flat places `index` by age in their segment, then by segment."""
    ends = torch.tensor(sizes, device=index.device).cumsum(0)
    segment = torch.searchsorted(ends, index, right=True)
    age = ends[segment] - 1 - index
    return (age * len(sizes) + segment).argsort()


class ByQuantile(AcrossLayers):
    """A controller's choice for one row that is read as a whole: nothing leaves before the last layer's scores came."""

    def __init__(self, n_layers: int, controller: ThresholdController) -> None:
        self.n_layers, self.controller = n_layers, controller
        self._scores: list[Tensor] = []

    def after_layer(self, scores: Tensor) -> dict[int, Tensor]:
        """Nothing before the last layer, then every layer."""
        self._scores.append(scores)
        if len(self._scores) < self.n_layers:
            return {}
        kept = self.controller.cut([list(layer) for layer in self._scores], scores.shape[-1])
        if kept is None:
            return {
                place: torch.ones_like(layer, dtype=torch.bool) for place, layer in enumerate(self._scores)
            }
        return {place: torch.stack(layer) for place, layer in enumerate(kept)}
