"""A KV cache in two tiers: a small active one, and a larger passive one for what a policy takes out.

Shape letters: B rows, L layers, H kv heads, T columns seen.

    compress ─ a policy ─> active  ── the weakest leave ──>  passive
               (fast, within its size) <── the best pages ──  (CPU memory, or files)

Nothing is lost: an entry is in one of the two tiers until the tokens are cropped. `docs/tiers.md` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekv import architecture
from sparsekv.cache.active import ActiveSize
from sparsekv.cache.decode import DecodeEviction
from sparsekv.cache.fingerprint import weights_fingerprint
from sparsekv.cache.pages import PAGE_SIZE
from sparsekv.cache.recall import TieredReader
from sparsekv.cache.session import check_model, fill, save_session
from sparsekv.cache.session_files import read_header
from sparsekv.cache.sparse import ATTENTION, SparseCache
from sparsekv.cache.tiered_copies import copied
from sparsekv.cache.tiered_layer import NO_ROTATION, TieredLayer
from sparsekv.cache.tiers import Tiers, open_store
from sparsekv.cache.unfinished import check_finished
from sparsekv.errors import ConfigError
from sparsekv.selection import Selection, StepSelection, stack


class TieredCache(SparseCache):
    """A `SparseCache` whose evicted entries go to a second tier and come back when they are needed.

    Parameters
    ----------
    model : a model, or its config
        With the model itself (or once `compress` was given it) a saved session says which weights it belongs to.
    active : int >= 1, or str
        Size of the active tier: entries per kv head (a mean over the layers and heads of a row, which may differ), or
        bytes for all rows together, like "64MiB". While tokens are generated it is never passed by more than one
        step's tokens; while `compress` reads, by what the policy has not decided about.
    passive : "cpu" or "disk:<folder>"
        Where the passive tier lies: in CPU memory, or in memory-mapped files of a folder of its own.
    recall_tokens : int >= 0, optional
        None: recalled entries become resident and as many of the weakest residents leave, so the active size holds.
        N: a forward attends to up to N passive entries per kv head beside the residents; those that are recalled often
        move in for weaker ones. Where N is the whole passive tier, logits are those of the full cache.
    page_size : int >= 1
        Passive entries that are summarised, and looked at, together.
    n_sink, n_recent : int >= 0
        First and newest tokens, which stay resident as long as the active size has room for them.

    Notes
    -----
    Needs `prepare(model)` (`compress` does it). Keys keep the RoPE they were cached with, so a recalled entry may lie
    anywhere; methods that re-rotate keys are refused. Works in plain `generate` (greedy, sampling, beams) and over
    several turns.

    Raises
    ------
    ConfigError
        For a size or place that is not allowed, or a passive folder that can't be used.
    """

    def __init__(
        self,
        model: Any,
        active: int | str,
        passive: str = "cpu",
        *,
        recall_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        n_sink: int = 4,
        n_recent: int = 16,
    ) -> None:
        for name, value in (("recall_tokens", recall_tokens), ("n_sink", n_sink), ("n_recent", n_recent)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} must be a whole number >= 0, got {value!r}")
        if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
            raise ConfigError(f"page_size must be a whole number >= 1, got {page_size!r}")
        config = architecture.text_config(model)
        size = ActiveSize.parse(active)
        self.fingerprint: str | None = None
        self.model_dtype: str | None = None
        self.passive = passive
        self.tiers = Tiers(
            active=size,
            store=open_store(passive, page_size),
            n_layers=len(architecture.compressible_layers(config)),
            recall_tokens=recall_tokens,
            page_size=page_size,
            n_sink=n_sink,
            n_recent=n_recent,
        )
        try:
            super().__init__(config)
            for index in self.compressible:
                self.layers[index] = self.fresh_layer(index)
            if hasattr(architecture.unwrap(model), "named_parameters"):
                self.belong_to(model)
        except BaseException:
            self.tiers.store.close()
            raise

    def fresh_layer(self, index: int) -> TieredLayer:
        """An empty layer that shares the tiers of this cache."""
        layer = TieredLayer(index, self.tiers)
        layer.recall = TieredReader(self.tiers, index)
        return layer

    def tiered_layers(self) -> list[tuple[int, TieredLayer]]:
        """(layer index, layer) of every compressible layer."""
        return [(i, layer) for i, layer in self.sparse_layers() if isinstance(layer, TieredLayer)]

    # `SparseCache` and `compress` assign these; the layers must know the first two, and nothing may be rotated.
    @property
    def real(self) -> Tensor | None:
        """BoolTensor [B, T seen] of the columns that are no padding; None: no padding."""
        return self.tiers.real

    @real.setter
    def real(self, value: Tensor | None) -> None:
        self.tiers.real = value

    @property
    def decode(self) -> DecodeEviction | None:
        """The policy that evicts while tokens are generated."""
        return self.tiers.decode

    @decode.setter
    def decode(self, value: DecodeEviction | None) -> None:
        self.tiers.decode = value

    @property
    def rotary(self) -> Tensor | None:
        """None: keys in two tiers are never re-rotated."""
        return None

    @rotary.setter
    def rotary(self, value: Tensor | None) -> None:
        if value is not None:
            raise ConfigError(NO_ROTATION)

    def belong_to(self, model: Any) -> None:
        """Remember whose entries these are; refuse another model's.

        Raises
        ------
        ConfigError
            If the cache holds entries of a model with other weights, or of another dtype.
        """
        plain = architecture.unwrap(model)
        found, dtype = weights_fingerprint(plain), str(plain.dtype).removeprefix("torch.")
        if self.model_dtype not in (None, dtype) and self.seen:
            raise ConfigError(
                f"this cache holds entries of a model in {self.model_dtype}, it was given one in {dtype}"
            )
        if self.fingerprint is not None and self.fingerprint != found and self.seen:
            raise ConfigError(
                f"this cache holds entries of a model with weights {self.fingerprint}, it was given one with {found}"
            )
        self.fingerprint, self.model_dtype = found, dtype

    # ---- sizes --------------------------------------------------------------------------------------------------

    @property
    def active_nbytes(self) -> int:
        """Bytes allocated by the active tier and the model's own windows, metadata included."""
        return super().nbytes

    @property
    def passive_nbytes(self) -> int:
        """Bytes of the passive tier, page summaries and counts of recalls included, wherever they lie."""
        counts = [layer.recalls for _, layer in self.tiered_layers() if layer.recalls is not None]
        return self.tiers.store.nbytes + sum(each.nbytes for each in counts)

    @property
    def nbytes(self) -> int:
        """Bytes of both tiers."""
        return self.active_nbytes + self.passive_nbytes

    def passive_counts(self) -> Tensor:
        """IntTensor [compressible layers, B, H]: entries in the passive tier."""
        heads = architecture.num_kv_heads(self.config)
        counts = [self.tiers.counts(i, self.batch, heads) for i in self.compressible]
        return torch.stack(counts).view(len(counts), self.batch, heads)

    def passive_columns(self) -> Tensor:
        """BoolTensor [B, L, H, T seen]: what is in the passive tier now."""
        heads = architecture.num_kv_heads(self.config)
        held = torch.zeros(self.batch, len(self.layers), heads, self.seen, dtype=torch.bool)
        for index in self.compressible:
            for row in range(self.batch):
                for head in range(heads):
                    columns = self.tiers.store.columns(index, row, head)
                    held[row, index, head, columns.long()] = True
        return held

    def last_step(self) -> tuple[StepSelection, Tensor]:
        """What the last forward attended to, and what it could have: BoolTensors [B, L, H, T seen] by column."""
        resident, passive = self.kept_columns(), self.passive_columns()
        attended = resident.clone()
        heads = architecture.num_kv_heads(self.config)
        for index, layer in self.tiered_layers():
            if layer.attended_passive is not None:
                segment, column = torch.from_numpy(layer.attended_passive)
                attended[segment // heads, index, segment % heads, column] = True
        return StepSelection(attended), resident | passive

    @property
    def attended_fraction(self) -> float:
        """Entries that the last forward attended to over those of both tiers."""
        selection, stored = self._compressible_last_step()
        return selection.attended_fraction(stored)

    def attended_fractions(self) -> list[float]:
        """The same of each row."""
        selection, stored = self._compressible_last_step()
        return selection.attended_fractions(stored)

    def _compressible_last_step(self) -> tuple[StepSelection, Tensor]:
        selection, stored = self.last_step()
        return StepSelection(selection.attended[:, self.compressible]), stored[:, self.compressible]

    # ---- reading a context --------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, model: Any, *, decides: bool) -> Iterator[None]:
        """While a policy decides, the cache may hold more than the active size; then the rest leaves.

        Each head's share of the active size is then what the policy left there, so unequal heads stay unequal.

        Raises
        ------
        ConfigError
            If the rows have active sizes of their own (`join`): these would be lost.
        """
        if self._rows_differ():
            raise ConfigError(
                "this cache joins rows whose active sizes differ, so it can't be compressed again; do so before"
            )
        self.belong_to(model)
        self.tiers.held = decides
        try:
            yield
        finally:
            self.tiers.held = False
        self._settle()

    def _rows_differ(self) -> bool:
        """Whether rows have active sizes of their own: a row's share is not 1 on average."""
        shares = [layer.share for _, layer in self.tiered_layers() if layer.share is not None]
        if not shares:
            return False
        by_row = torch.stack(shares).double().view(len(shares), self.batch, -1).mean(dim=(0, 2))
        return bool(((by_row - 1).abs() > 1e-6).any())

    def _settle(self) -> None:
        layers = self.tiered_layers()
        if not self.batch:
            return
        for _, layer in layers:
            layer.share = None
        active = layers[0][1].quotas()[0]
        counts = self.stored_counts().double()  # [L, B, H]
        room = active - counts.mean(dim=(0, 2), keepdim=True)
        shares = torch.where(room >= 0, counts + room, counts * active / (active - room)) / active
        for (_, layer), share in zip(layers, shares, strict=True):
            layer.share = share.flatten()
            layer.cut(self.tiers.n_sink)

    def check_attention(self, attention: str | None = None) -> None:
        """Raise a ConfigError for any attention but ours: no other knows of the passive tier."""
        attention = self.config._attn_implementation if attention is None else attention
        if attention != ATTENTION:
            raise ConfigError(
                f"a TieredCache can't be read by attention {attention!r}, which knows of no "
                "second tier; call sparsekv.prepare(model) first"
            )

    # ---- rows and time ------------------------------------------------------------------------------------------

    def fork(self, selections: Sequence[Selection]) -> TieredCache:
        """Copies of a one-row cache, one row per selection; each row's evicted entries lie in its own passive tier.

        The passive tier of the copies is in CPU memory. No policy evicts from them while decoding.
        """
        check_finished(self)
        if self.batch != 1:
            raise ConfigError(f"fork needs a cache of one row, this one has {self.batch}")
        joint = self._fitting(stack(list(selections)))
        twin = copied(self)
        twin.batch_repeat_interleave(len(selections))
        twin.apply(joint)
        return twin

    def _take(self, rows: Tensor) -> None:
        super()._take(rows)
        self.tiers.store.reorder(rows)

    def snapshot(self) -> Any:
        """The present state of both tiers, to `restore` later."""
        return super().snapshot(), self.tiers.store.snapshot()

    def restore(self, snapshot: Any) -> None:
        """Back to a snapshot of this cache; a snapshot can be restored any number of times."""
        inner, stored = snapshot
        super().restore(inner)
        self.tiers.store.restore(stored)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tiers.store.crop(0)

    def close(self) -> None:
        """Give the passive tier back: its memory, or the files of its folder and the lock on it."""
        self.reset()
        self.tiers.store.close()

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- sessions -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write both tiers to a folder of its own, for `load` in this process or another.

        Safetensors files and a manifest with checksums; a session that the folder held is replaced at the end, as one.

        Raises
        ------
        ConfigError
            If the cache is empty or does not know its model, or the folder can't be written or holds other files.
        """
        save_session(self, folder)
        self.tiers.store.pack()  # go on as the opened session will
        for _, layer in self.tiered_layers():
            layer.asked_at, layer.recalls = 0, None

    @classmethod
    def load(cls, folder: str | Path, model: Any, *, passive: str = "cpu") -> TieredCache:
        """Open what `save` wrote, on the model's device; the session on disk stays as it is.

        `passive` says where the passive tier lies from now on. A policy that evicts while decoding is not part of a
        session: give the cache to `compress` again.

        Raises
        ------
        ConfigError
            For files that are missing, cut or changed, and for another model than the one that the session is of.
        """
        header = read_header(folder)
        cache = cls(model, passive=passive, **header["settings"])
        try:
            check_model(folder, header, cache)
            fill(cache, folder, header, architecture.unwrap(model).device)
        except BaseException:
            cache.close()
            raise
        return cache
