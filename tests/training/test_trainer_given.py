"""What SparseKVTrainer refuses of what it is given, because it would be ignored or train nothing."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsekv import BlockDropoutPress, EvictionAugPress
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.base import Policy
from sparsekv.training import AdaptiveCurriculum
from sparsekv.training.curricula import StepCurriculum
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.relaxation import Relaxation
from toy import tiny_model
from training.ddp_worker import samples
from training.toy_trainer import arguments, trainer_for

PRESS = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
STREAMING = DroppingConfig("streaming", window=32)


def press_that_keeps(entries: int) -> BlockDropoutPress:
    return BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=4, recent=entries - 4)


def sinks(recent: int) -> Policy:
    return make_policy("sink_recent", n_sink=4, n_recent=recent)


def with_adapter() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama", num_hidden_layers=2), config)


@pytest.mark.parametrize(
    ("given", "held"),
    [({"press": PRESS}, "0 of 16"), ({"lora": None, "relaxation": Relaxation()}, "21 of 25")],
    ids=["adapter", "predictors"],
)
def test_an_optimizer_made_before_what_is_trained_is_refused(given, held, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=f"optimizers: .* holds {held} .*optimizer_cls_and_kwargs"):
        trainer_for(tmp_path, model=model, optimizers=(optimizer, None), **given)


def test_an_optimizer_of_a_part_of_the_given_model_is_the_callers_right(tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    kept, moved = model.model.norm.weight.detach().clone(), model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer_for(tmp_path, model=model, lora=None, press=PRESS, optimizers=(optimizer, None)).train()
    assert torch.equal(model.model.norm.weight, kept) and not torch.equal(model.lm_head.weight, moved)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_of_all_that_is_trained_is_used(wrapped, tmp_path):
    model = with_adapter() if wrapped else tiny_model("llama", num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = trainer_for(tmp_path, model=model, lora=None, press=PRESS, optimizers=(optimizer, None))
    trainer.train()
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("baseline", [None, 5.0])
@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [({}, None, "give eval_dataset"), ({"eval_strategy": "no"}, 2, "eval_strategy 'no' never measures")],
)
def test_an_adaptive_curriculum_that_would_never_hear_is_refused(changes, data, message, baseline, tmp_path):
    held_out = None if data is None else samples(data)
    curriculum = AdaptiveCurriculum(baseline=baseline)
    trainer = trainer_for(tmp_path, changes, press=PRESS, curriculum=curriculum, eval_dataset=held_out)
    with pytest.raises(ConfigError, match=message):
        trainer.train()


def test_an_adaptive_curriculum_with_a_baseline_hears_every_evaluation(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1}
    curriculum = AdaptiveCurriculum(start_ratio=0.1, step=0.05, baseline=1e6)
    trainer = trainer_for(tmp_path, changes, press=PRESS, curriculum=curriculum, eval_dataset=samples(2))
    trainer.train()
    ratios = [row["eval_ratio"] for row in trainer.state.log_history if "eval_ratio" in row]
    assert ratios == pytest.approx([0.1, 0.15, 0.2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_of_the_model_is_refused(reentrant, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        trainer_for(tmp_path, model=model, lora=None, press=PRESS)
        return
    with pytest.raises(ConfigError, match="the model's gradient checkpointing is reentrant"):
        trainer_for(tmp_path, model=model, lora=None, press=PRESS)
    # what the arguments ask for takes the place of what is there, and what is switched off does no harm
    trainer_for(tmp_path, {"gradient_checkpointing": True}, model=model, lora=None, press=PRESS)
    model.gradient_checkpointing_disable()
    trainer_for(tmp_path, model=model, lora=None, press=PRESS)


def test_the_arguments_stay_as_they_were_given(tmp_path):
    """So a second trainer of the same arguments keeps as few checkpoints."""
    given = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    config = copy.copy(given.accelerator_config)
    before = dict(vars(given))
    trainer_for(tmp_path, args=given, press=PRESS)
    assert {**vars(given), "accelerator_config": None} == {**before, "accelerator_config": None}
    assert given.accelerator_config == config
    trainer = trainer_for(tmp_path, args=given, press=PRESS)
    trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.device == given.device and trainer.n_checkpoints == 1


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"compute_metrics": print}, "compute_metrics is not supported: the logits"),
        ({}, {"preprocess_logits_for_metrics": print}, "preprocess_logits_for_metrics is not supported"),
        ({}, {"compute_loss_func": print}, "compute_loss_func is not supported: .*objective="),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor must be 0, got 0.1"),
        ({}, {"model": None, "model_init": tiny_model}, "model_init is not supported"),
        ({}, {"model": None}, "model is missing"),
    ],
)
def test_arguments_of_trainer_that_nobody_would_heed_are_refused(changes, given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, changes, press=PRESS, **given)


def test_predict_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, press=PRESS)
    with pytest.raises(ConfigError, match=r"predict is not supported: .*evaluate"):
        trainer.predict(samples(2))


def rows(*lengths: int, boundary: int = 0) -> list[dict[str, Any]]:
    return [{"input_ids": list(range(10, 10 + length)), "boundary": boundary} for length in lengths]


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ({"press": press_that_keeps(24)}, 34),  # 3 * 34 // 4 = 25
        ({"press": press_that_keeps(24), "dropping": STREAMING}, 33),  # over the window
        ({"press": press_that_keeps(44), "dropping": STREAMING}, 45),
        ({"press": EvictionAugPress([sinks(30), sinks(20)])}, 34),
        ({"relaxation": Relaxation(n_sink=4, n_recent=20)}, 34),
        ({"press": sinks(20), "press_share": 0.5, "relaxation": Relaxation(n_sink=4, n_recent=32)}, 34),
    ],
    ids=["press", "streaming", "streaming, many kept", "one of several", "predictors", "both"],
)
def test_samples_that_are_too_short_to_lose_anything_are_refused(given, least, tmp_path):
    with pytest.raises(ConfigError, match=r"train_dataset: .* nothing would be dropped"):
        trainer_for(tmp_path, train_dataset=rows(*range(10, least)), **given)
    # one sample among many is enough
    trainer_for(tmp_path, train_dataset=rows(*range(10, least + 1)), **given)


def test_long_samples_are_found_where_short_ones_take_turns(tmp_path):
    trainer_for(tmp_path, train_dataset=rows(*[10, 60] * 200), press=press_that_keeps(24))


def test_the_boundary_of_a_sample_bounds_its_context(tmp_path):
    press = press_that_keeps(24)
    with pytest.raises(
        ConfigError, match=r"has 24 \(1 of 1 samples looked at\), and 24 sink and recent ones"
    ):
        trainer_for(tmp_path, train_dataset=rows(90, boundary=24), press=press)
    for boundary in (24, 25):
        drawn = DroppingConfig(boundary="random" if boundary == 24 else "end")
        trainer_for(tmp_path, train_dataset=rows(90, boundary=boundary), press=press, dropping=drawn)


def test_a_stream_that_is_too_short_to_lose_anything_is_told_once(tmp_path, caplog):
    def logged(length: int) -> list[str]:
        caplog.clear()
        trainer = trainer_for(
            tmp_path,
            press=press_that_keeps(24),
            curriculum=StepCurriculum([1], [0.5]),  # nothing is to be dropped in the first step
            train_dataset=datasets.Dataset.from_list(rows(*[length] * 4)).to_iterable_dataset(),
        )
        trainer.train()
        assert trainer.state.log_history[1]["requested_compression"] == 0.5
        return [record.message for record in caplog.records if record.name.startswith("sparsekv")]

    (told,) = logged(24)
    assert told.startswith("up to step 2 nothing was dropped, where a fraction of 0.5")
    assert logged(100) == []
