"""Who trains relevance predictors, and in which steps: a relaxation, a soft press, or both in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsekv
from sparsekv import BlockDropoutPress, SoftThresholdPress
from sparsekv.errors import ConfigError
from sparsekv.models import load_model
from sparsekv.relevance import has_relevance, relevance_modules
from sparsekv.relevance.predictor import Served, served_of
from sparsekv.training import EITObjective, FixedCurriculum, SparseKVTrainer
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.relaxation import Relaxation, RelaxedRelevance
from toy import tiny_model, toy_tokenizer
from training.toy_trainer import trainer_for


def predictors_of(trainer: SparseKVTrainer) -> list[torch.Tensor]:
    return [p for m in relevance_modules(trainer.model).values() for p in m.relevance.parameters()]


BOTH = {
    "press": BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3),
    "relaxation": Relaxation(n_sink=1, n_recent=3),
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (BOTH, "press_share 0 with both press and relaxation"),
        ({"press": BOTH["press"], "press_share": 0.5}, "press_share 0.5 without both press and relaxation"),
        ({"relaxation": BOTH["relaxation"], "press_share": 0.5}, "press_share 0.5 without both"),
        ({**BOTH, "press_share": 1.5}, r"press_share must be a number in \[0, 1\], got 1.5"),
        ({**BOTH, "press_share": True}, r"press_share must be a number in \[0, 1\], got True"),
        ({**BOTH, "press_share": 1}, "press_share 1 gives every step to the press"),
    ],
)
def test_a_share_that_means_nothing_is_refused(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, **given)


def test_a_press_and_a_relaxation_share_the_steps(tmp_path):
    trainer = trainer_for(tmp_path, **BOTH, press_share=0.5)
    policies = [trainer.policy_at(step, 0.0, 0.5) for step in range(400)]
    share = sum(not isinstance(policy, RelaxedRelevance) for policy in policies) / 400
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("frozen", [False, True])
def test_a_soft_press_on_relevance_trains_the_predictors(frozen, tmp_path):
    press = SoftThresholdPress(on="relevance", compression_ratio=0.5, n_sink=2, n_recent=5)
    given: dict[str, Any] = {}
    if frozen:
        given = {
            "model": tiny_model("llama", num_hidden_layers=2).requires_grad_(False),
            "lora": None,
            "objective": EITObjective(),
        }
    trainer = trainer_for(tmp_path, press=press, relevance_lr=0.03, **given)
    assert trainer.objective == EITObjective(), "with predictors, a teacher"
    trainer.create_optimizer()
    own = [group for group in trainer.optimizer.param_groups if group["lr"] == 0.03]
    assert len(own) == 1 and {id(p) for p in own[0]["params"]} == {id(p) for p in predictors_of(trainer)}
    before = [p.detach().clone() for p in predictors_of(trainer)]
    trainer.train()
    assert len(before) == 4, "a weight and a bias in both layers"
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(predictors_of(trainer), before, strict=True))


SHARED = {"relaxation": Relaxation(n_sink=1, n_recent=3)}


@pytest.mark.parametrize(
    ("press", "given", "wanted"),
    [
        ({"compression_ratio": 0.5, "n_sink": 2, "n_recent": 5}, {}, Served(2, 5, 0.0)),
        ({"threshold": -0.5, "n_sink": 3}, {}, Served(3, 64, -0.5)),
        ({"n_sink": 2, "n_recent": 5}, {**SHARED, "press_share": 1}, Served(2, 5, 0.0)),
        ({"n_sink": 2, "n_recent": 5}, {**SHARED, "press_share": 0.5}, Served(1, 3, 0.0)),
    ],
)
def test_predictors_are_served_as_they_were_trained(press, given, wanted, tmp_path):
    trainer = trainer_for(tmp_path, press=SoftThresholdPress(on="relevance", **press), **given)
    assert served_of(trainer.model) == Served() != wanted
    trainer.save_weights(tmp_path / "final")
    trainer.save_model(str(tmp_path / "saved"))
    model = tiny_model("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    for folder in ("final", "saved"):
        loaded, _ = load_model(
            str(tmp_path / "base"), adapter=str(tmp_path / folder), dtype="float32", device="cpu"
        )
        assert has_relevance(loaded) and served_of(loaded) == wanted


def test_steps_without_eviction_train_no_predictor(tmp_path):
    """At ratio 0 a soft press hides nothing: predictors stay, and nothing fails for it."""
    press = SoftThresholdPress(on="relevance", n_sink=2, n_recent=5)
    trainer = trainer_for(tmp_path, press=press, curriculum=FixedCurriculum(0.0))
    before = [p.detach().clone() for p in predictors_of(trainer)]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(predictors_of(trainer), before, strict=True))
    assert trainer.args.ddp_find_unused_parameters
    attention = trainer_for(tmp_path, press=sparsekv.SoftThresholdPress(n_sink=2, n_recent=5))
    assert not has_relevance(attention.model) and not attention.args.ddp_find_unused_parameters


def test_streaming_asks_the_whole_row_for_the_budget(tmp_path):
    """Its weights are those of all entries. Of 60 a tenth is asked for, and of a context of 12 all that always stay."""
    rows = [{"input_ids": [3 + (7 * i + 11 * j) % 200 for j in range(60)], "boundary": 12} for i in range(4)]
    trainer = trainer_for(
        tmp_path,
        {"max_steps": 1},
        relaxation=Relaxation(n_sink=1, n_recent=5),
        curriculum=FixedCurriculum(0.9),
        dropping=DroppingConfig("streaming", window=4),
        train_dataset=rows,
    )
    trainer.train()
    row = trainer.state.log_history[0]
    kept = 1 - row["achieved_compression"]
    assert kept > 0.6 and row["budget_penalty"] == pytest.approx(50 * (kept - 0.1) ** 2, rel=0.05)
