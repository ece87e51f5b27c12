"""A SparseKVTrainer of a tiny model and a few samples, to change one thing of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from sparsekv.training import AdaptiveCurriculum, SparseKVTrainer
from sparsekv.training.config_parts import LoraOptions
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples

LORA = LoraOptions(r=2, alpha=4)


class Listening(AdaptiveCurriculum):
    """Notes in `heard` what it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.heard: list[float] = []

    def observe(self, metric: float) -> None:
        self.heard.append(metric)
        super().observe(metric)


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Three steps of four samples, each logged; nothing saved."""
    given = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(**given)


def trainer_for(folder: Any, changes: Mapping[str, Any] | None = None, **given: Any) -> SparseKVTrainer:
    """`changes` of the arguments; `given` to the trainer, on top of a tiny model with a LoRA adapter."""
    defaults = {
        "model": tiny_model("llama", num_hidden_layers=2),
        "args": arguments(folder, **(changes or {})),
        "lora": LORA,
        "train_dataset": samples(),
        "tokenizer": toy_tokenizer(),
    }
    return SparseKVTrainer(**{**defaults, **given})


def first_step(trainer: SparseKVTrainer) -> tuple[dict[str, torch.Tensor], Any]:
    """The batch of a first step of one micro-batch, made ready, and its number of labels."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batches[0], items
