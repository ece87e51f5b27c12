"""Small runs of the real trainer whose gradients and weights are compared across ways of batching.

torchrun --nproc_per_node=2 ddp_worker.py FOLDER BATCH_SIZE ACCUMULATION CASE ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import TrainerCallback, TrainingArguments

import sparsekv
from sparsekv.relevance import RelevanceConfig
from sparsekv.training import (
    EITObjective,
    LinearCurriculum,
    MixedObjective,
    ReconstructionObjective,
    SparseKVTrainer,
    SparseLMObjective,
    StandardLMObjective,
)
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.sharded import whole
from toy import tiny_model, toy_tokenizer

JUDGED = 5
"""Held-out samples: no multiple of two processes."""

CASES: dict[str, Any] = {
    "token": lambda: {"press": sparsekv.BlockDropoutPress(block_size=4, n_sink=1, n_recent=3, share="head")},
    "layer": lambda: {
        "press": sparsekv.EvictionAugPress(presses=["knorm", "h2o", "keydiff"]),
        "objective": EITObjective(lambda_kl=0.5),
    },
    "adaptive_blocks": lambda: {
        "press": sparsekv.AdaptiveBlockDropoutPress(block_size=4, n_sink=1, n_recent=3),
        "dropping": DroppingConfig(way="streaming", window=6),
        "objective": SparseLMObjective(sparsity_weight=0.3),
    },
    "relevance": lambda: {
        "relaxation": Relaxation(n_sink=1, n_recent=3),
        "relevance": RelevanceConfig(bias=1.0),
        "relevance_lr": 0.03,
        "objective": EITObjective(lambda_kl=0.5),
    },
    "quantile": lambda: {
        "relaxation": Relaxation(threshold="quantile", n_sink=1, n_recent=3),
        "relevance_lr": 0.03,
        "objective": EITObjective(lambda_kl=0.5),
    },
    "sparse_reg": lambda: {"press": sparsekv.SparseRegPress("l1", 0.3)},
    "mixed": lambda: {
        "press": sparsekv.SoftThresholdPress(n_sink=1, n_recent=3),
        "dropping": DroppingConfig(boundary="random"),
        "objective": MixedObjective(
            [
                (StandardLMObjective(), 0.7),
                (ReconstructionObjective(span=6, cue=2), 0.5),
                (EITObjective(), 0.4),
            ]
        ),
    },
}


def samples(n: int = 12) -> list[dict[str, Any]]:
    """Of different lengths, with different numbers of labels; some set a boundary."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(n):
        length = 22 + int(torch.randint(0, 12, (1,), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        ignored = (0, 9, 16)[index % 3]
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * ignored + ids[ignored:],
                "boundary": 14 if index % 2 else 0,
                "sample_index": 1000 + index,
            }
        )
    return made


class Stream:
    """Samples one after the other, without a length."""

    def __init__(self, n: int = 12) -> None:
        self.n = n

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(samples(self.n))


class Recorder(TrainerCallback):
    """The gradients right before every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by Trainer."""
        found = [whole(p.grad).flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found).clone())


def trainable(model: Any) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters() if p.requires_grad]).clone()


def run_case(
    name: str,
    folder: Path,
    *,
    batch_size: int,
    accumulation: int,
    checkpointing: bool = False,
    resume: Path | None = None,
    save_steps: int = 0,
    judged: int = 0,
    arguments: Mapping[str, Any] | None = None,
    final: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Five SGD steps on 4 samples each: first gradient, weights before and after, and what is logged.

    `judged`: so many samples' held-out perplexity at the end, of a data set and of a stream. `arguments`: further
    TrainingArguments; what else is given goes to the trainer. `final`: what is served is written into `folder`/final.
    """
    settings: dict[str, Any] = dict(  # noqa: C408 (as arguments are written)
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        optim="sgd",
        learning_rate=0.03,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    training = TrainingArguments(**{**settings, **(arguments or {})})
    recorder = Recorder()
    made = {
        "model": tiny_model("llama", num_hidden_layers=2),
        "args": training,
        "curriculum": LinearCurriculum(0.4, 0.6, 5),
        "lora": LoraOptions(r=4, alpha=8),
        "train_dataset": samples(),
        "tokenizer": toy_tokenizer(),
        "callbacks": [recorder],
        **CASES[name](),
        **changes,
    }
    trainer = SparseKVTrainer(**made)
    before = trainable(trainer.model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if final:
        trainer.save_weights(folder / "final")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    held_out = [trainer.evaluate(each) for each in (samples(judged), Stream(judged))] if judged else []
    return {
        "perplexity": torch.tensor([found["eval_perplexity_evicted"] for found in held_out]),
        "ce": torch.tensor([row["ce"] for row in rows]),
        "gradient": recorder.gradients[0] if recorder.gradients else torch.zeros(0),
        "before": before,
        "after": trainable(trainer.model),
        "loss": torch.tensor([row["loss"] for row in rows]),
        "requested": torch.tensor([row["requested_compression"] for row in rows]),
        "achieved": torch.tensor([row["achieved_compression"] for row in rows]),
    }


def main() -> None:
    """One process of torchrun: every case, and the last one again from a checkpoint; saved by the first process."""
    torch.set_num_threads(1)
    folder, batch_size, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = sys.argv[4:]
    found: dict[str, Any] = {}
    for name in names:
        found[name] = run_case(
            name,
            folder / name,
            batch_size=batch_size,
            accumulation=accumulation,
            save_steps=2,
            judged=JUDGED if name == names[-1] else 0,
        )
    found["stream"] = run_case(
        "token", folder / "stream", batch_size=batch_size, accumulation=accumulation, train_dataset=Stream()
    )
    resumed = run_case(
        names[-1],
        folder / "resumed",
        batch_size=batch_size,
        accumulation=accumulation,
        resume=folder / names[-1] / "checkpoint-2",
    )
    if torch.distributed.get_rank() == 0:
        torch.save({**found, "resumed": resumed}, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
