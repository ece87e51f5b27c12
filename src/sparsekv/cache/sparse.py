"""A transformers cache whose evicted entries are really gone.

Shape letters: B rows, L layers, H kv heads, T columns seen.

`get_seq_length()` is tokens seen, so `generate(input_ids=context + question, past_key_values=cache)` feeds exactly the
new tokens at the right positions. Layers with a sliding window keep the model's own window (a `WindowLayer`); only
full-attention layers are compressible. Eviction while decoding is driven by `sparsekv.attention`, with the
`DecodeEviction` kept here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from sparsekv import architecture
from sparsekv.cache.decode import DecodeEviction
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.rope import Rotation
from sparsekv.cache.unfinished import Unfinished, can_crop, check_finished
from sparsekv.cache.window import WindowLayer
from sparsekv.errors import ConfigError
from sparsekv.selection import Selection, stack

ATTENTION = "sparsekv"
"""Name of the registered attention function (see `sparsekv.attention.prepare`)."""

STOCK = "stock"
"""The attention of a model that was not prepared, whichever it is. Only a prepared model announces its forwards."""


class SparseCache(Cache):
    """KV cache with tokens seen != slots stored, per layer, row and kv head.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's config: says which layers have a sliding window of their own.

    Notes
    -----
    Works in plain `generate`: greedy, sampling, beam search, several sequences, several turns. Uniform unpadded counts
    also work under the stock "sdpa" attention; ragged counts and padding need `prepare(model)`, and say so.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = architecture.text_config(config)
        self.compressible = architecture.compressible_layers(self.config)
        window = architecture.sliding_window(self.config)
        layers: list[CacheLayerMixin] = []
        for index in range(architecture.num_layers(self.config)):
            if index in self.compressible:
                layers.append(SparseLayer())
            elif window is None:
                raise ConfigError(
                    f"layer {index} has a sliding window, but the config names no sliding_window"
                )
            else:
                layers.append(WindowLayer(window))
        super().__init__(layers=layers)
        self.real: Tensor | None = None  # bool [B, T seen]; None: no padding
        self.ids: Tensor | None = None  # token ids [B, T seen], where a policy needs them
        self.rotary: Tensor | None = None  # inverse frequencies, if keys are re-rotated after eviction
        self.decode: DecodeEviction | None = None
        self.tokenizer: Any = None
        self.seeds: tuple[int, ...] | None = None
        self.unfinished: Unfinished | None = None  # the forward that is running, or that broke off

    # ---- what is stored -----------------------------------------------------------------------------------------

    def sparse_layers(self) -> list[tuple[int, SparseLayer]]:
        """(layer index, layer) of every compressible layer."""
        return [(i, self.layers[i]) for i in self.compressible]

    @property
    def seen(self) -> int:
        """Columns (tokens, padding included) that the cache has seen."""
        return super().get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen. `generate` asks before it cuts off what the cache has seen.

        Raises
        ------
        ConfigError
            If an earlier forward broke off: its tokens are in some layers, and would not be given again.
        """
        seen = super().get_seq_length(layer_idx)
        if self.unfinished is None or seen != self.unfinished.seen:
            check_finished(self)
        return seen

    @property
    def batch(self) -> int:
        """Rows B (0 before the first forward)."""
        # asked for at every update
        return self.layers[self.compressible[0]].batch if self.compressible else 0

    @property
    def intact(self) -> bool:
        """Nothing was ever evicted."""
        return all(layer.intact for _, layer in self.sparse_layers())

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, metadata included."""
        own = sum(layer.nbytes for _, layer in self.sparse_layers())
        extra = [t for t in (self.real, self.ids) if t is not None]
        return own + self._window_bytes() + sum(t.numel() * t.element_size() for t in extra)

    @property
    def full_nbytes(self) -> int:
        """Bytes that keys and values of every token seen would take (sliding windows at their own size)."""
        total = self._window_bytes()
        for _, layer in self.sparse_layers():
            if layer.batch:
                item, width = layer.store.keys.element_size(), layer.store.keys.shape[-1]
                total += 2 * layer.batch * layer.n_kv_heads * layer.get_seq_length() * width * item
        return total

    def _window_bytes(self) -> int:
        windows = [layer for layer in self.layers if isinstance(layer, WindowLayer) and layer.is_initialized]
        return sum(t.numel() * t.element_size() for layer in windows for t in layer.held())

    def stored_counts(self) -> Tensor:
        """IntTensor [compressible layers, B, H]: entries stored."""
        return torch.stack([layer.stored() for _, layer in self.sparse_layers()])

    def real_seen(self) -> Tensor:
        """LongTensor [B]: tokens seen, padding not counted."""
        if self.real is None:
            return torch.full((self.batch,), self.seen, dtype=torch.int64)
        return self.real_columns().sum(dim=1).cpu()

    @property
    def achieved_compression(self) -> list[float]:
        """Per row: 1 - stored / full entries over real tokens and compressible layers.

        Padding that is still stored is not counted.
        """
        if self.real is None:
            stored = self.stored_counts().double().mean(dim=(0, 2))
        else:
            stored = self.kept_columns()[:, self.compressible].sum(dim=-1).double().mean(dim=(1, 2))
        return (1 - stored / self.real_seen().double()).tolist()

    def kept_columns(self) -> Tensor:
        """BoolTensor [B, L, H, T seen]: what is stored now (layers with their own window: everything)."""
        heads = architecture.num_kv_heads(self.config)
        kept = torch.ones(self.batch, len(self.layers), heads, self.seen, dtype=torch.bool)
        for index, layer in self.sparse_layers():
            kept[:, index] = False
            for segment, columns in enumerate(layer.columns()):
                kept[segment // heads, index, segment % heads, columns.cpu()] = True
        if self.real is not None:
            kept &= self.real_columns().cpu()[:, None, None, :]
        return kept

    def selection(self) -> Selection:
        """What is stored, as a Selection in which everything missing left at the present column."""
        kept = self.kept_columns()
        return Selection.from_kept(kept, pad=~self.real_columns().cpu())

    # ---- taking out -----------------------------------------------------------------------------------------------

    def apply(self, selection: Selection) -> None:
        """Take out what no later query sees; memory is freed. A selection that evicts nothing changes nothing.

        Raises
        ------
        ConfigError
            If the selection covers fewer columns than were seen, or the result needs the "sparsekv" attention.
        """
        selection = self._fitting(selection)
        if not self._removes(selection):
            return
        for index, layer in self.sparse_layers():
            self.keep_in_layer(index, selection.layer(index) > self.seen, layer)
        self.check_attention()

    def keep_in_layer(self, index: int, kept: Tensor, layer: CacheLayerMixin | None = None) -> None:
        """Compact one layer to the columns `kept` [B, H or 1, T seen], and to real tokens: what is compacted is always
        seen, and no mask could hide padding among it.
        """
        if self.real is not None:
            kept = kept & self.real_columns().to(kept.device)[:, None]
        require_sparse(layer or self.layers[index]).keep(kept, self.rotation())

    def fork(self, selections: Sequence[Selection]) -> SparseCache:
        """Compacted copies of a one-row cache, one row per selection, side by side as one batch.

        They are read as this one is (`Reader`), but no policy evicts from them while decoding.
        """
        check_finished(self)
        twin = SparseCache(self.config)
        twin.rotary, twin.tokenizer = self.rotary, self.tokenizer
        rows = len(selections)
        twin.seeds = None if self.seeds is None else self.seeds * rows
        twin.real = None if self.real is None else self.real.expand(rows, -1)
        twin.ids = None if self.ids is None else self.ids.expand(rows, -1)
        joint = self._fitting(stack(list(selections)))
        real = self.real_columns()[:, None]  # as in `keep_in_layer`
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SparseLayer):
                kept = joint.layer(index) > self.seen
                twin.layers[index] = layer.fork(kept & real.to(kept.device), self.rotation())
            elif isinstance(layer, WindowLayer):
                twin.layers[index] = layer.fork(rows)
        twin.check_attention()
        return twin

    def _fitting(self, selection: Selection) -> Selection:
        columns = selection.shape[-1]
        if columns > self.seen:
            raise ConfigError(
                f"the selection covers {columns} columns, the cache has seen {self.seen} tokens"
            )
        return selection.extend(self.seen) if columns < self.seen else selection

    def _removes(self, selection: Selection) -> bool:
        at = torch.cat([selection.layer(i).flatten() for i in self.compressible])
        return bool(((at > 0) & (at <= self.seen)).any()) or not self.intact

    def rotation(self) -> Rotation | None:
        """How to re-rotate kept keys now, or None."""
        return None if self.rotary is None else Rotation(self.rotary, self.rope_positions())

    def rope_positions(self) -> Tensor:
        """LongTensor [B or 1, T seen]: RoPE position of each column."""
        if self.real is None:
            return torch.arange(self.seen)[None]
        return self.real_columns().long().cumsum(dim=1) - 1

    def check_attention(self, attention: str | None = None) -> None:
        """Raise a ConfigError if what is stored can't be read by an attention (default: the config's present one)."""
        attention = self.config._attn_implementation if attention is None else attention
        if attention == ATTENTION:
            return
        if self.decode is not None:
            raise ConfigError(
                f"this cache evicts while decoding, which attention {attention!r} does not do; "
                "call sparsekv.prepare(model) first"
            )
        if any(layer.reader is not None for _, layer in self.sparse_layers()):
            raise ConfigError(
                f"attention {attention!r} would read all that this cache stores, not what its "
                "method chooses at every step; call sparsekv.prepare(model) first"
            )
        if self.intact:
            return
        counts = self.stored_counts()
        if self.real is not None or int(counts.min()) != int(counts.max()):
            raise ConfigError(
                "this cache stores different numbers of entries per row, layer or kv head, which attention "
                f"{attention!r} can't read; call sparsekv.prepare(model) first"
            )

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, H, Q, D] to a layer.

        `generate` repeats its inputs for beams and for several sequences, but not a cache that it is given: when a
        multiple of the rows comes, the cache repeats its own in the same order.
        """
        self.fit_rows(key_states.shape[0])
        if layer_idx == 0 and self.unfinished is None:  # not announced: this model was not prepared
            self.check_attention(STOCK)
            check_finished(self)
        return super().update(key_states, value_states, layer_idx, cache_kwargs)

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        """(width, offset) of a layer's mask. One mask serves all compressible layers, so the fullest decides."""
        if isinstance(self.layers[layer_idx], WindowLayer):
            return super().get_mask_sizes(cache_position, layer_idx)
        return max(layer.get_mask_sizes(cache_position) for _, layer in self.sparse_layers())

    def reading(self, model: Any, *, decides: bool) -> AbstractContextManager[None]:
        """Around the reading of a context by `model`, where a policy `decides` what stays, or none does."""
        return nullcontext()

    # ---- the next forward -----------------------------------------------------------------------------------------

    def fit_rows(self, rows: int) -> None:
        """Repeat each row, as `generate` does with its inputs, if a multiple of the rows held is about to come."""
        held = self.batch
        if not held or rows == held:
            return
        if rows % held:
            raise ConfigError(f"the cache holds {held} rows, the model was given {rows}: not a multiple")
        self.batch_repeat_interleave(rows // held)

    def follow_mask(self, attention_mask: Any, n_new: int) -> None:
        """Learn which of `n_new` coming columns are padding, from the attention mask [B, seen + n_new] of a forward.

        Raises
        ------
        ConfigError
            If the mask contradicts what the cache knows of the columns it has seen, or is missing although rows
            are padded: positions would silently be wrong.
        """
        if attention_mask is None and self.real is not None:
            raise ConfigError(
                "rows of this cache are padded; give the attention_mask [B, tokens seen + new ones]"
            )
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return
        total = self.seen + n_new
        if (covered := attention_mask.shape[1]) != total:
            # generate's prefill_chunk_size starts at the first token again, whatever a cache has seen
            again = (
                "; leave out prefill_chunk_size, with which generate reads all again"
                if covered == n_new
                else ""
            )
            raise ConfigError(
                f"attention_mask covers {covered} columns; the cache has seen {self.seen} and is given {n_new} more"
                f"{again}"
            )
        mask = attention_mask.bool()
        if self.real is None and bool(mask.all()):
            return
        if self.seen and not torch.equal(mask[:, : self.seen], self.real_columns().to(mask.device)):
            raise ConfigError(
                "attention_mask differs from the one that the context was read with; give the whole mask of "
                "context and question"
            )
        self.real = mask

    def real_columns(self) -> Tensor:
        """BoolTensor [B, T seen]: False for padding."""
        if self.real is None:
            return torch.ones(self.batch, self.seen, dtype=torch.bool)
        known = self.real[:, : self.seen]
        return torch.nn.functional.pad(known, (0, self.seen - known.shape[1]), value=True)

    # ---- rows and time --------------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """The present state, to `restore` later: lengths and references, nothing is copied."""
        check_finished(self)
        state = {name: getattr(self, name) for name in ("real", "ids", "rotary", "decode", "seeds")}
        since = dict(self.decode.since) if self.decode else {}
        return [layer.snapshot() for layer in self.layers], state, since

    def restore(self, snapshot: Any) -> None:
        """Back to a snapshot of this cache; a snapshot can be restored any number of times."""
        layers, state, since = snapshot
        for layer, saved in zip(self.layers, layers, strict=True):
            layer.restore(saved)
        for name, value in state.items():
            setattr(self, name, value)
        self.unfinished = None
        if self.decode:
            self.decode.since = dict(since)

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens, down to `max_length` seen (negative: that many fewer).

        Also takes back a forward that broke off.
        """
        if sys._getframe(1).f_code.co_name == "_assisted_decoding":
            raise ConfigError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) does not work with SparseCache: "
                "rejected tokens may have evicted entries; generate without it"
            )
        length = max(0, self.seen + max_length) if max_length < 0 else max_length
        if not can_crop(self, length):
            return
        super().crop(length)
        for name in ("real", "ids"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[:, : self.seen])
        if self.unfinished is not None:
            self.unfinished.undo(self)

    def _take(self, rows: Tensor) -> None:
        for name in ("real", "ids"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows.to(tensor.device)])
        if self.seeds is not None:
            self.seeds = tuple(self.seeds[i] for i in rows.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        rows = torch.arange(self.batch).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._take(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay."""
        rows = torch.arange(self.batch)[torch.as_tensor(indices).cpu()]
        super().batch_select_indices(rows)
        self._take(rows)

    def close(self) -> None:
        """Give everything back: for a cache that is not needed any more."""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WindowLayer):
                self.layers[index] = WindowLayer(layer.sliding_window)
            else:
                layer.reset()
        follows_text = self.decode is not None and self.ids is not None
        self.ids = torch.zeros(0, dtype=torch.int32) if follows_text else None
        self.real = self.seeds = self.unfinished = None
        if self.decode is not None:
            self.decode.reset()


def require_sparse(layer: CacheLayerMixin) -> SparseLayer:
    """The layer, if it is compressible; a ConfigError otherwise."""
    if not isinstance(layer, SparseLayer):
        raise ConfigError("a layer with the model's own sliding window can't be compacted")
    return layer


__all__ = ["ATTENTION", "DecodeEviction", "SparseCache", "WindowLayer", "require_sparse"]
