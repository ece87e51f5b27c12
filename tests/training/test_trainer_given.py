"""What SparseKVTrainer refuses of what it is given, because it would be ignored or train nothing."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import kvpress
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsekv import BlockDropoutPress, EvictionAugPress, SentenceDropoutPress, SoftThresholdPress
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.base import Policy
from sparsekv.training import (
    AdaptiveCurriculum,
    EITObjective,
    FixedCurriculum,
    LinearCurriculum,
    MixedObjective,
    ReconstructionObjective,
)
from sparsekv.training.collate import Collator
from sparsekv.training.curricula import StepCurriculum
from sparsekv.training.dropping import DroppingConfig
from sparsekv.training.relaxation import Relaxation
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples
from training.toy_trainer import arguments, first_step, trainer_for

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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"press": SoftThresholdPress(threshold=-50.0), "curriculum": LinearCurriculum(0.1, 0.9)},
            r"SoftThresholdPress has a threshold of its own, and curriculum linear sets a ratio; give one",
        ),
        (
            {
                "press": EvictionAugPress(["knorm"]),
                "objective": MixedObjective([(EITObjective(lambda_context=1.0), 1.0)]),
                "dropping": DroppingConfig("streaming", window=8),
            },
            r"objective mixed with lambda_context is for dropping 'prefill'",
        ),
    ],
)
def test_what_would_mean_nothing_is_refused(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, **given)


def test_a_threshold_of_its_own_goes_with_predictors_that_have_a_curriculum(tmp_path):
    press = SoftThresholdPress(threshold=0.0, n_sink=1, recent=2)
    given = {"relaxation": Relaxation(n_sink=1, n_recent=2), "press_share": 0.5}
    trainer_for(tmp_path, press=press, curriculum=LinearCurriculum(0.1, 0.9), **given)
    trainer_for(tmp_path, press=press, curriculum=FixedCurriculum(0.0))


@pytest.mark.parametrize(
    ("metric", "curriculum", "message"),
    [
        (None, LinearCurriculum(0.0, 0.9), "the least evicted would win; give curriculum fixed"),
        ("eval_loss", AdaptiveCurriculum(baseline=9.0), "would compare eval_loss under eviction"),
        ("perplexity_evicted", LinearCurriculum(0.0, 0.9), "would compare perplexity_evicted"),
        (
            "perplexity",
            LinearCurriculum(0.0, 0.9),
            "perplexity is better the less it is: give greater_is_better=False",
        ),
        ("perplexity_evicted", FixedCurriculum(0.5), "give greater_is_better=False"),
    ],
)
def test_the_best_of_different_ratios_is_refused(metric, curriculum, message, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given = {"press": EvictionAugPress(["knorm"]), "curriculum": curriculum, "eval_dataset": samples(2)}
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, {**steps, **best}, **given)
    if metric is not None:  # what stops early, or saves the best alone, compares them too
        for other in (
            {"metric_for_best_model": metric},
            {"save_strategy": "best", "metric_for_best_model": metric},
        ):
            with pytest.raises(ConfigError, match="metric_for_best_model"):
                trainer_for(
                    tmp_path, {**steps, **other, "greater_is_better": best_is_greater(metric)}, **given
                )
    allowed = {"metric_for_best_model": "perplexity", "greater_is_better": False}
    trainer_for(tmp_path, {**steps, **best, **allowed}, **given)


def best_is_greater(metric):
    """As transformers takes it to be where nothing is said and a best model is to be loaded."""
    return not metric.endswith("loss")


def test_data_without_any_label_is_refused(tmp_path):
    rows = [
        {**row, "labels": [row["input_ids"][0], *[-100] * (len(row["input_ids"]) - 1)]} for row in samples()
    ]
    press = EvictionAugPress(["knorm"], 0.5)
    for given in ({"train_dataset": rows}, {"eval_dataset": rows}):
        with pytest.raises(
            ConfigError, match=r"no usable row: 12 rows, none of 2 tokens with a label after the first"
        ):
            trainer_for(tmp_path, press=press, **given)
    repeats = ReconstructionObjective(span=6, cue=2)
    alone = trainer_for(tmp_path, press=press, train_dataset=rows, objective=repeats)
    assert alone.train().training_loss > 0, "of the span that is appended"
    trainer = trainer_for(tmp_path, press=press, train_dataset=[*rows, *samples(4)])
    assert all(any(label != -100 for label in trainer.train_dataset[i]["labels"][1:]) for i in range(16))


def test_a_ratio_of_kvpress_is_the_default_curriculum(tmp_path):
    """On a copy: the press stays as it was."""
    press = kvpress.AdaKVPress(kvpress.KnormPress(0.5))
    trainer = trainer_for(tmp_path, press=press)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "requested_compression" in row]
    assert [row["requested_compression"] for row in logged] == [0.5] * 3 and press.compression_ratio == 0.5
    assert all(row["achieved_compression"] == pytest.approx(0.5, abs=0.05) for row in logged)
    several = trainer_for(tmp_path, press=kvpress.ComposedPress([kvpress.KnormPress(0.5)]))
    assert several.curriculum.ratio(0, 1) == 0.5
    other = trainer_for(tmp_path, press=kvpress.KnormPress(0.5), curriculum=FixedCurriculum(0.25))
    other.train()
    assert other.state.log_history[0]["achieved_compression"] == pytest.approx(0.25, abs=0.05)


def test_a_press_brings_its_tokenizer(tmp_path):
    """Where the trainer has none: a collator of one's own needs none of it."""
    press = SentenceDropoutPress(0.5, tokenizer=toy_tokenizer(), n_sink=1, recent=2)
    collator = Collator(toy_tokenizer())
    trainer_for(tmp_path, press=press, tokenizer=None, data_collator=collator).train()


def test_the_span_to_repeat_was_evicted(tmp_path):
    """With a policy that looks at tokens alone, all that is scored of it, or all that there is of an evicted block."""
    press = BlockDropoutPress(block_size=6, n_sink=1, recent=2)
    scored, lost = 0, 0.0
    trainer = trainer_for(
        tmp_path,
        press=press,
        curriculum=FixedCurriculum(0.5),
        objective=ReconstructionObjective(span=5, cue=1),
        train_dataset=[
            {
                "input_ids": torch.randperm(200, generator=torch.Generator().manual_seed(i))[:40].tolist(),
                "boundary": 30,
            }
            for i in range(12)
        ],
    )
    for _ in range(3):
        batch, _ = first_step(trainer)
        policy, ratio = trainer._at_this_step()
        at = trainer.plan(batch, policy, ratio).selection.evicted_at[:, 0, 0]
        for row in range(len(at)):
            ids, tail = batch["input_ids"][row, :40].tolist(), batch["input_ids"][row, 41:].tolist()
            begin = next(i for i in range(40) if ids[i : i + 4] == tail)
            scored, lost = scored + 4, lost + float((at[row, begin : begin + 4] <= 40).sum())
    assert lost == scored > 0
