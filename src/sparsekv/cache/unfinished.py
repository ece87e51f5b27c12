"""A forward that breaks off: some layers have the new tokens and others do not. Noticed, and taken back by `crop`.

Whatever ends it (a passive tier that is full, memory that is not enough, Ctrl-C), the next forward would give wrong
logits without a word. So a cache that a prepared model reads is marked from a forward's beginning to its end, and one
that is still marked when the next begins is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.window import WindowLayer
from sparsekv.errors import ConfigError

if TYPE_CHECKING:
    from sparsekv.cache.sparse import SparseCache


@dataclass(frozen=True)
class Unfinished:
    """What a cache was before a forward, so far as cropping can't tell.

    Parameters
    ----------
    seen : tokens seen
    recent : the layers' `recent_inputs`, or None
    since : tokens since the last eviction, per layer
    """

    seen: int
    recent: list[tuple[Tensor, ...] | None]
    since: dict[int, int]

    @classmethod
    def of(cls, cache: SparseCache) -> Unfinished:
        """Of a cache that a forward is about to read."""
        recent = [layer.recent_inputs if isinstance(layer, SparseLayer) else None for layer in cache.layers]
        return cls(cache.seen, recent, dict(cache.decode.since) if cache.decode else {})

    def undo(self, cache: SparseCache) -> None:
        """Once the layers were cropped: what else the forward had changed."""
        for layer, recent in zip(cache.layers, self.recent, strict=True):
            if isinstance(layer, SparseLayer):
                left = 0 if recent is None else recent[0].shape[1] - (self.seen - layer.get_seq_length())
                layer.recent_inputs = tuple(x[:, :left] for x in recent or ()) if left > 0 else None
        if cache.decode:
            cache.decode.since = dict(self.since)
        cache.unfinished = None


def check_finished(cache: SparseCache) -> None:
    """Raise a ConfigError if the last forward on a cache broke off."""
    seen = [layer.get_seq_length() for layer in cache.layers]
    if cache.unfinished is None and min(seen) == max(seen):
        return
    before = min(seen) if cache.unfinished is None else cache.unfinished.seen
    repair = f"crop({before}) it" if before else "reset() it"
    raise ConfigError(
        f"an earlier forward on this cache broke off, so its layers hold different tokens ({min(seen)} to {max(seen)} "
        f"seen): {repair} or restore a snapshot, then give the tokens again"
    )


def can_crop(cache: SparseCache, length: int) -> bool:
    """Whether cropping to `length` tokens changes anything.

    Raises
    ------
    ConfigError
        If a part of a forward that broke off would stay, or the window of a layer of the model's own has moved on.
    """
    broken = cache.unfinished
    if broken is not None and length > broken.seen:
        raise ConfigError(
            f"a forward broke off after {broken.seen} tokens; crop the cache to at most so many"
        )
    if broken is None and length >= max(layer.get_seq_length() for layer in cache.layers):
        return False
    for layer in cache.layers:
        past = isinstance(layer, WindowLayer) and layer.cumulative_length > length
        if past and layer.cumulative_length >= layer.sliding_window:
            raise ConfigError(
                f"the model's sliding window of {layer.sliding_window} tokens has moved on, so the cache can't "
                "be cropped; use snapshot and restore"
            )
    return True
