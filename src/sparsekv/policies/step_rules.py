"""Which of the stored entries one decoding step attends to: the formulas, over dense tensors.

Shape letters: S segments (one row's kv head each), G query heads per kv head, N stored entries, P pages, D head size.

A rule knows no cache. `sparsekv.cache.steps` keeps the pages' bounds, asks a rule for the pages' scores and reads the
entries of the best pages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.policies.budget import Budget


@dataclass(frozen=True)
class StepSizes:
    """How one step reads N stored entries: `n_attended` of them, chosen by pages of `page_size` neighbouring slots.

    `n_dims` channels of the query take part in the choice.
    """

    page_size: int
    n_attended: int
    n_dims: int


@dataclass(frozen=True)
class Pages:
    """What is known of the pages of S segments, each with the same number of entries.

    Parameters
    ----------
    lowest, highest : FloatTensor [S, P, D]
        Per channel, the least and the greatest key of each page.
    entries : LongTensor [P]
        Entries per page; only the last may hold fewer than the others.
    """

    lowest: Tensor
    highest: Tensor
    entries: Tensor


class StepRule(ABC):
    """How a step chooses what it attends to."""

    @abstractmethod
    def sizes(self, n_stored: int, width: int) -> StepSizes | None:
        """For `n_stored` entries of head size `width`; None: all of them are read."""

    @abstractmethod
    def page_scores(self, query: Tensor, pages: Pages, sizes: StepSizes, scaling: float) -> Tensor:
        """FloatTensor [S, P], higher = read.

        Parameters
        ----------
        query : FloatTensor [S, G, D]
        pages : Pages of `sizes.page_size` slots
        sizes : what `sizes` gave for this step
        scaling : float
            Of the attention logits.
        """


@dataclass(frozen=True)
class QuestRule(StepRule):
    """Pages by an upper bound of their logits (Quest, arXiv 2406.10774, section 3.3).

    bound(page) = sum_d max(q_d lowest_d, q_d highest_d), the largest over the query heads that share the keys.

    Parameters
    ----------
    budget : Budget
        Entries to read of those stored at the step.
    page_size : int >= 1
    """

    budget: Budget
    page_size: int

    def sizes(self, n_stored: int, width: int) -> StepSizes | None:
        """Pages of a fixed size, as many entries as the budget says."""
        n_attended = self.budget.n_kept(n_stored)
        return None if n_attended >= n_stored else StepSizes(self.page_size, n_attended, width)

    def page_scores(self, query: Tensor, pages: Pages, sizes: StepSizes, scaling: float) -> Tensor:
        """The bounds [S, P]."""
        return page_bounds(query, pages.lowest, pages.highest).amax(dim=1)


@dataclass(frozen=True)
class HybridRule(StepRule):
    """Entries by attention weights approximated along the sequence and the head (RocketKV, arXiv 2502.14051, sec. 3.4).

    Parameters
    ----------
    compression : float >= 1, optional
        c: the step is to move 1/c of what reading all stored entries would move.
    tokens : int >= 1, optional
        The same as a number of entries instead, c = stored / tokens.
    """

    compression: float | None = None
    tokens: int | None = None

    def sizes(self, n_stored: int, width: int) -> StepSizes | None:
        """Half of the traffic goes into the approximation, half into the entries that are then read.

        The approximation reads, of every page of ceil(sqrt(c)) entries (at most floor(c)), one bound in
        `width * page_size / c` channels; the step then reads `stored / 2c` entries.
        """
        tokens = n_stored / (self.compression or 1.0) if self.tokens is None else float(self.tokens)
        if tokens >= n_stored:
            return None
        compression = n_stored / tokens
        page_size = min(math.floor(compression), math.ceil(math.sqrt(compression)))
        n_dims = min(width, max(1, round(width * page_size / compression)))
        return StepSizes(page_size, min(n_stored, max(1, round(tokens / 2))), n_dims)

    def page_scores(self, query: Tensor, pages: Pages, sizes: StepSizes, scaling: float) -> Tensor:
        """Mean over the query heads of the approximate weight [S, P] that each ENTRY of a page gets.

        Of the channels in which the query heads are largest together (sum of |q|), each reads the page's greatest key
        where their sum is positive, the least elsewhere. The logits' scale makes up for the channels left out
        (SparQ's correction): sqrt(D * |q read| / |q|) instead of sqrt(D).
        """
        n_groups, n_pages = query.shape[1], len(pages.entries)
        size = query.abs()
        channels = size.sum(dim=1).topk(sizes.n_dims, dim=-1).indices  # [S, r]
        read = query.gather(2, channels[:, None].expand(-1, n_groups, -1))
        wanted = channels[:, None].expand(-1, n_pages, -1)
        positive = read.sum(dim=1, keepdim=True) > 0
        bound = torch.where(positive, pages.highest.gather(2, wanted), pages.lowest.gather(2, wanted))
        tiny = torch.finfo(torch.float32).tiny  # a query of zeros looks at everything alike
        share = read.abs().sum(-1).float() / size.sum(-1).float().clamp_min(tiny)
        logits = (read @ bound.transpose(1, 2)).float() * (scaling / share.clamp_min(tiny).sqrt())[..., None]
        count = pages.entries.to(logits)
        return ((logits + count.log()).softmax(dim=-1) / count).mean(dim=1)


def page_bounds(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Upper bounds, fp32 [..., G, P], of q . k for queries [..., G, D] and keys in [lowest, highest], [..., P, D].

    sum_d max(q_d lowest_d, q_d highest_d), split by the sign of q_d so that it is a matrix product.
    """
    return box_bounds(query, torch.cat([highest, lowest], dim=-1).float())


def box_bounds(query: Tensor, extremes: Tensor) -> Tensor:
    """As `page_bounds`, where highest and lowest stand side by side already: `extremes` fp32 [..., P, 2 D]."""
    query = query.float()
    both = torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)
    return both @ extremes.transpose(-1, -2)


def best_entries(scores: Tensor, n_stored: int, sizes: StepSizes) -> Tensor:
    """LongTensor [S, n_attended]: slots of the best pages, page by page; the last page is cut to fit.

    Parameters
    ----------
    scores : FloatTensor [S, P]
    n_stored : int
        Entries of every segment; `P = ceil(n_stored / page_size)`.
    """
    page, wanted = sizes.page_size, sizes.n_attended
    n_pages = -(-wanted // page) + (1 if n_stored % page else 0)  # the last page there is may hold fewer
    best = scores.topk(min(n_pages, scores.shape[1]), dim=-1).indices
    slots = (best[:, :, None] * page + torch.arange(page, device=best.device)).flatten(1)
    if n_stored % page:
        slots = slots.gather(1, (slots >= n_stored).int().argsort(dim=1, stable=True))
    return slots[:, :wanted]
