"""`bf16`: teacher, student and losses compute in the same precision, in steps and in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import sparsekv
from sparsekv.training import EITObjective, FixedCurriculum
from toy import tiny_model
from training.ddp_worker import samples
from training.toy_trainer import LORA, trainer_for


class Dtypes(TrainerCallback):
    """What every linear layer of the teacher and of the student computes in."""

    def __init__(self, model: Any) -> None:
        self.seen: set[torch.dtype] = set()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _m, _x, out: self.seen.add(out.dtype))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_student_that_misses_nothing_is_its_teacher_in_bf16(lora, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    dtypes = Dtypes(model)
    trainer = trainer_for(
        tmp_path,
        {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True, "bf16": True},
        model=model,
        press=sparsekv.FullPress(),
        curriculum=FixedCurriculum(0.0),
        objective=EITObjective(lambda_kl=0.5),
        lora=lora,
        eval_dataset=samples(5),
    )
    before = trainer.evaluate()
    trainer.train()
    assert dtypes.seen == {torch.bfloat16}
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert abs(rows[0]["kl"]) < 1e-5, "nothing is evicted, and nothing was learned yet"
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce"], rel=1e-3)
    assert rows[1]["kl"] > 1e-4, "a step moves the student"
    start = next(row for row in trainer.state.log_history if "eval_loss" in row and row["step"] == 0)
    assert start["eval_perplexity"] == before["eval_perplexity"], "before training as in it"
