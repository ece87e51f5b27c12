"""What the layers of one two-tier cache share: the passive store, the sizes, the padding.

Shape letters: B rows, H kv heads, S = B * H segments, T columns seen, N entries, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.active import ActiveSize
from sparsekv.cache.decode import DecodeEviction
from sparsekv.cache.entry_request import Bools, Ints
from sparsekv.cache.exchange import Entries
from sparsekv.cache.memory import MemoryStore
from sparsekv.cache.passive import PassiveStore
from sparsekv.cache.places import padded
from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.base import LayerPolicy

DISK = "disk:"

_SLACK = 16
"""A segment over its quota is cut this far below it (less where it is small): one new buffer per so many tokens."""

LENT = 8
"""Places that a segment may use beyond its quota while its row's other heads leave as many free in the layer.

Otherwise the smallest head of a layer, whose eighth is nothing, would have all of it copied at almost every token.
"""


@dataclass
class Tiers:
    """Settings and state that the layers of a `TieredCache` have in common.

    Parameters
    ----------
    active : ActiveSize
    store : PassiveStore
    n_layers : compressible layers
    recall_tokens : see `TieredCache`
    page_size : entries per page of the store
    n_sink, n_recent : residents that never leave for recalled entries
    real : BoolTensor [B, T], optional
        False for padding.
    held : bool
        While a policy reads a context: the active size isn't enforced, so that the policy chooses among everything.
    decode : DecodeEviction, optional
        The policy that evicts while tokens are generated.
    """

    active: ActiveSize
    store: PassiveStore
    n_layers: int
    recall_tokens: int | None
    page_size: int
    n_sink: int
    n_recent: int
    real: Tensor | None = None
    held: bool = False
    decode: DecodeEviction | None = None

    def real_columns(self, seen: int) -> Bools | None:
        """[B, T seen]: the columns that are no padding, or None if there is none."""
        if self.real is None:
            return None
        known = self.real[:, :seen].cpu().numpy()
        return padded(known, (known.shape[0], seen), True)

    def leaves_it_to_policy(self, layer: int, n_query: int, seen: Ints, quotas: Ints) -> Bools:
        """[B]: rows that the policy is about to bring within their quotas itself, right after this forward's attention.

        `seen` [B] tokens without padding, `quotas` [B] the smallest of a row's kv heads. A policy whose size is its own
        (no budget) may leave more than the quotas, so they hold without it.
        """
        decode = self.decode
        due = decode is not None and decode.since.get(layer, 0) + n_query >= decode.every
        if self.held or decode is None or not due or not decode.budget.given:
            return np.full(len(seen), self.held)
        allowed = np.array([decode.budget.n_kept(max(int(n), 1)) for n in seen])
        return np.asarray(allowed <= quotas)

    def observed(self, n_query: int) -> int:
        """Newest tokens whose entries have to be resident when a policy scores: its observation window.

        `n_query` tokens are being read; a policy that reads a context sees the hidden states of no others.
        """
        if self.held:
            return n_query
        policy = None if self.decode is None else self.decode.policy
        return (policy.window or 0) if isinstance(policy, LayerPolicy) else 0

    def counts(self, layer: int, rows: int, heads: int) -> Tensor:
        """LongTensor [S]: entries of one layer in the passive tier."""
        held = self.store.counts(layer)
        if held.shape != (rows, heads):
            held = torch.nn.functional.pad(held, (0, heads - held.shape[1], 0, rows - held.shape[0]))
        return held.flatten()

    def swap(
        self, layer: int, rows: int, heads: int, leaving: Entries | None, coming: Entries | None = None
    ) -> None:
        """Entries leave for the passive tier, others (read from it before) come back: all, or after an error none.

        Raises
        ------
        ConfigError
            If a key or value is NaN or infinite: no page could bound it, so it would be lost in silence. And whatever
            keeps the store from being written or read.
        """
        put = _request(leaving, rows, heads)
        if put is not None:
            counts, columns, keys, values = put
            if not (all_finite(keys) and all_finite(values)):
                raise ConfigError(
                    f"layer {layer} computed keys or values that are NaN or infinite in {keys.dtype}; nothing was "
                    "moved to the passive tier; load the model in bfloat16 or float32"
                )
            self.store.put_layer(layer, counts, columns, keys, values)
        take = _request(coming, rows, heads)
        if take is not None:
            try:
                self.store.drop_layer(layer, take[0], take[1])
            except BaseException:
                if (
                    put is not None
                ):  # nothing is read: files that are damaged can't keep an entry in both tiers
                    self.store.drop_layer(layer, put[0], put[1])
                raise


def _request(entries: Entries | None, rows: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(counts [B, H], columns, keys, values) as the store wants them; None if there are none."""
    if entries is None or not len(entries):
        return None
    counts = np.bincount(entries.segment, minlength=rows * heads).reshape(rows, heads)
    return torch.from_numpy(counts), torch.from_numpy(entries.columns), entries.keys, entries.values


def all_finite(entries: Tensor) -> bool:
    """Neither NaN nor infinity in entries [N >= 1, D].

    By their extremes, in one pass and without a copy: `torch.isfinite` of them all takes several times as long as the
    put that it is for.
    """
    return bool(torch.isfinite(torch.stack(torch.aminmax(entries))).all())


def slack(quotas: Ints) -> Ints:
    """How far below its quota a full segment is cut, in entries."""
    return np.minimum(_SLACK, quotas // 8)


def open_store(passive: str, page_size: int) -> PassiveStore:
    """An empty store at the place that `passive` names: "cpu" or "disk:<folder>".

    Raises
    ------
    ConfigError
        For another name, or a folder that can't be used or holds entries.
    """
    if passive == "cpu":
        return MemoryStore(page_size)
    if not isinstance(passive, str) or not passive.startswith(DISK) or passive == DISK:
        raise unknown("passive tier", passive, ("cpu", "disk:<folder>"))
    from sparsekv.cache.disk import DiskStore  # files, locks and checksums, only where they are asked for

    store = DiskStore(passive.removeprefix(DISK), page_size=page_size)
    if store.n_entries:
        n_entries = store.n_entries
        store.close(commit=False)
        raise ConfigError(
            f"passive folder '{store.folder}' holds {n_entries} entries of an earlier cache; give a new cache another "
            "folder (a saved session is opened by TieredCache.load)"
        )
    return store
