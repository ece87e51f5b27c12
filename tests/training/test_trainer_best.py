"""load_best_model_at_end: the best step's checkpoint stays, and all that was trained is its."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import TrainerCallback

from sparsekv.relevance import relevance_modules
from sparsekv.relevance.predictor import served_of
from sparsekv.training import FixedCurriculum
from sparsekv.training.relaxation import Relaxation, ScoreQuantiles
from training.ddp_worker import samples
from training.toy_trainer import trainer_for

BEST = 2


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Remember(TrainerCallback):
    """What was trained, as it was at every checkpoint."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = trained(model)


def test_the_best_step_is_kept_and_loaded_with_its_predictors(tmp_path, monkeypatch):
    seen = Remember()
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for(
        tmp_path,
        {**every_step, "max_steps": 5, "save_total_limit": 2, "load_best_model_at_end": True},
        relaxation=Relaxation(threshold="quantile", n_sink=1, n_recent=2),
        curriculum=FixedCurriculum(0.5),
        relevance_lr=0.5,
        eval_dataset=samples(2),
        callbacks=[seen],
    )
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_, **__: {"eval_loss": abs(trainer.state.global_step - BEST)}
    )
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{BEST}", "checkpoint-5"}
    found = trained(trainer.model)
    assert any(".relevance." in name for name in found) and any("lora_" in name for name in found)
    assert all(torch.equal(found[name], value) for name, value in seen.at[BEST].items())
    assert not any(torch.equal(found[name], value) for name, value in seen.at[5].items())

    trainer.save_weights(tmp_path / "served")
    quantiles = ScoreQuantiles()
    quantiles.load_state_dict(
        json.loads((tmp_path / f"checkpoint-{BEST}" / "score_quantiles.json").read_text())
    )
    assert served_of(trainer.model).threshold == quantiles.threshold(0.5, 1e-3)
    assert len(relevance_modules(trainer.model)) == 2
