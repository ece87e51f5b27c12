"""Models: load them, fetch the embedded one, and say which of their layers can be compressed.

Names resolve on first use: importing `sparsekv.models` loads no torch, since `sparsekv --help` must be quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.models.embedded import MODELS, EmbeddedModel, public_id
    from sparsekv.models.fetch import fetch_model
    from sparsekv.models.load import load_model, load_tokenizer
    from sparsekv.models.support import (
        attention_modules,
        check_supported,
        compressible_layers,
        decoder_layers,
        head_dim,
        max_context,
        num_kv_heads,
    )

_HOME = {
    "MODELS": "embedded",
    "EmbeddedModel": "embedded",
    "public_id": "embedded",
    "fetch_model": "fetch",
    "load_model": "load",
    "load_tokenizer": "load",
    "attention_modules": "support",
    "check_supported": "support",
    "compressible_layers": "support",
    "decoder_layers": "support",
    "head_dim": "support",
    "max_context": "support",
    "num_kv_heads": "support",
}

__all__ = [
    "MODELS",
    "EmbeddedModel",
    "attention_modules",
    "check_supported",
    "compressible_layers",
    "decoder_layers",
    "fetch_model",
    "head_dim",
    "load_model",
    "load_tokenizer",
    "max_context",
    "num_kv_heads",
    "public_id",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
