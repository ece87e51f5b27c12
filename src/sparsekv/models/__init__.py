"""Models: load them by name, with or without an adapter, and fetch the embedded one.

Names resolve on first use: importing `sparsekv.models` loads no torch, since `sparsekv --help` must be quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.models.embedded import MODELS, EmbeddedModel, public_id, public_name
    from sparsekv.models.fetch import fetch_model
    from sparsekv.models.load import load_model, load_tokenizer

_HOME = {
    "MODELS": "embedded",
    "EmbeddedModel": "embedded",
    "public_id": "embedded",
    "public_name": "embedded",
    "fetch_model": "fetch",
    "load_model": "load",
    "load_tokenizer": "load",
}

__all__ = [
    "MODELS",
    "EmbeddedModel",
    "fetch_model",
    "load_model",
    "load_tokenizer",
    "public_id",
    "public_name",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
