"""SparseKVTrainer: the documented snippets, what is trained and what is not, and what `evaluate` measures."""

from __future__ import annotations

import json
import math
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import sparsekv
from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.models import load_model
from sparsekv.relevance import RelevanceConfig, attach_relevance, has_relevance, relevance_modules
from sparsekv.selection import NEVER
from sparsekv.training import (
    AnchorConfig,
    EITConfig,
    EITObjective,
    FixedCurriculum,
    LinearCurriculum,
    SparseKVTrainer,
    StandardLMObjective,
)
from sparsekv.training.config_parts import LoraOptions
from sparsekv.training.dropping import resolve_boundaries, row_seeds
from sparsekv.training.relaxation import Relaxation
from toy import save_toy_model, tiny_model, toy_tokenizer
from training.ddp_worker import samples
from training.toy_trainer import LORA, Listening, arguments, first_step, trainer_for


def test_the_snippet_of_the_readme(tmp_path):
    """A data set of texts, some of them shorter than the protected tokens."""
    model, tokenizer = tiny_model("llama", num_hidden_layers=2), toy_tokenizer()
    texts = [f"Text {i} of the data set: " + "words, " * (30 if i % 2 else 4) for i in range(6)]
    dataset = datasets.Dataset.from_dict({"text": [*texts, "", "Hi"]})
    trainer = SparseKVTrainer(
        press=BlockDropoutPress(block_size=64, drop_ratio=0.3, protect_start=4, protect_recent=64),
        curriculum=LinearCurriculum(start_ratio=0.0, end_ratio=0.5, warmup_steps=1000),
        model=model,
        args=arguments(tmp_path),
        train_dataset=dataset,
        tokenizer=tokenizer,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["requested_compression"] for row in rows] == [0.0, 0.0005, 0.001]
    assert all(0 < row["ce"] < 20 and row["tokens_per_s"] > 0 and "kl" not in row for row in rows)
    # r=64, alpha=128 on q, k, v, o of both layers
    shapes = {name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(shapes) == 16 and all(64 in shape for shape in shapes.values())
    assert trainer.model.peft_config["default"].lora_alpha == 128

    # what a ratio of 0.5 hides of every text: half of its context, but never sinks and the last 64
    batch, _ = first_step(trainer)
    plan = trainer.plan(batch, trainer.policy, 0.5)
    at, total = plan.selection.evicted_at, batch["input_ids"].shape[1]
    seen = set()
    for row, boundary in enumerate(batch["boundary"].tolist()):
        start = total - int(batch["attention_mask"][row].sum())
        n = boundary - start
        dropped = (at[row, :, :, start:boundary] == boundary).sum(-1)
        wanted = n - max(int(n * 0.5), min(n, 68))
        assert (dropped == wanted).all()
        assert (at[row, :, :, start : start + 4] == NEVER).all()
        assert (at[row, :, :, boundary - min(64, n) :] == NEVER).all()
        seen.add(wanted > 0)
    assert seen == {True, False}, "the batch must have a text that is long enough, and one that is not"


def test_the_other_snippet_of_the_readme(tmp_path):
    model = save_toy_model(tmp_path / "toy", num_hidden_layers=2)
    path = tmp_path / "text.txt"
    path.write_text("The fox, quick and brown. It jumps; it sleeps! Does it dream? " * 60)
    trainer = EITConfig(
        model_name=str(model),
        anchor=AnchorConfig(
            use_special=True,
            use_punctuation=True,
            use_sink=True,
            use_recent=True,
            sink_size=8,
            recent_size=16,
        ),
        lambda_kl=0.5,
        scheduler_mode="adaptive",
        num_train_samples=2,
        accumulation=1,
        output_dir=str(tmp_path / "run"),
        data={"kind": "text", "path": str(path), "seq_len": 128},
        held_out=2,
        lora_r=2,
        settings={"device": "cpu", "dtype": "float32", "log_every": 1},
    ).build_trainer()
    assert trainer.objective == EITObjective(lambda_kl=0.5) and trainer.args.max_steps == 2
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["requested_compression"] for row in rows] == pytest.approx([0.1, 0.15]), (
        "the first one was safe"
    )
    assert all(0.05 < row["achieved_compression"] < 0.4 and row["kl"] > 0 for row in rows)
    # the anchors of a row stay: sinks, the newest, and punctuation as far as the budget goes
    batch, _ = first_step(trainer)
    kept = trainer.plan(batch, trainer.policy, 0.7).selection.evicted_at == NEVER
    boundary = int(batch["boundary"][0])
    assert kept[0, ..., :8].all() and kept[0, ..., boundary - 16 : boundary].all()
    assert int(kept[0, 0, 0, :boundary].sum()) == int(boundary * (1 - 0.7))


class Watch(TrainerCallback):
    """Teacher and student outputs on one fixed batch after every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.teacher: list[torch.Tensor] = []
        self.student: list[torch.Tensor] = []

    def look(self) -> None:
        from sparsekv.training.student import student_output, teacher_output

        trainer, ids = self.trainer, torch.arange(3, 33)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.teacher.append(teacher_output(trainer.model, batch, trainer.frozen_teacher).states.clone())
        with torch.no_grad():
            self.student.append(student_output(trainer.model, trainer.model, batch, None).states.clone())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.look()


def half_unfrozen() -> Any:
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lora": None},
        {"lora": None, "model": half_unfrozen},
        {"relaxation": Relaxation(n_sink=1, n_recent=3), "press": None},
    ],
    ids=["lora", "full", "half", "lora and gates"],
)
def test_the_teacher_stays_while_the_student_moves(given, tmp_path):
    made = {name: value() if callable(value) else value for name, value in given.items()}
    press = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
    watch = Watch()
    options = {"press": press, "objective": EITObjective(), "callbacks": [watch], **made}
    watch.trainer = trainer = trainer_for(tmp_path, **options)
    watch.look()
    base = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        wanted = base.model(torch.arange(3, 33)[None]).last_hidden_state
    torch.testing.assert_close(watch.teacher[0], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(watch.student[0], wanted, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert len(watch.teacher) == 4 and all(torch.equal(one, watch.teacher[0]) for one in watch.teacher)
    moved = [(a - b).abs().max() for a, b in zip(watch.student[1:], watch.student, strict=False)]
    assert min(moved) > 1e-3
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["kl"] > 1e-4, "eviction alone makes a difference"


def test_gates_have_an_optimizer_group_of_their_own(tmp_path):
    options = {"relevance_lr": 0.5, "relevance_weight_decay": 0.25, "relaxation": Relaxation()}
    changes = {"max_steps": 4, "lr_scheduler_type": "linear", "weight_decay": 0.125}
    trainer = trainer_for(tmp_path, changes, **options)
    trainer.create_optimizer()
    gates = {id(p) for m in relevance_modules(trainer.model).values() for p in m.relevance.parameters()}
    groups = trainer.optimizer.param_groups
    own = [group for group in groups if any(id(p) in gates for p in group["params"])]
    assert len(own) == 1 and {id(p) for p in own[0]["params"]} == gates and len(gates) == 4
    assert (own[0]["lr"], own[0]["weight_decay"]) == (0.5, 0.25)
    rest = [p for group in groups if group is not own[0] for p in group["params"]]
    assert len(rest) == len({id(p) for p in rest}) == 16
    assert {group["lr"] for group in groups if group is not own[0]} == {0.01}
    trainer.create_scheduler(num_training_steps=4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert own[0]["lr"] == pytest.approx(0.5 * 3 / 4), "the schedule scales every group"


def test_a_frozen_model_trains_its_gates_alone(tmp_path):
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(
        tmp_path,
        model=model,
        lora=None,
        relaxation=Relaxation(n_sink=1, n_recent=3),
        relevance=RelevanceConfig(bias=0.5),
        curriculum=FixedCurriculum(0.5),
    )
    assert trainer.frozen_teacher is None, "the model itself is the teacher, so no copy is needed"
    start = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        if ".relevance." not in name:
            assert torch.equal(value, before[name])
    ends = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(ends) == 4 and all((a - b).abs().max() > 1e-3 for a, b in zip(start, ends, strict=True))
    kept = 1 - trainer.state.log_history[0]["achieved_compression"]
    penalty = trainer.state.log_history[0]["budget_penalty"]
    assert kept > 0.5 and penalty == pytest.approx(50 * (kept - 0.5) ** 2, rel=0.2), "rows differ a little"


def test_other_trainings_leave_gates_alone(tmp_path):
    """A press trains the model; predictors that it has are neither trained nor lost."""
    model = attach_relevance(tiny_model("llama", num_hidden_layers=2))
    before = [p.detach().clone() for m in relevance_modules(model).values() for p in m.relevance.parameters()]
    press = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
    trainer = trainer_for(tmp_path, model=model, press=press, lora=None)
    trainer.train()
    after = [p for m in relevance_modules(trainer.model).values() for p in m.relevance.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and len(after) == 4
    trainer.save_weights(tmp_path / "final")
    loaded, _ = load_model_from(tmp_path / "final")
    assert has_relevance(loaded)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("lora", [LORA, None])
def test_files_in_another_dtype(tmp_path, lora):
    """Halved files hold the rounded weights; predictors and the model in memory stay as they are."""
    model = attach_relevance(tiny_model("llama", num_hidden_layers=2))
    press = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
    trainer = trainer_for(tmp_path, model=model, press=press, lora=lora)
    trainer.train()
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.save_weights(tmp_path / "final", dtype=torch.bfloat16)
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    saved = load_file(tmp_path / "final" / file)
    assert saved and all(x.dtype == torch.bfloat16 for x in saved.values())
    trained = {name: x for name, x in before.items() if lora is None or "lora_" in name}
    rounded = {name.replace(".default", ""): x.to(torch.bfloat16) for name, x in trained.items()}
    assert len(saved) == len([name for name in rounded if ".relevance." not in name])
    assert all(torch.equal(x, rounded[name]) for name, x in saved.items())
    predictors = load_file(tmp_path / "final" / "relevance.safetensors")
    assert all(x.dtype == torch.float32 for x in predictors.values())
    after = trainer.model.state_dict()
    assert all(torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in after.items())
    if lora is None:
        assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"


def load_model_from(folder: Any) -> Any:
    toy_tokenizer().save_pretrained(folder)
    return load_model(str(folder), dtype="float32", device="cpu")


def test_a_press_brings_its_own_ratio_or_tokens(tmp_path):
    ratio = BlockDropoutPress(block_size=4, keep_ratio=0.6, n_sink=1, recent=3)
    trainer = trainer_for(tmp_path, press=ratio)
    assert trainer.curriculum.ratio(0, 10) == pytest.approx(0.4)
    tokens = trainer_for(tmp_path, press=BlockDropoutPress(block_size=4, tokens=6, n_sink=1, recent=3))
    batch, _ = first_step(tokens)
    kept = tokens.plan(batch, tokens.policy, 0.0).selection.evicted_at
    for row, boundary in enumerate(batch["boundary"].tolist()):
        start = batch["input_ids"].shape[1] - int(batch["attention_mask"][row].sum())
        assert (kept[row, ..., start:boundary] == NEVER).sum(-1).unique().tolist() == [6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing drops entries"),
        ({"press": sparsekv.FullPress(), "lora": LoraOptions(targets=["w_q"])}, "matches no linear layer"),
        ({"press": sparsekv.FullPress(), "lora": None, "model": "frozen"}, "no parameter of the model"),
        ({"press": sparsekv.FullPress(), "train_dataset": [{"id": 1}]}, "neither input_ids nor text"),
    ],
)
def test_what_would_train_nothing_is_refused(given, message, tmp_path):
    if given.get("model") == "frozen":
        given = {**given, "model": tiny_model("llama", num_hidden_layers=1).requires_grad_(False)}
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, **given)


def test_held_out_perplexity_is_that_of_what_follows_the_boundary(tmp_path):
    held_out = samples(5)
    press = sparsekv.SinkRecentPress(n_sink=2)
    curriculum = Listening(start_ratio=0.6)
    heard = curriculum.heard
    trainer = trainer_for(tmp_path, press=press, eval_dataset=held_out, curriculum=curriculum)
    trainer.evaluate()
    assert heard == [], "only training listens"
    trainer.is_in_train = True
    first = trainer.evaluate()
    second = trainer.evaluate()
    assert first["eval_ratio"] == 0.0 and heard[0] == first["eval_perplexity"], "the baseline: full cache"
    assert second["eval_ratio"] == 0.6 and heard[1] == second["eval_perplexity_evicted"]
    assert second["eval_perplexity"] == pytest.approx(first["eval_perplexity"])
    model = tiny_model("llama", num_hidden_layers=2)
    sums = {False: 0.0, True: 0.0}
    count = 0
    for sample in held_out:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        seeds = row_seeds(trainer.args.seed, -1, torch.tensor([sample["sample_index"]]))
        given = torch.tensor([sample["boundary"]])
        (boundary,) = resolve_boundaries(given, torch.ones_like(ids), seeds, "end")
        labels[: boundary + 1] = -100
        kept = max(1, int(boundary * (1 - 0.6)))
        column = torch.arange(ids.shape[1])
        for evicts in (False, True):
            mask = column[None] <= column[:, None]
            if evicts:
                middle = (column >= 2) & (column < boundary - (kept - 2))
                mask = mask & ~(middle[None] & (column[:, None] >= boundary))
            bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
            with torch.no_grad():
                logits = model(ids, attention_mask=bias).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            sums[evicts] += float(loss)
        count += int((labels[1:] != -100).sum())
    assert second["eval_perplexity"] == pytest.approx(math.exp(sums[False] / count), rel=1e-4)
    assert second["eval_perplexity_evicted"] == pytest.approx(math.exp(sums[True] / count), rel=1e-4)
    assert abs(sums[True] - sums[False]) > 1e-2 * sums[False]


def test_a_run_in_python_goes_on_only_from_whole_checkpoints(tmp_path):
    def made(folder: Any = tmp_path) -> SparseKVTrainer:
        press = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
        changes = {"save_strategy": "steps", "save_steps": 1}
        return trainer_for(folder, changes, press=press, objective=StandardLMObjective())

    trainer = made()
    trainer.train()
    wanted = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        made().train()
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    weights = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for broken, reason in (("3", "was not finished"), ("2", "has 100 bytes instead of")):
        with pytest.raises(ConfigError, match=reason):
            made().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{broken}"))
    again = made()
    again.train(resume_from_checkpoint=True)
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == wanted
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        made(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_press_that_keeps_so_many_tokens_has_no_curriculum(tmp_path):
    press = BlockDropoutPress(block_size=2, tokens=6, n_sink=1, recent=2)
    with pytest.raises(
        ConfigError, match="BlockDropoutPress keeps 6 tokens, and curriculum fixed sets a ratio"
    ):
        trainer_for(tmp_path, press=press, curriculum=FixedCurriculum(0.1))
    trainer = trainer_for(tmp_path, {"max_steps": 1}, press=press)
    batch, _ = first_step(trainer)
    plan = trainer.plan(batch, trainer.policy_at(0, 0.0, 0.0), 0.0)
    for row, boundary in enumerate(batch["boundary"].tolist()):
        start = batch["input_ids"].shape[1] - int(batch["attention_mask"][row].sum())
        kept = (plan.selection.evicted_at[row, 0, 0, start:boundary] == NEVER).sum()
        assert kept == min(6, boundary - start)
