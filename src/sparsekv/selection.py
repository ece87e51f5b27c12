"""Which KV entries can later queries still see? The one value that everything else reads.

Shape letters: B batch, L layers (or 1: shared), H kv heads (or 1: shared), T tokens (columns of the padded
input), Q queries. A column is an index into the padded input, never a RoPE position.

    visible(q, k)  =  k <= q < evicted_at[k]

Drawn for one head, T = 6, entries 2 and 3 evicted after column 3 (`evicted_at = 4`):

    query 0   ■ ⬚ ⬚ ⬚ ⬚ ⬚
    query 1   ■ ■ ⬚ ⬚ ⬚ ⬚
    query 2   ■ ■ ■ ⬚ ⬚ ⬚
    query 3   ■ ■ ■ ■ ⬚ ⬚
    query 4   ■ ■ ⬚ ⬚ ■ ⬚
    query 5   ■ ■ ⬚ ⬚ ■ ■

This module knows nothing of policies, models or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sparsekv.errors import ConfigError

NEVER: int = torch.iinfo(torch.int32).max
"""`evicted_at` of an entry that is never evicted."""


@dataclass(frozen=True)
class Selection:
    """One integer per KV entry: the first query column that no longer sees it.

    Parameters
    ----------
    evicted_at : IntTensor [B, L or 1, H or 1, T], int32
        `NEVER` for an entry that stays. Real tokens have `evicted_at[k] > k` (a token always sees itself);
        pads have 0 (nobody ever sees them).
    log_weight : FloatTensor [B, L or 1, H or 1, T], optional
        A soft keep: where an entry would be hidden from a later query, this is added to the attention logit
        instead of -inf. Differentiable. 0 keeps, very negative evicts.

    Raises
    ------
    ConfigError
        If the tensors do not have four dimensions, or a real token would not see itself.
    """

    evicted_at: Tensor
    log_weight: Tensor | None = None

    def __post_init__(self) -> None:
        at = self.evicted_at
        if at.ndim != 4 or at.dtype != torch.int32:
            raise ConfigError(f"evicted_at must be int32 [B, L, H, T], got {at.dtype} {tuple(at.shape)}")
        column = torch.arange(at.shape[-1], device=at.device, dtype=torch.int32)
        if bool(((at != 0) & (at <= column)).any()):
            raise ConfigError("evicted_at must be greater than the entry's own column (or 0 for a pad)")
        if self.log_weight is not None and self.log_weight.ndim != 4:
            raise ConfigError(f"log_weight must be [B, L, H, T], got shape {tuple(self.log_weight.shape)}")

    # ---- construction -------------------------------------------------------------------------------------

    @classmethod
    def from_kept(
        cls, kept: Tensor, *, context_len: int | None = None, pad: Tensor | None = None
    ) -> Selection:
        """Entries that are not `kept` leave once the context has been read.

        Parameters
        ----------
        kept : BoolTensor [B, L, H, T]
        context_len : int, default T
            The first query column that misses the evicted entries.
        pad : BoolTensor [B, T], optional
            True where the input is padding; those entries get 0.
        """
        length = kept.shape[-1]
        step = length if context_len is None else context_len
        at = torch.full(kept.shape, NEVER, dtype=torch.int32, device=kept.device)
        at = at.masked_fill(~kept, step)
        if pad is not None:
            at = at.masked_fill(pad[:, None, None, :].to(at.device), 0)
        return cls(at)

    @classmethod
    def full(cls, attention_mask: Tensor) -> Selection:
        """Nothing evicted; pads hidden. `attention_mask` [B, T], 1 or True for real tokens."""
        real = attention_mask.bool()[:, None, None, :]
        return cls.from_kept(real, pad=~attention_mask.bool())

    # ---- reading ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, L, H, T); L and H are 1 where shared."""
        b, n_layers, h, t = self.evicted_at.shape
        return b, n_layers, h, t

    def layer(self, layer: int) -> Tensor:
        """`evicted_at` of one layer, [B, H or 1, T]."""
        return self.evicted_at[:, min(layer, self.evicted_at.shape[1] - 1)]

    def layer_log_weight(self, layer: int) -> Tensor | None:
        """`log_weight` of one layer, [B, H or 1, T], or None."""
        if self.log_weight is None:
            return None
        return self.log_weight[:, min(layer, self.log_weight.shape[1] - 1)]

    def kept_at(self, step: int) -> Tensor:
        """BoolTensor [B, L, H, T]: entries that the query at column `step` sees among those before it."""
        column = torch.arange(self.shape[-1], device=self.evicted_at.device)
        return (self.evicted_at > step) & (column < step)

    @cached_property
    def boundaries(self) -> list[tuple[int, int]] | None:
        """(first real column, the one column at which entries leave) of every row; None if a row has several.

        A row that evicts nothing has T as its boundary. Padding must lie on the left, alike in all layers and heads.
        """
        found = []
        total = self.shape[-1]
        for row in self.evicted_at:
            pads = row == 0
            start = int(pads[0, 0].sum())
            leaving = row[(row > 0) & (row < NEVER)]
            end = int(leaving.min()) if leaving.numel() else total
            uneven = bool(pads[..., start:].any()) or not bool(pads[..., :start].all())
            if uneven or end > total or bool((leaving != end).any()):
                return None
            found.append((start, end))
        return found

    def visible(self, layer: int, query_columns: Tensor) -> Tensor:
        """BoolTensor [B, H or 1, Q, T] for queries at `query_columns` [Q]."""
        at = self.layer(layer)
        column = torch.arange(at.shape[-1], device=at.device)
        query = query_columns.to(at.device)[:, None]
        return (column <= query) & (query < at[:, :, None, :])

    def slots(self, layer: int, step: int) -> list[list[Tensor]]:
        """Sorted kept columns before `step`, as `[row][kv head] -> LongTensor`."""
        at = self.layer(layer)[..., :step]
        return [[(head > step).nonzero().flatten() for head in row] for row in at]

    def evicts(self) -> bool:
        """True if any real entry is ever evicted."""
        at = self.evicted_at
        return bool(((at > 0) & (at < NEVER)).any())

    # ---- new selections from old ------------------------------------------------------------------------------

    def extend(self, total: int) -> Selection:
        """The same selection over `total` columns; the new ones stay (later turns)."""
        missing = total - self.shape[-1]
        if missing < 0:
            raise ConfigError(f"extend to {total} columns, but the selection has {self.shape[-1]} already")
        at = torch.nn.functional.pad(self.evicted_at, (0, missing), value=NEVER)
        weight = self.log_weight
        if weight is not None:
            weight = torch.nn.functional.pad(weight, (0, missing))
        return Selection(at, weight)

    def merge(self, other: Selection) -> Selection:
        """Elementwise minimum: evicted as soon as either evicts. Hard selections only."""
        if self.log_weight is not None or other.log_weight is not None:
            raise ConfigError("merge takes hard selections; one of the two has a log_weight")
        total = max(self.shape[-1], other.shape[-1])
        return Selection(torch.minimum(self.extend(total).evicted_at, other.extend(total).evicted_at))

    def row(self, index: int) -> Selection:
        """One batch row, B = 1."""
        weight = None if self.log_weight is None else self.log_weight[index : index + 1]
        return Selection(self.evicted_at[index : index + 1], weight)

    def to(self, device: torch.device | str) -> Selection:
        """The same selection on another device."""
        weight = None if self.log_weight is None else self.log_weight.to(device)
        return replace(self, evicted_at=self.evicted_at.to(device), log_weight=weight)


def stack(selections: Sequence[Selection]) -> Selection:
    """Selections over the same columns as one batch, on the device of the first.

    Shared layers and heads are expanded where they differ. Hard selections only.
    """
    if any(s.log_weight is not None for s in selections):
        raise ConfigError("stack takes hard selections; one of these has a log_weight")
    device = selections[0].evicted_at.device
    n_layers = max(s.shape[1] for s in selections)
    n_heads = max(s.shape[2] for s in selections)
    return Selection(
        torch.cat([s.evicted_at.to(device).expand(-1, n_layers, n_heads, -1) for s in selections])
    )


@dataclass(frozen=True)
class StepSelection:
    """The subset of STORED entries that one decoding step attends to (Quest, RocketKV's second stage, recall).

    Nothing is freed by it: it is reported as `attended_fraction`, never as compression.

    Parameters
    ----------
    attended : BoolTensor [B, L or 1, H or 1, N]
        Over the stored slots of each layer and kv head.
    """

    attended: Tensor

    def attended_fraction(self, stored: Tensor) -> float:
        """Attended entries over stored ones, 1.0 of none. `stored` is a BoolTensor that broadcasts to `attended`."""
        attended, total = self._counts(stored)
        return float(attended.sum() / total.sum()) if total.sum() else 1.0

    def attended_fractions(self, stored: Tensor) -> list[float]:
        """The same of each row."""
        attended, total = self._counts(stored)
        return torch.where(total > 0, attended / total.clamp(min=1), 1.0).tolist()

    def _counts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Per row: entries attended to, and stored."""
        stored = stored.expand_as(self.attended)
        return tuple(x.flatten(1).sum(dim=1).double() for x in (self.attended & stored, stored))  # type: ignore[return-value]


@dataclass
class SelectionTrace:
    """Kept (or attended) columns per recorded step, layer and kv head of ONE sequence: for heat maps and stability.

    Parameters
    ----------
    steps : list of int
        The query columns at which the state was recorded, ascending.
    kept : list of [layer][kv head] -> IntTensor
        Sorted column indices, one entry per step.
    length : int
        Number of columns of the sequence.
    """

    steps: list[int]
    kept: list[list[list[Tensor]]]
    length: int

    @classmethod
    def from_selection(
        cls, selection: Selection, steps: Sequence[int], *, row: int = 0, pad: int = 0
    ) -> SelectionTrace:
        """Record `selection` at `steps`; `pad` leading columns of the row are padding and are dropped."""
        single = selection.row(row)
        kept = []
        for step in steps:
            at_step = [
                [(h - pad).to(torch.int32) for h in single.slots(i, step)[0]] for i in range(single.shape[1])
            ]
            kept.append(at_step)
        return cls(steps=[s - pad for s in steps], kept=kept, length=selection.shape[-1] - pad)

    def save(self, path: str | Path) -> None:
        """Write as one safetensors file (atomically: a temporary sibling is renamed)."""
        from safetensors.torch import save_file

        flat = [h for step in self.kept for layer in step for h in layer]
        sizes = torch.tensor([h.numel() for h in flat], dtype=torch.int64)
        shape = torch.tensor(
            [len(self.kept), len(self.kept[0]) if self.kept else 0, self._heads(), self.length]
        )
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        tensors = {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "sizes": sizes,
            "columns": torch.cat(flat).to(torch.int32) if flat else torch.zeros(0, dtype=torch.int32),
            "shape": shape.to(torch.int64),
        }
        save_file(tensors, temporary)
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> SelectionTrace:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        data = load_file(path)
        n_steps, n_layers, n_heads, length = data["shape"].tolist()
        parts = iter(torch.split(data["columns"], data["sizes"].tolist()))
        kept = [[[next(parts) for _ in range(n_heads)] for _ in range(n_layers)] for _ in range(n_steps)]
        return cls(steps=data["steps"].tolist(), kept=kept, length=length)

    def _heads(self) -> int:
        return len(self.kept[0][0]) if self.kept and self.kept[0] else 0
