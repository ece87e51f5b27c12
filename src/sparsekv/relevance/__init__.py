"""Learned token relevance: a small network per layer that tells which entries will matter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

RELEVANCE_FILE = "relevance.safetensors"
"""Where a folder keeps its predictors."""

_HOME = {
    "ATSKV": "atskv",
    "AttentionStatistics": "attention_statistics",
    "HandcraftedFeatures": "features",
    "extra_features": "features",
    "ThresholdController": "threshold",
    "RelevanceConfig": "predictor",
    "RelevancePredictor": "predictor",
    "Served": "predictor",
    "attach_relevance": "predictor",
    "detach_relevance": "predictor",
    "has_relevance": "predictor",
    "relevance_modules": "predictor",
    "serve_as": "predictor",
    "served_of": "predictor",
    "Relevance": "policy",
    "RelevancePress": "press",
    "load_relevance": "files",
    "save_relevance": "files",
}

__all__ = ["RELEVANCE_FILE", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
