"""A press that asks for a sparsity loss gets it: its weight times the mean over layers joins the cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import sparsekv
from sparsekv import SparseRegPress
from sparsekv.errors import ConfigError
from sparsekv.training import MixedObjective, SparseKVTrainer, SparseLMObjective, StandardLMObjective
from sparsekv.training.student import student_output
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples


def trainer_for(folder: Any, press: Any, **given: Any) -> SparseKVTrainer:
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    model = tiny_model("llama", num_hidden_layers=2)
    return SparseKVTrainer(
        model,
        arguments,
        press=press,
        lora=None,
        train_dataset=samples(),
        tokenizer=toy_tokenizer(),
        **given,
    )


def gradient_of(trainer: SparseKVTrainer) -> tuple[torch.Tensor, float]:
    """The first step's gradient on every parameter, and the loss."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=items)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), float(loss)


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_the_press_adds_its_weight_times_the_mean_over_layers(kind, tmp_path):
    plain, plain_loss = gradient_of(trainer_for(tmp_path, sparsekv.FullPress()))
    none, none_loss = gradient_of(trainer_for(tmp_path, SparseRegPress(kind, 0.0)))
    assert torch.equal(none, plain) and none_loss == plain_loss
    trainer = trainer_for(tmp_path, SparseRegPress(kind, 0.3))
    found, loss = gradient_of(trainer)
    assert trainer.meter.read()["sparsity"] == pytest.approx((loss - plain_loss) / 0.3, rel=1e-4)

    fresh = trainer_for(tmp_path, SparseRegPress(kind, 0.3))
    batches, _ = fresh.get_batch_samples(iter(fresh.get_train_dataloader()), 1, torch.device("cpu"))
    plan = fresh.plan(batches[0], fresh.policy_at(0, 0.0, 0.0), 0.0, observe=True)
    student_output(fresh.model, fresh.model, batches[0], plan)
    assert sorted(plan.collected["sparsity"]) == [0, 1]
    mean = sum(plan.collected["sparsity"].values()) / 2
    mean.backward()
    own = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in fresh.model.parameters()]
    )
    assert own.norm() > 1e-2 * plain.norm()
    assert loss == pytest.approx(plain_loss + 0.3 * float(mean), rel=1e-5)
    assert (found - plain - 0.3 * own).norm() <= 1e-4 * (0.3 * own).norm()


@pytest.mark.parametrize(
    "objective",
    [
        SparseLMObjective(sparsity_kind="entropy"),
        SparseLMObjective(sparsity_kind="l1"),
        MixedObjective([(StandardLMObjective(), 1.0), (SparseLMObjective(), 0.5)]),
    ],
)
def test_two_sparsity_losses_are_refused(objective, tmp_path):
    with pytest.raises(ConfigError, match="each ask for a sparsity loss; give one"):
        trainer_for(tmp_path, SparseRegPress("entropy", 0.3), objective=objective)
