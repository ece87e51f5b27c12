"""sparsekv: run large language models over long contexts in a fraction of the KV-cache memory.

Names are loaded on first use, so that `import sparsekv` (and `sparsekv --help`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Selection": "selection",
    "StepSelection": "selection",
    "SelectionTrace": "selection",
    "NEVER": "selection",
    "Budget": "policies.budget",
    "AnchorConfig": "policies.anchors",
    "AnchorSelector": "policies.anchors",
    "build_kv_mask_from_anchors": "policies.anchors",
    "SimpleEvictConfig": "policies.simple_evict",
    "build_simple_keep_token_idx": "policies.simple_evict",
    "evict_dynamic_cache_inplace": "cache.inplace",
    "SparseCache": "cache.sparse",
    "TieredCache": "cache.tiered",
    "make_cache": "factory",
    "prepare": "attention",
    "compress": "generation",
    "make_policy": "policies",
    "load_model": "models",
    "fetch_model": "models",
    "AnchorPress": "policies.as_press",
    "FullPress": "policies.as_press",
    "LadderPress": "policies.as_press",
    "PolicyPress": "policies.as_press",
    "RandomPositionsPress": "policies.as_press",
    "SinkRecentPress": "policies.as_press",
    "SlidingWindowPress": "policies.as_press",
    "UniformMiddlePress": "policies.as_press",
    "RelevancePress": "relevance.press",
    "H2OPress": "policies.as_press",
    "AdaptiveBlockDropoutPress": "policies.training_presses",
    "BlockDropoutPress": "policies.training_presses",
    "EvictionAugPress": "policies.training_presses",
    "SentenceDropoutPress": "policies.training_presses",
    "SoftThresholdPress": "policies.training_presses",
    "SparseRegPress": "policies.training_presses",
    "VariableBlockDropoutPress": "policies.training_presses",
    "SparseKVError": "errors",
    "ConfigError": "errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"sparsekv.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'sparsekv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
