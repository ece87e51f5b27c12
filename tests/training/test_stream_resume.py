"""A run over a stream that is shorter than it resumes exactly, past the stream's end too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from sparsekv.training.config_parts import LoraOptions
from training.ddp_worker import run_case, samples


class Stream(IterableDataset):
    """Six samples, again each time it is iterated."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from samples(6)


def run(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Five steps of two samples; LoRA's dropout draws from the global random state."""
    lora = LoraOptions(r=4, alpha=8, dropout=0.3)
    return run_case("token", folder, batch_size=2, accumulation=1, train_dataset=Stream(), lora=lora, **more)


def test_a_stream_that_ended_is_resumed_exactly(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", save_steps=1)
    for step in (2, 4):  # the stream ends after the third
        resumed = run(tmp_path / f"from-{step}", resume=tmp_path / "whole" / f"checkpoint-{step}")
        assert torch.equal(resumed["after"], whole["after"]), f"resumed from step {step}"
        assert torch.equal(resumed["loss"], whole["loss"])
    assert len(whole["loss"]) == 5 and len(set(whole["loss"].tolist())) == 5
