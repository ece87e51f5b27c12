"""A press that asks for a sparsity loss gets it: its weight times the mean over layers joins the cross-entropy."""

from __future__ import annotations

import pytest
import torch

import sparsekv
from sparsekv import SparseRegPress
from sparsekv.errors import ConfigError
from sparsekv.training import (
    FixedCurriculum,
    MixedObjective,
    SparseKVTrainer,
    SparseLMObjective,
    StandardLMObjective,
)
from sparsekv.training.student import student_output
from training.toy_trainer import first_step, trainer_for


def gradient_of(trainer: SparseKVTrainer) -> tuple[torch.Tensor, float]:
    """The first step's gradient on every parameter, and the loss."""
    batch, items = first_step(trainer)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), float(loss)


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_the_press_adds_its_weight_times_the_mean_over_layers(kind, tmp_path):
    plain, plain_loss = gradient_of(trainer_for(tmp_path, press=sparsekv.FullPress(), lora=None))
    none, none_loss = gradient_of(trainer_for(tmp_path, press=SparseRegPress(kind, 0.0), lora=None))
    assert torch.equal(none, plain) and none_loss == plain_loss
    trainer = trainer_for(tmp_path, press=SparseRegPress(kind, 0.3), lora=None)
    found, loss = gradient_of(trainer)
    assert trainer.meter.read()["sparsity"] == pytest.approx((loss - plain_loss) / 0.3, rel=1e-4)

    fresh = trainer_for(tmp_path, press=SparseRegPress(kind, 0.3), lora=None)
    batch, _ = first_step(fresh)
    plan = fresh.plan(batch, fresh.policy_at(0, 0.0, 0.0), 0.0, observe=True)
    student_output(fresh.model, fresh.model, batch, plan)
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
        trainer_for(tmp_path, press=SparseRegPress("entropy", 0.3), lora=None, objective=objective)


@pytest.mark.parametrize(
    "given",
    [
        {"press": sparsekv.SoftThresholdPress(n_sink=1, recent=3)},
        {"press": sparsekv.EvictionAugPress(["knorm"], soft_scores=True)},
        {"press": sparsekv.BlockDropoutPress(block_size=4, n_sink=1, recent=3)},
    ],
    ids=["soft_threshold", "soft_scores", "blocks"],
)
def test_at_ratio_0_attention_is_as_spread_as_without_eviction(given, tmp_path):
    found = []
    for press, ratio in ((sparsekv.FullPress(), 0.0), (given["press"], 0.0), (given["press"], 0.5)):
        trainer = trainer_for(
            tmp_path, press=press, objective=SparseLMObjective(0.3), curriculum=FixedCurriculum(ratio)
        )
        batch, items = first_step(trainer)
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        read = trainer.meter.read()
        found.append((read["ce"], read["sparsity"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[2][1] - found[0][1]) > 1e-3 * found[0][1]
