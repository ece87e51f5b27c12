"""A resumed run saves, logs and evaluates as often as it is asked to now, not as it was at first."""

from __future__ import annotations

import shutil
from typing import Any

from transformers import TrainingArguments

from sparsekv import BlockDropoutPress
from sparsekv.training import SparseKVTrainer
from sparsekv.training.config_parts import LoraOptions
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples


def trainer_for(folder: Any, every: int) -> SparseKVTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=7,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=every,
        save_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return SparseKVTrainer(
        tiny_model("llama", num_hidden_layers=1),
        arguments,
        press=BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3),
        lora=LoraOptions(r=2, alpha=4),
        train_dataset=samples(),
        eval_dataset=samples(2),
        tokenizer=toy_tokenizer(),
    )


def steps_of(trainer: SparseKVTrainer, key: str) -> list[int]:
    return [row["step"] for row in trainer.state.log_history if key in row]


def test_intervals_may_change_when_a_run_goes_on(tmp_path):
    first = trainer_for(tmp_path, 3)
    first.train()
    assert steps_of(first, "loss") == [3, 6, 7]
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = trainer_for(tmp_path, 2)
    again.train(resume_from_checkpoint=True)
    assert steps_of(again, "loss") == [3, 4, 6, 7]
    assert steps_of(again, "eval_loss") == [3, 4, 6]
    saved = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in (3, 4, 6, 7)]
