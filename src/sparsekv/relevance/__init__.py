"""Learned token relevance: a small network per layer that tells which entries will matter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "RelevanceConfig": "predictor",
    "RelevancePredictor": "predictor",
    "attach_relevance": "predictor",
    "detach_relevance": "predictor",
    "has_relevance": "predictor",
    "relevance_modules": "predictor",
    "RELEVANCE_FILE": "files",
    "load_relevance": "files",
    "save_relevance": "files",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
