"""A two-tier cache as a session on disk: both tiers, layer by layer, to go on in another process.

Shape letters: B rows, H kv heads, S = B * H segments, N residents, P passive entries, D head size, T columns seen.

    layer-003    keys, values [N, D] as they lie in the buffer, columns, counts [S]; share [S];
                 passive.keys, passive.values [P, D], passive.columns [P], passive.counts [B, H]
                 (a layer with the model's own window: window.keys, window.values)
    state        real [B, T], ids [B, T], where there are any

A session holds everything, so it can be opened any number of times. What a policy was to evict while decoding is not
part of it: give the opened cache to `compress` again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv import architecture
from sparsekv.cache.exchange import with_room
from sparsekv.cache.segments import Segments
from sparsekv.cache.session_files import read_part, write_session
from sparsekv.cache.tiered_layer import TieredLayer
from sparsekv.cache.unfinished import check_finished
from sparsekv.cache.window import WindowLayer
from sparsekv.errors import ConfigError

if TYPE_CHECKING:
    from sparsekv.cache.tiered import TieredCache


def model_of(config: Any, fingerprint: str, dtype: str | None) -> dict[str, Any]:
    """Whose entries a session holds: the first field that differs is named where another model asks for it."""
    return {
        "model_type": architecture.text_config(config).model_type,
        "num_hidden_layers": architecture.num_layers(config),
        "num_key_value_heads": architecture.num_kv_heads(config),
        "head_dim": architecture.head_dim(config),
        "dtype": dtype,
        "weights": fingerprint,
    }


def save_session(cache: TieredCache, folder: str | Path) -> None:
    """Write a cache; see `TieredCache.save`."""
    if cache.fingerprint is None:
        raise ConfigError(
            "the cache doesn't know its model, so the session would fit any: make it with the model itself, "
            "TieredCache(model, …), or let compress(model, …, cache=cache) read the context"
        )
    check_finished(cache)
    if not cache.batch:
        raise ConfigError("the cache is empty: there is no session to save yet")
    tiers = cache.tiers
    header = {
        "model": model_of(cache.config, cache.fingerprint, cache.model_dtype),
        "settings": {
            "active": tiers.active.written(),
            "recall_tokens": tiers.recall_tokens,
            "page_size": tiers.page_size,
            "n_sink": tiers.n_sink,
            "n_recent": tiers.n_recent,
        },
        "seen": cache.seen,
        "rows": cache.batch,
        "seeds": None if cache.seeds is None else list(cache.seeds),
        "layers": [_numbers(layer) for layer in cache.layers],
    }
    write_session(folder, header, _parts(cache))


def _numbers(layer: Any) -> dict[str, int]:
    if isinstance(layer, TieredLayer):
        return {"tail": layer.store.tail, "seen": layer.store.seen}
    return {"cumulative_length": int(layer.cumulative_length)}


def _parts(cache: TieredCache) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            yield f"layer-{index:03d}", _tensors(cache, index, layer)
        elif isinstance(layer, WindowLayer):
            keys, values = layer.held()
            yield f"layer-{index:03d}", {"window.keys": keys, "window.values": values}
    extra = {"real": cache.real, "ids": cache.ids}
    yield "state", {name: tensor for name, tensor in extra.items() if tensor is not None}


def _tensors(cache: TieredCache, index: int, layer: TieredLayer) -> dict[str, Tensor]:
    store = with_room(layer.store, layer.store.tail)
    passive = cache.tiers.store.all_entries(index, layer.batch, layer.n_kv_heads)
    found = {
        "keys": store.keys,
        "values": store.values,
        "columns": store.columns,
        "counts": torch.tensor(store.counts),
        "passive.columns": passive.columns,
        "passive.counts": passive.counts,
    }
    if len(passive.columns):
        found |= {"passive.keys": passive.keys, "passive.values": passive.values}
    return found if layer.share is None else found | {"share": layer.share}


def check_model(folder: str | Path, header: dict[str, Any], cache: TieredCache) -> None:
    """Raise a ConfigError if a session was saved with another model than that of the `cache` to be filled."""
    if cache.fingerprint is None:
        raise ConfigError("a session is opened with the model itself, not with its config")
    theirs: dict[str, Any] = header["model"]
    for name, value in model_of(cache.config, cache.fingerprint, cache.model_dtype).items():
        if theirs.get(name) != value:
            raise ConfigError(
                f"session '{folder}' is of another model: its {name} is {theirs.get(name)!r}, this one has {value!r}"
            )


def fill(cache: TieredCache, folder: str | Path, header: dict[str, Any], device: torch.device) -> None:
    """Put a session's entries into an empty cache.

    Raises ConfigError for damaged files.
    """
    state = read_part(folder, header, "state")
    cache.real, cache.ids = (state[name].to(device) if name in state else None for name in ("real", "ids"))
    cache.seeds = None if header["seeds"] is None else tuple(header["seeds"])
    for index, (layer, numbers) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        tensors = read_part(folder, header, f"layer-{index:03d}")
        if isinstance(layer, TieredLayer):
            _fill_layer(cache, index, layer, numbers, header["rows"], tensors, device)
        elif isinstance(layer, WindowLayer):
            keys, values = (tensors[f"window.{name}"].to(device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layer.cumulative_length = numbers["cumulative_length"]


def _fill_layer(
    cache: TieredCache,
    index: int,
    layer: TieredLayer,
    numbers: dict[str, int],
    rows: int,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> None:
    keys, values = tensors["keys"].to(device), tensors["values"].to(device)
    counts = tuple(tensors["counts"].tolist())
    heads = len(counts) // rows
    layer.lazy_initialization(keys[None, None].expand(rows, heads, -1, -1), values)
    store = Segments(
        keys=keys,
        values=values,
        columns=tensors["columns"].to(device),
        counts=counts,
        tail=numbers["tail"],
        room=numbers["tail"],
        seen=numbers["seen"],
        batch=rows,
        n_kv_heads=heads,
    )
    layer.replace_store(store)
    layer.share = tensors.get("share")
    if "passive.keys" in tensors:
        cache.tiers.store.put_layer(
            index,
            tensors["passive.counts"],
            tensors["passive.columns"],
            tensors["passive.keys"].to(device),
            tensors["passive.values"].to(device),
        )
