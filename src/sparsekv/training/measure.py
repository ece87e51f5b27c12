"""What a training step tells of itself: losses, compression, and how much attention fell on what stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekv.observers import AttentionSparsity, RetainedAttention
from sparsekv.plan import Observer, SelectionPlan
from sparsekv.training.dropping import BOUNDARY, achieved_compression
from sparsekv.training.meter import Meter
from sparsekv.training.objective import Losses


def observers_of_step(
    kind: Any, seeds: Sequence[int], weights: Sequence[float], *, logged: bool
) -> tuple[Observer, ...]:
    """Who watches a forward: a sparsity loss of some kind (None: none), and what is only measured, if it is `logged`.

    `seeds`, `weights`: of the batch's rows.
    """
    found: list[Observer] = []
    if kind is not None:
        found.append(AttentionSparsity(kind=kind, seeds=tuple(seeds), weights=tuple(weights)))
    if logged:
        found.append(RetainedAttention())
    return tuple(found)


def measure(
    meter: Meter, plan: SelectionPlan, batch: Mapping[str, Tensor], losses: Losses, ratio: float
) -> None:
    """Add one micro-batch, whose forward ran under `plan`, to what is logged."""
    meter.add({name: float(value) for name, value in losses.parts.items()}, losses.counts)
    meter.add_tokens(int(batch["attention_mask"].sum()))
    meter.add_mean("requested_compression", ratio)
    achieved = achieved_compression(plan, batch["attention_mask"], batch[BOUNDARY].tolist())
    meter.add_mean("achieved_compression", achieved)
    retained = plan.collected.get("retained_attention")
    if retained:
        meter.add_mean("retained_attention", float(torch.stack(list(retained.values())).mean()))
