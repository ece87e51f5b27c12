"""relevance.safetensors: the predictors of one model, and for which model they are."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsekv import architecture
from sparsekv.errors import ConfigError, one_line
from sparsekv.relevance import RELEVANCE_FILE
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    RelevancePredictor,
    Served,
    attach_relevance,
    config_of,
    has_relevance,
    relevance_modules,
    serve_as,
    served_of,
)


def save_relevance(model: Any, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write `folder/relevance.safetensors` (to a temporary name, then renamed) and return its path.

    The folder and its parents are made. The metadata say the predictors' config, how to serve them and the shape of the
    model they belong to. `state`: the model's whole state dict, where its weights are not all here (FSDP).

    Raises
    ------
    ConfigError
        If the folder can't be made, for example because it is a file.
    """
    from safetensors.torch import save_file

    found = model.state_dict() if state is None else state
    names = {module: name for name, module in model.named_modules()}
    tensors = {
        f"layers.{index}.{name}": found[f"{names[module]}.{NAME}.{name}"].detach().cpu().contiguous()
        for index, module in relevance_modules(model).items()
        for name, _ in getattr(module, NAME).named_parameters()
    }
    metadata = {
        "format": "pt",
        "relevance": json.dumps(config_of(model)),
        "served": json.dumps(asdict(served_of(model))),
        "model": json.dumps(_shape(model)),
        "probe": json.dumps(_probe(model, state)),
    }
    target = Path(folder) / RELEVANCE_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"folder '{folder}' cannot be made: {error.strerror}") from error
    temporary = target.with_name(target.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(target)
    return target


def load_relevance(model: Any, folder: str | Path) -> Any:
    """Attach the predictors of `folder/relevance.safetensors` (or of that very file) and return the model.

    Predictors of the same shape that are there already are filled in place, so that an optimizer keeps them. A file
    that does not say how to serve them (an older one) gets the defaults of `Served`.

    Raises
    ------
    ConfigError
        A missing or corrupt file, or predictors of another model, by its shape and a sample of its embeddings (those of
        a fine-tuned one hardly differ); the model is left as it was.
    """
    path = Path(folder)
    path = path / RELEVANCE_FILE if path.is_dir() else path
    config, served, theirs, probe, tensors = _read(path)
    for key, value in _shape(model).items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"relevance file '{path}' is for another model: {key} {theirs.get(key)!r}, this one has {value!r}"
            )
    _check_probe(path, probe, _probe(model, None))
    _check_tensors(path, model, config, tensors)
    if not has_relevance(model) or config_of(model) != asdict(config):
        attach_relevance(model, config)
    for index, module in relevance_modules(model).items():
        prefix = f"layers.{index}."
        state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        getattr(module, NAME).load_state_dict(state)
    return serve_as(model, served)


def _read(
    path: Path,
) -> tuple[RelevanceConfig, Served, dict[str, Any], list[float], dict[str, torch.Tensor]]:
    """(shape of the predictors, how to serve them, their model's shape and `_probe`, tensors by name) of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"relevance file '{path}' cannot be read: {one_line(error)}") from error
    if "relevance" not in metadata or "model" not in metadata:
        raise ConfigError(f"relevance file '{path}' does not say its model; it was not written by sparsekv")
    try:
        config = RelevanceConfig(**json.loads(metadata["relevance"]))
        served = Served(**json.loads(metadata.get("served", "{}")))
        model = dict(json.loads(metadata["model"]))
        probe = [float(value) for value in json.loads(metadata.get("probe", "[]"))]
    except (ValueError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"relevance file '{path}': its metadata cannot be read: {one_line(error)}"
        ) from error
    return config, served, model, probe, tensors


def _check_tensors(path: Path, model: Any, config: RelevanceConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless a file has the tensors of every predictor of the model, in their shapes, and no others."""
    size, heads = int(architecture.text_config(model).hidden_size), architecture.num_kv_heads(model)
    with torch.device("meta"):
        one = RelevancePredictor(size, heads, config).state_dict()
    wanted = {
        f"layers.{index}.{name}": tuple(value.shape)
        for index in architecture.compressible_layers(model)
        for name, value in one.items()
    }
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if name not in wanted:
            problem = f"has {name}, which no layer of the model takes"
        elif found is None:
            problem = f"does not fit layer {name.split('.')[1]}: {name} is missing"
        elif found != wanted[name]:
            problem = f"does not fit layer {name.split('.')[1]}: {name} is {found}, not {wanted[name]}"
        else:
            continue
        raise ConfigError(f"relevance file '{path}' {problem}")


def _shape(model: Any) -> dict[str, Any]:
    config = architecture.text_config(model)
    return {
        "model_type": config.model_type,
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": architecture.num_layers(model),
        "num_key_value_heads": architecture.num_kv_heads(model),
        "compressible_layers": architecture.compressible_layers(model),
    }


def _probe(model: Any, state: Mapping[str, torch.Tensor] | None) -> list[float]:
    """Some numbers of the first tokens' embeddings, which no adapter changes and a fine-tuned model nearly keeps.

    Empty where they aren't here: of a model whose weights are spread over processes, and `state` has them not.
    """
    plain = architecture.unwrap(model)
    embedding = plain.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)
    weight = embedding.weight
    if state is not None:
        names = [name for name, parameter in model.named_parameters() if parameter is weight]
        weight = next((state[name] for name in names if name in state), torch.empty(0))
    flat = weight.detach()[:_ROWS].flatten()
    if flat.is_meta or not flat.numel():
        return []
    places = torch.linspace(0, flat.numel() - 1, _PROBED, dtype=torch.float64).long().to(flat.device)
    return [round(value, 6) for value in flat[places].float().tolist()]


def _check_probe(path: Path, theirs: list[float], ours: list[float]) -> None:
    """Raise unless two probes are alike; an older file has none."""
    if not theirs or not ours:
        return
    a, b = torch.tensor(theirs), torch.tensor(ours)
    if a.shape != b.shape or not float((a - b).norm()) <= _ALIKE * float(a.norm()):  # also where they are NaN
        raise ConfigError(
            f"relevance file '{path}' is for another model: of the same shape, but with other token embeddings"
        )


_ROWS, _PROBED = 256, 64  # the first rows: tokens are added at the end
_ALIKE = 0.1
"""Of probes, relative: 16-bit rounding is under 0.01, another model's is about 1.4."""
