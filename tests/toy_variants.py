"""A toy adapter with relevance predictors, and a config that compares it with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toy import tiny_model


def save_toy_adapter(folder: str | Path, *, seed: int = 0, relevance: bool = True) -> Path:
    """A LoRA adapter of the toy llama that changes its answers, with random predictors beside it."""
    from peft import LoraConfig, get_peft_model

    from sparsekv.relevance import attach_relevance, save_relevance

    target = Path(folder)
    model = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    wrapped.save_pretrained(target)
    if relevance:
        attach_relevance(model, seed=seed)
        save_relevance(model, target)
    return target


def variants_of(adapter: Path, **trained: Any) -> dict[str, Any]:
    """The keys of a config that runs the base and `adapter`, the latter with `relevance` (and other changes)."""
    methods = ["full", {"name": "relevance", "budget_scope": "model"}]
    return {
        "methods": ["full", "knorm", "tova"],
        "compression_ratios": [0.5],
        "variants": [
            {"name": "base"},
            {"name": "eit", "adapter": str(adapter), "methods": methods, **trained},
        ],
    }
