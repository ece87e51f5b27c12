"""Which k of n: evenly spread, in blocks, or at random. Arithmetic on ranks that several policies share.

Knows nothing of tokens, budgets or models.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def evenly(k: int, n: int) -> Tensor:
    """LongTensor [min(k, n)]: k of the ranks 0..n-1, evenly spread and ascending.

    n is cut into k equal parts and the middle of each is taken: rank floor((2i + 1) n / 2k). Neighbouring
    gaps differ by at most one, and both ends are left alone, because what lies beyond them (sinks, recent
    entries) is kept anyway.
    """
    k = min(k, n)
    if k <= 0:
        return torch.zeros(0, dtype=torch.long)
    return torch.div((2 * torch.arange(k) + 1) * n, 2 * k, rounding_mode="floor")


def blocks_between(start: int, stop: int, block_size: int) -> list[tuple[int, int]]:
    """The blocks [b * block_size, (b + 1) * block_size) that meet [start, stop), cut to it.

    Returns
    -------
    list of (first, end) columns, ascending, without empty ones; the first and the last may be shorter than
    the others.
    """
    if start >= stop:
        return []
    first, last = start // block_size, (stop - 1) // block_size
    grid = ((b * block_size, (b + 1) * block_size) for b in range(first, last + 1))
    return [(max(start, lo), min(stop, hi)) for lo, hi in grid]


def spread_blocks(start: int, stop: int, block_size: int, n_tokens: int) -> Tensor:
    """LongTensor [min(n_tokens, stop - start)]: columns of blocks evenly spread over [start, stop), in order.

    As few whole blocks as hold `n_tokens` columns; the surplus is cut off the end of the last of them, so
    that the count is met exactly.
    """
    blocks = blocks_between(start, stop, block_size)
    n_tokens = min(n_tokens, max(0, stop - start))
    if n_tokens <= 0:
        return torch.zeros(0, dtype=torch.long)
    # The cut blocks at either end are short, so ceil(n_tokens / block_size) blocks may hold too few.
    for n_blocks in range(-(-n_tokens // block_size), len(blocks) + 1):
        columns = _columns([blocks[i] for i in evenly(n_blocks, len(blocks)).tolist()])
        if columns.numel() >= n_tokens:
            return columns[:n_tokens]
    return torch.arange(start, stop)[:n_tokens]


def strided_blocks(start: int, stop: int, block_size: int, stride: int) -> Tensor:
    """LongTensor: columns of [start, stop) in the absolute blocks 0, stride, 2 * stride, ..., ascending.

    Absolute: which blocks stay depends neither on where the middle starts nor on how long the context grows.
    """
    blocks = blocks_between(start, stop, block_size)
    return _columns([(lo, hi) for lo, hi in blocks if (lo // block_size) % stride == 0])


def _columns(blocks: list[tuple[int, int]]) -> Tensor:
    if not blocks:
        return torch.zeros(0, dtype=torch.long)
    return torch.cat([torch.arange(lo, hi) for lo, hi in blocks])


def row_generator(seed: int, row_seed: int) -> torch.Generator:
    """A generator that depends on the policy's and the row's seed only: the same draws in any batching."""
    digest = hashlib.blake2b(f"{seed}/{row_seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def layer_generator(seed: int, layer_idx: int) -> torch.Generator:
    """A generator of a row's seed in one layer: recomputing the layer draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer_idx) % 2**63)


def drawn(shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
    """LongTensor [..., min(k, n)] for `shape` [..., n]: k distinct ranks of n, any set equally likely.

    Independent along the leading dimensions. Not sorted.
    """
    noise = torch.rand(shape, dtype=torch.float64, generator=generator)
    return noise.topk(min(k, shape[-1]), dim=-1).indices
