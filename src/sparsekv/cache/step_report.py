"""How much of what a cache stores its last step attended to, whatever kind of cache it is."""

from __future__ import annotations

from sparsekv.cache import steps
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache


def attended_fractions(cache: SparseCache) -> list[float]:
    """Per row: entries that the last forward attended to over those stored, in both tiers where there are two.

    Of a method that chooses at every step what to read, the mean over the rows stands for each of them.
    """
    if isinstance(cache, TieredCache):
        return cache.attended_fractions()
    return [steps.attended_fraction(cache)] * cache.batch
