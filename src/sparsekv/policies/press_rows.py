"""Which entries did a press keep? Found by comparing key and value rows bit for bit.

Shape letters: H kv heads, T entries before, K entries after, D head size. Rows are matched by a 64-bit hash
of their bits and then compared in full, so a press that changes entries is noticed and never misread.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparsekv.errors import ConfigError

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=32)
def _multipliers(width: int, device: torch.device) -> Tensor:
    """Fixed random odd 64-bit numbers [width]: sums of products with them hash a row."""
    generator = torch.Generator().manual_seed(0x5EED)
    limits = torch.iinfo(torch.int64)
    drawn = torch.randint(limits.min, limits.max, (width,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


def row_hashes(keys: Tensor, values: Tensor) -> Tensor:
    """LongTensor [T]: one hash per entry of one head, from the bits of `keys` [T, D] and `values` [T, Dv]."""
    bits = [part.contiguous().view(_INTEGER[part.element_size()]).to(torch.int64) for part in (keys, values)]
    row = torch.cat(bits, dim=-1)
    return (row * _multipliers(row.shape[-1], row.device)).sum(-1)


def kept_rows(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], name: str) -> Tensor:
    """Which entries of `before` are in `after`.

    Parameters
    ----------
    before, after : (keys, values), each [H, T, D] and [H, K, D]
    name : str
        The method, for the message.

    Returns
    -------
    BoolTensor [H, T]

    Raises
    ------
    ConfigError
        If a row of `after` is not a row of `before`, or could be several of them.
    """
    kept = torch.zeros(before[0].shape[:2], dtype=torch.bool, device=before[0].device)
    unchanged = before[0].shape == after[0].shape
    if unchanged and bool(_equal_bits(before[0], after[0]).all() & _equal_bits(before[1], after[1]).all()):
        return ~kept
    for head, (keys, values) in enumerate(zip(*after, strict=True)):
        ordered, order = row_hashes(before[0][head], before[1][head]).sort()
        wanted = row_hashes(keys, values)
        at = torch.searchsorted(ordered, wanted).clamp(max=ordered.numel() - 1)
        index = order[at]
        same = (
            (ordered[at] == wanted)
            & _equal_bits(before[0][head][index], keys)
            & _equal_bits(before[1][head][index], values)
        )
        twins = torch.searchsorted(ordered, wanted, right=True) - at > 1
        if not bool(same.all()) or bool(twins.any()) or index.unique().numel() != index.numel():
            raise ConfigError(
                f"method {name} changes cache entries (or two are equal), so it is no choice of entries; "
                "run it as a native press: from_press(press, route='native')"
            )
        kept[head, index] = True
    return kept


def _equal_bits(a: Tensor, b: Tensor) -> Tensor:
    kind = _INTEGER[a.element_size()]
    return (a.contiguous().view(kind) == b.contiguous().view(kind)).all(-1)
