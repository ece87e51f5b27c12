"""relevance.safetensors: the predictors of one model, and for which model they are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.relevance import RELEVANCE_FILE
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    attach_relevance,
    config_of,
    has_relevance,
    relevance_modules,
)


def save_relevance(model: Any, folder: str | Path) -> Path:
    """Write `folder/relevance.safetensors` (to a temporary name, then renamed) and return its path.

    The metadata say the predictors' config and the shape of the model they belong to.
    """
    from safetensors.torch import save_file

    tensors = {
        f"layers.{index}.{name}": value.detach().cpu().contiguous()
        for index, module in relevance_modules(model).items()
        for name, value in getattr(module, NAME).state_dict().items()
    }
    metadata = {"format": "pt", "relevance": json.dumps(config_of(model)), "model": json.dumps(_shape(model))}
    target = Path(folder) / RELEVANCE_FILE
    temporary = target.with_name(target.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(target)
    return target


def load_relevance(model: Any, folder: str | Path) -> Any:
    """Attach the predictors of `folder/relevance.safetensors` (or of that very file) and return the model.

    Predictors of the same shape that are there already are filled in place, so that an optimizer keeps them.

    Raises
    ------
    ConfigError
        A missing or corrupt file, or predictors of a model of another shape.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    path = path / RELEVANCE_FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"relevance file '{path}' cannot be read: {error}") from error
    if "relevance" not in metadata or "model" not in metadata:
        raise ConfigError(f"relevance file '{path}' does not say its model; it was not written by sparsekv")
    theirs, ours = json.loads(metadata["model"]), _shape(model)
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"relevance file '{path}' is for another model: {key} {theirs.get(key)!r}, this one has {value!r}"
            )
    config = RelevanceConfig(**json.loads(metadata["relevance"]))
    if not has_relevance(model) or config_of(model) != asdict(config):
        attach_relevance(model, config)
    for index, module in relevance_modules(model).items():
        prefix = f"layers.{index}."
        state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            getattr(module, NAME).load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(f"relevance file '{path}' does not fit layer {index}: {error}") from error
    return model


def _shape(model: Any) -> dict[str, Any]:
    config = architecture.text_config(model)
    return {
        "model_type": config.model_type,
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": architecture.num_layers(model),
        "num_key_value_heads": architecture.num_kv_heads(model),
        "compressible_layers": architecture.compressible_layers(model),
    }
