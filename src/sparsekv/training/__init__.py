"""Train a model while KV entries are missing: data, objectives, curricula, the trainer.

Names are loaded on first use, so that a config can be checked without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "SparseKVTrainer": "training.trainer",
    "EITConfig": "training.eit",
    "TrainConfig": "training.config",
    "LinearCurriculum": "training.curricula",
    "StepCurriculum": "training.curricula",
    "SpreadCurriculum": "training.curricula",
    "CosineCurriculum": "training.curricula",
    "FixedCurriculum": "training.curricula",
    "AdaptiveCurriculum": "training.curricula",
    "StandardLMObjective": "training.objectives",
    "SparseLMObjective": "training.objectives",
    "ReconstructionObjective": "training.objectives",
    "EITObjective": "training.objectives",
    "MixedObjective": "training.objectives",
    "AnchorConfig": "policies.anchors",
    "DataConfig": "training.data_spec",
    "make_dataset": "training.data",
    "Collator": "training.collate",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"sparsekv.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'sparsekv.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
