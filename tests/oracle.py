"""The slow, obvious side of every equivalence: one masked forward over the whole padded input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.unfinished import Unfinished
from sparsekv.selection import Selection


def positions(mask: Tensor) -> Tensor:
    """RoPE positions of a padded batch: pads do not count."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


@torch.no_grad()
def masked_logits(
    model: Any, ids: Tensor, mask: Tensor | None, selection: Selection | None, n_last: int
) -> Tensor:
    """Logits of the last `n_last` columns, entries hidden by mask, no cache."""
    padding = {} if mask is None else {"attention_mask": mask.long(), "position_ids": positions(mask)}
    return model(input_ids=ids, selection=selection, use_cache=False, **padding).logits[:, -n_last:]


@torch.no_grad()
def stepped_logits(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, steps: list[int]) -> Tensor:
    """Logits of the columns after what the cache has seen, fed in pieces of the given sizes."""
    out, begin = [], cache.seen
    for size in steps:
        end = begin + size
        padding = {}
        if mask is not None:
            padding = {
                "attention_mask": mask[:, :end].long(),
                "position_ids": positions(mask[:, :end])[:, begin:],
            }
        out.append(model(input_ids=ids[:, begin:end], past_key_values=cache, **padding).logits)
        begin = end
    return torch.cat(out, dim=1)


@contextmanager
def announced(cache: SparseCache) -> Iterator[None]:
    """A forward of a prepared model, for tests that feed and read a cache's layers by hand."""
    cache.unfinished = Unfinished.of(cache)
    yield
    cache.unfinished = None
