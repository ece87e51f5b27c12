"""From a model's name to where its files are. Knows names, folders and the Hub's cache; loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError, nearest, unknown
from sparsekv.models.embedded import MODELS, embedded_by_public_id
from sparsekv.models.fetch import fetch_model, print_progress
from sparsekv.relevance import RELEVANCE_FILE

ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Args:
        path: what transformers' `from_pretrained` is given: a local folder or a Hub id.
        adapter: LoRA adapter folder to put on top, or None.
    """

    path: str
    adapter: Path | None = None


def locate_model(name: str, adapter: str | Path | None = None) -> ModelSource:
    """Find a model by its name, fetching the embedded one if it is not there yet.

    Args:
        name: an embedded name ("smollm2"), a local folder of a model or of a LoRA adapter, or a Hub id.
        adapter: folder of a LoRA adapter, not if `name` is one already.

    Raises:
        ConfigError: nothing of that name, with the nearest; a folder without config.json; a Hub model that is
            neither cached nor reachable.
    """
    adapter_folder = None if adapter is None else check_adapter_folder(adapter)
    if name in MODELS:
        folder = fetch_model(name, progress=print_progress, verify_weights=False)
        return ModelSource(str(folder), adapter_folder)

    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return ModelSource(str(folder), adapter_folder)
        if (folder / ADAPTER_CONFIG).is_file():
            if adapter_folder is not None:
                raise ConfigError(
                    f"model {name!r} is a LoRA adapter itself; adapter {str(adapter)!r} cannot be added"
                )
            return _base_of_adapter(check_adapter_folder(folder))
        raise ConfigError(
            f"model folder {name!r} has no config.json and no {ADAPTER_CONFIG}: not a model's folder"
        )
    if folder.exists():
        raise ConfigError(f"model {name!r} is a file; expected a folder with config.json and safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model folder {name!r} does not exist{_hint(folder.name, _siblings(folder))}")
    if not _HUB_ID.fullmatch(name):
        error = unknown("model", name, MODELS.names())
        raise ConfigError(f"{error}, a Hub id (owner/name) or a local folder")
    return ModelSource(locate_on_hub(name), adapter_folder)


def check_adapter_folder(adapter: str | Path) -> Path:
    """The folder of a LoRA adapter, or of relevance predictors alone, if it is one that can be loaded.

    Raises:
        ConfigError: no such folder, nothing of the two in it, no safetensors, or not a LoRA adapter.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"adapter folder {str(adapter)!r} does not exist{_hint(folder.name, _siblings(folder))}"
        )
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / RELEVANCE_FILE).is_file():
        return folder
    kind = _read_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"adapter {str(adapter)!r} is of type {kind!r}; allowed: 'LORA'")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"adapter folder {str(adapter)!r} has no adapter_model.safetensors")
    return folder


def locate_on_hub(name: str) -> str:
    """What to load a Hub model from: its id if the Hub answers, else the folder of its cached copy.

    transformers retries an unreachable Hub for half a minute, `local_files_only` or not: hence one short
    question first, and a plain folder then.

    Raises:
        ConfigError: the Hub has no such model, refuses it, or cannot be reached and there is no copy.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    cause: Exception
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return name
    except GatedRepoError as error:
        reason = "is gated: accept its terms on the Hub and log in first"
        cause = error
    except RepositoryNotFoundError as error:
        hint = _hint(name, _known_hub_ids())
        raise ConfigError(
            f"model {name!r} is not a local folder, and not on the Hub or private{hint}"
        ) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        hint = _hint(name, _known_hub_ids()) + _embedded_hint(name)
        reason = f"is not a local folder, not in the Hub cache, and the Hub cannot be reached{hint}"
        cause = error
    folder = cached_folder(name)
    if folder is None:
        raise ConfigError(f"model {name!r} {reason}") from cause
    return str(folder)


def cached_folder(name: str) -> Path | None:
    """A Hub model's folder in the Hub's local cache; None unless its config and safetensors are there."""
    from huggingface_hub import try_to_load_from_cache

    config, *weights = (
        try_to_load_from_cache(name, file)
        for file in ("config.json", "model.safetensors", "model.safetensors.index.json")
    )
    return (
        Path(config).parent if isinstance(config, str) and any(isinstance(w, str) for w in weights) else None
    )


def _base_of_adapter(adapter: Path) -> ModelSource:
    """The model an adapter was trained on; its embedded form where the public one is not cached."""
    base = _read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"adapter {str(adapter)!r} does not name its base model; give the base as the model's name"
        )
    embedded = embedded_by_public_id(base)
    if embedded is not None and not Path(base).is_dir() and cached_folder(base) is None:
        print_progress(
            f"adapter {adapter}: its base {base} is not cached; using {embedded.name!r} ({embedded.weights})"
        )
        base = embedded.name
    try:
        source = locate_model(base)
    except ConfigError as error:
        raise ConfigError(
            f"base of adapter {str(adapter)!r}: {error}; or name another base, with this adapter on it"
        ) from error
    if source.adapter is not None:
        raise ConfigError(
            f"base of adapter {str(adapter)!r} is an adapter itself: {base!r}; merge that one first"
        )
    return ModelSource(source.path, adapter)


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"adapter folder {str(folder)!r} has no {ADAPTER_CONFIG}") from error
    except ValueError as error:
        raise ConfigError(f"adapter {str(folder)!r}: {ADAPTER_CONFIG} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"adapter {str(folder)!r}: {ADAPTER_CONFIG} is not a JSON object")
    return config


def _known_hub_ids() -> list[str]:
    """Public ids of the embedded models and the models in the Hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [
        folder.name.removeprefix("models--").replace("--", "/")
        for folder in Path(HF_HUB_CACHE).glob("models--*")
    ]
    return [*(MODELS.get(name).public_id for name in MODELS), *sorted(cached)]


def _siblings(folder: Path) -> list[str]:
    """Names of the folders that lie where `folder` would."""
    parent = folder.parent
    return sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []


def _hint(name: str, allowed: Iterable[str]) -> str:
    guess = nearest(name, [other for other in allowed if other != name])
    return f" (did you mean {guess!r}?)" if guess else ""


def _embedded_hint(name: str) -> str:
    embedded = embedded_by_public_id(name)
    return f"; the embedded {embedded.name!r} is this model in 4-bit weights" if embedded else ""
