"""From a batch to what its forward hides: seeds, boundaries, and the plan.

Shape letters: B rows, T columns of the left-padded batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError, unknown
from sparsekv.plan import Dropping, Observer, SelectionPlan, budget_for
from sparsekv.policies.base import Policy, TokenContext, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.trainable import trainable
from sparsekv.selection import NEVER, Selection
from sparsekv.training.data_layout import IGNORED

WAYS: tuple[Dropping, ...] = ("prefill", "streaming")
BOUNDARIES = ("random", "end")
BOUNDARY, SEEDS = "boundary", "seeds"
"""Batch keys: LongTensor [B], the first column after each row's context, and the row's seed."""
KEYS = ("input_ids", "attention_mask", "labels", BOUNDARY, "sample_index")
"""What a collated batch has."""


@dataclass(frozen=True)
class DroppingConfig:
    """How entries leave while a model trains.

    Parameters
    ----------
    way : "prefill" or "streaming"
    boundary : "end" or "random"
        "prefill": where a sample's own context ends, or a random column between a quarter and three quarters of it,
        drawn by the sample's seed. Samples that set no boundary always get a random one.
    window : int >= 1
        "streaming": an entry that is not kept leaves so many columns after its own. Policies that score by attention
        see the whole sequence for that, so an early entry's fate knows of later queries; token policies do not.
    """

    way: Dropping = "prefill"
    boundary: Literal["random", "end"] = "end"
    window: int = 128

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise unknown("dropping", self.way, WAYS)
        if self.boundary not in BOUNDARIES:
            raise unknown("boundary", self.boundary, BOUNDARIES)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"window must be a whole number >= 1, got {self.window!r}")


def seed_of(*parts: int) -> int:
    """A 63-bit seed from whole numbers: the same in every process, unrelated for neighbours."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def row_seeds(run_seed: int, epoch: int, sample_index: Tensor) -> tuple[int, ...]:
    """One seed per row: a sample draws the same in any batching and on any number of ranks."""
    return tuple(seed_of(run_seed, epoch, int(index)) for index in sample_index.tolist())


def last_drawn(real: int) -> int:
    """The largest boundary that is drawn for a sample of `real` tokens."""
    return max(1, 3 * real // 4)


def resolve_boundaries(
    boundary: Tensor, attention_mask: Tensor, seeds: Sequence[int], how: str
) -> tuple[int, ...]:
    """The boundary column of every row; with "end" that of the sample, unless `boundary` [B] has 0."""
    found = []
    total = attention_mask.shape[1]
    for given, real, seed in zip(boundary.tolist(), attention_mask.sum(1).tolist(), seeds, strict=True):
        start = total - int(real)
        if given and how == "end":
            found.append(int(given))
            continue
        low, high = max(1, int(real) // 4), last_drawn(int(real))
        found.append(start + low + seed_of(seed, 1) % (high - low + 1))
    return tuple(found)


def make_plan(
    model: Any,
    batch: dict[str, Tensor],
    policy: Policy,
    budget: Budget,
    how: DroppingConfig,
    *,
    boundaries: Sequence[int],
    seeds: Sequence[int],
    tokenizer: Any = None,
    observers: tuple[Observer, ...] = (),
) -> SelectionPlan:
    """The plan of one forward over `batch`. Contexts too short for the budget lose what they can: `budget_for`.

    Raises
    ------
    ConfigError
        For policies that a training step can't evict by (`policies.trainable`).
    """
    mask = batch["attention_mask"].bool()
    policy = trainable(policy, budget.scope)
    if isinstance(policy, TokenPolicy):
        selection = _select(
            model, batch["input_ids"], mask, policy, budget, how, boundaries, seeds, tokenizer
        )
        window = how.window if how.way == "streaming" else None
        return SelectionPlan(selection=selection, window=window, observers=observers)
    padded = None if bool(mask.all()) else mask
    streaming = how.way == "streaming"
    return SelectionPlan(
        policy=policy,
        budget=budget,
        boundary=None if streaming else tuple(boundaries),
        window=how.window if streaming else None,
        attention_mask=padded,
        seeds=tuple(seeds),
        ids=batch["input_ids"],
        tokenizer=tokenizer,
        observers=observers,
    )


def _select(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    policy: TokenPolicy,
    budget: Budget,
    how: DroppingConfig,
    boundaries: Sequence[int],
    seeds: Sequence[int],
    tokenizer: Any,
) -> Selection:
    """A token policy's Selection over the padded columns."""
    context = TokenContext.of_model(model, input_ids, mask, tokenizer=tokenizer, seeds=tuple(seeds))
    rows = []
    total = input_ids.shape[1]
    for row, seed in enumerate(seeds):
        start = total - int(mask[row].sum())
        end = total if how.way == "streaming" or policy.own_prefill else min(boundaries[row], total)
        ids, fits = input_ids[row, start:end], budget_for(policy, budget, end - start)
        if policy.own_prefill:
            at = policy.evicted_at_row(TokenRow(ids, context, seed), fits)
            at = torch.where(at < NEVER, at + start, at)
        else:
            kept = policy.keep_row(TokenRow(ids, context, seed), fits)
            columns = torch.arange(start, end, dtype=torch.int32, device=kept.device)
            leaves = columns + how.window if how.way == "streaming" else torch.full_like(columns, end)
            at = torch.where(kept, NEVER, leaves)
        at = torch.nn.functional.pad(at.to(torch.int32), (0, total - end), value=NEVER)
        rows.append(torch.nn.functional.pad(at, (start, 0), value=0))
    n_layers, n_heads = (max(at.shape[axis] for at in rows) for axis in (0, 1))
    return Selection(torch.stack([at.expand(n_layers, n_heads, -1) for at in rows]))


def achieved_compression(plan: SelectionPlan, mask: Tensor, boundaries: Sequence[int]) -> float:
    """Mean fraction of the context's entries that the plan's last forward hid (soft ones: 1 - mean weight).

    Streaming: of all entries, those that left before the last column.
    """
    if plan.soft_kept:
        return 1.0 - float(torch.stack([kept.detach() for kept in plan.soft_kept.values()]).nanmean())
    lost = []
    total = mask.shape[1]
    for at in plan.selected.values():
        for row, boundary in enumerate(boundaries):
            start = total - int(mask[row].sum())
            end = boundary if plan.window is None else total
            if end > start:
                lost.append(
                    (at[row, :, start:end] < (total if plan.window is not None else NEVER)).float().mean()
                )
    return float(torch.stack(lost).mean()) if lost else 0.0


def contexts_of_rows(batch: Mapping[str, Tensor], way: Dropping) -> Tensor:
    """LongTensor [B]: the entries of each row that are chosen among, those before its boundary; streaming: all."""
    mask = batch["attention_mask"]
    if way == "streaming":
        return mask.sum(1)
    boundary = batch[BOUNDARY].to(mask.device)
    return (boundary - (mask.shape[1] - mask.sum(1))).clamp_min(0)


def labels_of_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """FloatTensor [B]: how many tokens of each row have a label."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1).float()


def _check_boundaries(boundary: Tensor, attention_mask: Tensor) -> None:
    total = attention_mask.shape[1]
    for row, (given, real) in enumerate(zip(boundary.tolist(), attention_mask.sum(1).tolist(), strict=True)):
        start = total - int(real)
        if given and not start < given <= total:
            raise ConfigError(
                f"data_collator: boundary is a column of the padded batch, in [{start + 1}, {total}] for row {row}, "
                f"which starts after {start} of padding (or 0: none); got {given}"
            )


def ready_batch(
    batch: Mapping[str, Any],
    dropping: DroppingConfig,
    *,
    seed: int,
    epoch: int,
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
) -> dict[str, Tensor]:
    """A collated batch with seeds and boundaries, and what the objective makes of that (`Objective.prepare`, or None).

    Raises
    ------
    ConfigError
        If a key is missing, if padding lies after real tokens, or if a boundary lies in it.
    """
    made = dict(batch)
    for key in KEYS:
        if key not in made:
            raise ConfigError(
                f"data_collator: the batch has no {key}; it has {', '.join(sorted(made)) or 'nothing'}, and needs "
                f"{', '.join(KEYS)}"
            )
    if not bool((made["attention_mask"].diff(dim=1) >= 0).all()):
        raise ConfigError(
            "data_collator: padding must lie on the left; this batch has some after real tokens"
        )
    _check_boundaries(made[BOUNDARY], made["attention_mask"])
    first = made["attention_mask"].cumsum(1) <= 1  # a row's first token follows nothing, or padding
    made["labels"] = made["labels"].masked_fill(first, IGNORED)
    seeds = row_seeds(seed, epoch, made.pop("sample_index"))
    boundaries = resolve_boundaries(made[BOUNDARY], made["attention_mask"], seeds, dropping.boundary)
    made[BOUNDARY], made[SEEDS] = torch.tensor(boundaries), torch.tensor(seeds)
    return made if prepare is None else prepare(made)


def evicted_share(plan: SelectionPlan, mask: Tensor) -> Tensor | None:
    """FloatTensor [B, T]: from how many of the layers and kv heads, of all, an entry has left after the last column.

    None where that can't be told beforehand: of policies that decide inside the layers, and under streaming, where the
    tokens that follow belong to what is chosen among.
    """
    if plan.selection is None or plan.window is not None:
        return None
    at = plan.selection.evicted_at
    leaves = (at > 0) & (at <= mask.shape[1])
    return leaves.float().mean(dim=(1, 2))
