"""Reading a part of what is stored: each decoding step chooses the entries it attends to. Nothing is freed by it.

Shape letters: B rows, H kv heads, S = B * H segments, G query heads per kv head, Q queries, N stored, D head size.

Which entries is a `StepRule`'s business. Here the pages' bounds are kept while a layer grows, the chosen entries are
read, and what the last step read is remembered (`StepSelection`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.cache.attend import attend_stored, tail_mask
from sparsekv.cache.frozen import is_frozen
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.segments import Segments
from sparsekv.cache.sparse import SparseCache
from sparsekv.policies.base import Policy
from sparsekv.policies.budget import Budget
from sparsekv.policies.step_rules import Pages, StepRule, best_entries
from sparsekv.selection import StepSelection

_SPARE_PAGES = 32
"""Pages beyond the present ones for which bounds have room: one copy of the bounds every 32 pages."""


@dataclass
class PageBounds:
    """Least and greatest key per page of some segments; brought up to date as entries are appended.

    Parameters
    ----------
    page_size : int >= 1
    n_entries : int
        Entries that the bounds cover.
    lowest, highest : FloatTensor [S, P and room, D]
    """

    page_size: int
    n_entries: int = 0
    lowest: Tensor | None = None
    highest: Tensor | None = None

    def of(self, keys: Tensor) -> Pages:
        """Bounds of keys [S, N, D], of which the first `n_entries` are those seen last time."""
        total, size = keys.shape[1], self.page_size
        n_pages = -(-total // size)
        entries = torch.full((n_pages,), size, device=keys.device)
        entries[-1] = total - (n_pages - 1) * size
        if size == 1:
            return Pages(keys, keys, entries)
        lowest, highest = self._room(keys, n_pages)
        first = self.n_entries // size  # the page that was not full, or the first new one
        new = keys[:, first * size :]
        n_whole = new.shape[1] // size
        if n_whole:
            whole = new[:, : n_whole * size].unflatten(1, (n_whole, size))
            lowest[:, first : first + n_whole], highest[:, first : first + n_whole] = torch.aminmax(
                whole, dim=2
            )
        if n_whole * size < new.shape[1]:
            lowest[:, n_pages - 1], highest[:, n_pages - 1] = torch.aminmax(new[:, n_whole * size :], dim=1)
        self.n_entries = total
        return Pages(lowest[:, :n_pages], highest[:, :n_pages], entries)

    def _room(self, keys: Tensor, n_pages: int) -> tuple[Tensor, Tensor]:
        lowest, highest = self.lowest, self.highest
        if lowest is None or highest is None or lowest.shape[1] < n_pages or is_frozen(lowest):
            blank = keys.new_empty(keys.shape[0], n_pages + _SPARE_PAGES, keys.shape[2])
            grown = blank, blank.clone()
            if lowest is not None and highest is not None:
                grown[0][:, : lowest.shape[1]], grown[1][:, : lowest.shape[1]] = lowest, highest
            self.lowest, self.highest = lowest, highest = grown
        return lowest, highest


@dataclass(frozen=True)
class _Part:
    """Segments [start, stop) with what a query may see of them: `slots` [N] where some stored entries are hidden."""

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    slots: Tensor | None = None


@dataclass(frozen=True)
class _Read:
    """What the last step read of segments [start, stop): `chosen` [S, n] of `total` visible entries (None: all).

    Without references to keys: they would keep a whole buffer alive.
    """

    start: int
    stop: int
    total: int
    slots: Tensor | None
    chosen: Tensor | None

    @property
    def n_read(self) -> int:
        return self.total if self.chosen is None else self.chosen.shape[1]


@dataclass
class StepReader:
    """Reads what a rule chooses, for one new token per row; several at once (a question) read everything stored.

    Holds no state that could be wrong: bounds belong to one state of a layer's storage and are made again when the
    layer was cropped, reordered, compacted or restored.

    Parameters
    ----------
    rule : StepRule
    """

    rule: StepRule
    _store: weakref.ref[Segments] | None = field(default=None, repr=False)
    _bounds: dict[tuple[int, int], PageBounds] = field(default_factory=dict, repr=False)
    _last: list[_Read] = field(default_factory=list, repr=False)
    _shape: tuple[int, int] = (0, 0)

    def attend(
        self, layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """See `sparsekv.cache.layer.Reader`."""
        self._last = []
        batch, n_heads, n_query, width = query.shape
        if n_query > 1:
            return attend_stored(layer, query, attention_mask, scaling)
        heads = layer.n_kv_heads
        self._shape = batch, heads
        folded = query.reshape(batch * heads, n_heads // heads, width)
        output = torch.empty_like(folded)
        scale = width**-0.5 if scaling is None else scaling
        self._follow(layer)
        for part in _visible(layer, attention_mask, query.device):
            of_part = folded[part.start : part.stop]
            keys, values = part.keys, part.values
            chosen = self._choose(part, of_part, scale)
            if chosen is not None:
                keys = keys.gather(1, chosen[:, :, None].expand(-1, -1, keys.shape[2]))
                values = values.gather(1, chosen[:, :, None].expand(-1, -1, values.shape[2]))
            output[part.start : part.stop] = nn.functional.scaled_dot_product_attention(
                of_part[None], keys[None], values[None], scale=scale
            )[0]
            self._last.append(_Read(part.start, part.stop, part.keys.shape[1], part.slots, chosen))
        return output.view(batch, n_heads, 1, width).transpose(1, 2).contiguous()

    def fresh(self) -> StepReader:
        """A reader by the same rule that has read nothing yet."""
        return StepReader(self.rule)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: bounds are made again, and a weak reference can't travel."""
        return self.fresh().__dict__ | {"_last": self._last, "_shape": self._shape}

    # ---- what the last step read -----------------------------------------------------------------------------------

    @property
    def attended_fraction(self) -> float:
        """Entries that the last step read over those it could see; 1.0 if it read everything, or none has been made."""
        seen = sum((read.stop - read.start) * read.total for read in self._last)
        return sum((read.stop - read.start) * read.n_read for read in self._last) / seen if seen else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that the bounds take."""
        held = [t for bounds in self._bounds.values() for t in (bounds.lowest, bounds.highest)]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def last_step(self) -> tuple[StepSelection, Tensor] | None:
        """The last step's choice and the slots it could choose from (BoolTensor [B, 1, H, N]); None before the first.

        Slots count a segment's stored entries from its oldest; segments that store fewer than N end earlier.
        """
        if not self._last:
            return None
        batch, heads = self._shape
        slots = [torch.arange(r.total) if r.slots is None else r.slots.cpu() for r in self._last]
        attended = torch.zeros(
            batch * heads, max(int(of_part[-1]) + 1 for of_part in slots), dtype=torch.bool
        )
        stored = torch.zeros_like(attended)
        for read, of_part in zip(self._last, slots, strict=True):
            stored[read.start : read.stop, of_part] = True
            index = (
                of_part.expand(read.stop - read.start, -1)
                if read.chosen is None
                else of_part[read.chosen.cpu()]
            )
            attended[read.start : read.stop].scatter_(1, index, True)
        shape = (batch, 1, heads, attended.shape[1])
        return StepSelection(attended.view(shape)), stored.view(shape)

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def _choose(self, part: _Part, query: Tensor, scaling: float) -> Tensor | None:
        """LongTensor [S, n_attended] of places among what is visible, or None: all of it."""
        total = part.keys.shape[1]
        sizes = self.rule.sizes(total, part.keys.shape[2])
        if sizes is None:
            return None
        place = part.start, part.stop
        bounds = self._bounds.get(place)
        if bounds is None or bounds.page_size != sizes.page_size or part.slots is not None:
            bounds = self._bounds[place] = PageBounds(sizes.page_size)
        pages = bounds.of(part.keys)
        return best_entries(self.rule.page_scores(query, pages, sizes, scaling), total, sizes)

    def _follow(self, layer: SparseLayer) -> None:
        """Forget the bounds of another state: an append changes `layer.store` in place, all else replaces it."""
        if self._store is None or self._store() is not layer.store:
            self._store, self._bounds = weakref.ref(layer.store), {}


def _visible(layer: SparseLayer, attention_mask: Tensor | None, device: torch.device) -> Iterator[_Part]:
    """What one new token per row sees: groups of equal segments, cut by rows where padding is stored."""
    mask = tail_mask(layer, attention_mask, 1, device)  # [B or 1, 1, tail], None: everything
    for group in layer.groups():
        if mask is None:
            yield _Part(group.start, group.stop, group.keys, group.values)
            continue
        start = group.start
        while start < group.stop:
            row = start // layer.n_kv_heads
            stop = min(group.stop, (row + 1) * layer.n_kv_heads)
            seen = nn.functional.pad(mask[min(row, mask.shape[0] - 1), 0], (group.n_prefix, 0), value=True)
            slots = seen.nonzero().flatten()
            inside = slice(start - group.start, stop - group.start)
            yield _Part(start, stop, group.keys[inside][:, slots], group.values[inside][:, slots], slots)
            start = stop


def install_steps(cache: SparseCache, policy: Policy, budget: Budget) -> None:
    """Let a cache's layers be read as `policy` says from now on, where it says anything (`Policy.step_rule`)."""
    for place, (_, layer) in enumerate(cache.sparse_layers()):
        rule = policy.step_rule(budget, place) if policy.by_step else None
        if rule is not None:
            layer.reader = StepReader(rule)
        elif isinstance(layer.reader, StepReader):
            layer.reader = None


def reads_by_step(cache: SparseCache) -> bool:
    """True if single decoding steps attend to a part of what some layer stores."""
    return any(isinstance(layer.reader, StepReader) for _, layer in cache.sparse_layers())


def attended_fraction(cache: SparseCache) -> float:
    """Entries that the last decoding step attended to over those stored, over all compressible layers; 1.0 if all."""
    sizes = [int(layer.stored().sum()) for _, layer in cache.sparse_layers()]
    parts = [
        layer.reader.attended_fraction if isinstance(layer.reader, StepReader) else 1.0
        for _, layer in cache.sparse_layers()
    ]
    return sum(size * part for size, part in zip(sizes, parts, strict=True)) / max(sum(sizes), 1)


def step_bytes(cache: SparseCache) -> int:
    """Bytes of what the layers' step readers remember, beside the cache's own."""
    return sum(
        layer.reader.nbytes for _, layer in cache.sparse_layers() if isinstance(layer.reader, StepReader)
    )
