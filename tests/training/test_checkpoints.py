"""Checkpoints that were cut short, and what a run leaves on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.training.checkpoints import (
    check_config,
    checkpoint_folder,
    clear,
    damage,
    latest_whole,
    list_checkpoints,
    rotate,
    seal,
    step_of,
)
from sparsekv.training.config import TrainConfig
from sparsekv.training.curricula import AdaptiveCurriculum, FixedCurriculum
from sparsekv.training.output import (
    MetricsLog,
    load_curriculum,
    public_settings,
    read_training_config,
    save_final,
    write_curriculum,
    write_training_config,
)


def config(**changes: Any) -> TrainConfig:
    base = {
        "model": "smollm2",
        "data": {"kind": "text", "seq_len": 256},
        "press": "block_dropout",
        "objective": "standard_lm",
        "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
        "steps": 10,
    }
    return parse_config(TrainConfig, base | changes)


def make(output: Path, step: int) -> Path:
    """A whole checkpoint with a file in a folder of its own."""
    folder = checkpoint_folder(output, step)
    (folder / "shards").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 40 + bytes([step % 256]))
    (folder / "shards" / "rank0.pt").write_bytes(b"rank zero")
    seal(folder)
    return folder


def test_the_latest_whole_one_by_number(tmp_path: Path) -> None:
    assert latest_whole(tmp_path / "none") == (None, {})
    for step in (9, 10, 100, 20):
        make(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    path, skipped = latest_whole(tmp_path)
    assert path is not None and (path.name, step_of(path)) == ("checkpoint-100", 100)
    assert skipped == {}
    with pytest.raises(ConfigError, match="checkpoint-STEP"):
        step_of(tmp_path)


def test_broken_ones_are_skipped_with_the_reason(tmp_path: Path) -> None:
    folders = {step: make(tmp_path, step) for step in (1, 2, 3, 4, 5, 6)}
    weights = folders[2] / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1  # one bit
    weights.write_bytes(data)
    with open(folders[3] / "weights.safetensors", "r+b") as stream:
        stream.truncate(5000)
    (folders[4] / "shards" / "rank0.pt").unlink()
    (folders[5] / "manifest.json").unlink()
    (folders[6] / "manifest.json").write_text('{"format": 1, "fil')
    path, skipped = latest_whole(tmp_path)
    assert path == folders[1]
    assert {each.name: reason for each, reason in skipped.items()} == {
        "checkpoint-6": "its manifest.json cannot be read",
        "checkpoint-5": "it was not finished",
        "checkpoint-4": "shards/rank0.pt is missing",
        "checkpoint-3": "weights.safetensors has 5000 bytes instead of 10241",
        "checkpoint-2": "weights.safetensors is corrupt",
    }
    (folders[1] / "shards" / "rank0.pt").write_bytes(b"rank_zero")
    assert latest_whole(tmp_path).path is None


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    with pytest.raises(ConfigError, match="there and whole"):
        clear(folder)
    (folder / "weights.safetensors").write_bytes(b"")
    clear(folder)
    assert not folder.exists()
    clear(folder)
    # sealing again after a rewrite counts the new files only
    folder = make(tmp_path, 7)
    (folder / "late.bin").write_bytes(b"x")
    seal(folder)
    assert damage(folder) is None
    (folder / "late.bin").write_bytes(b"y")
    assert damage(folder) == "late.bin is corrupt"


def test_rotation_keeps_whole_ones_whatever_their_dates(tmp_path: Path) -> None:
    folders = {step: make(tmp_path, step) for step in (100, 20, 9, 40, 60)}  # 100 is the oldest on the disk
    (folders[60] / "curriculum_state.json").write_text("{}")
    (folders[60] / "manifest.json").unlink()  # killed while it was saved: it must not count
    (folders[40] / "shards" / "rank0.pt").write_bytes(b"cut")
    stale = tmp_path / ".final.partial-abc"
    (stale / "final").mkdir(parents=True)
    (tmp_path / "final").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()  # somebody else's
    removed = rotate(tmp_path, 2)
    assert [path.name for path in removed] == ["checkpoint-9", "checkpoint-40", "checkpoint-60"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-20", "checkpoint-100", "final", "checkpoint-best", "checkpoint-7"}
    assert latest_whole(tmp_path).path == folders[100] and damage(folders[20]) is None
    assert rotate(tmp_path, 2) == []
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        rotate(tmp_path, 0)


def test_rotation_keeps_the_best_one_as_transformers_does(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    assert [step_of(path) for path in rotate(tmp_path, 3, best=1)] == [2], "one of the three"
    assert [step_of(path) for path in rotate(tmp_path, 1, best=1)] == [3], "beside the newest"
    assert rotate(tmp_path, 2, best=4) == [] and len(rotate(tmp_path, 1, best=2)) == 1
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [4], "what is gone protects nothing"


def test_rotation_removes_nothing_while_nothing_is_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        (folder := make(tmp_path, step)).joinpath("manifest.json").unlink()
        (folder / "curriculum_state.json").write_text("{}")
    assert rotate(tmp_path, 1) == [] and len(list_checkpoints(tmp_path)) == 2
    make(tmp_path, 3)
    assert len(rotate(tmp_path, 1)) == 2 and [step_of(p) for p in list_checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, "lr was 0.0002, now 0.001"),
        ({"lora": {"r": 8}}, "lora.r was 64, now 8"),
        ({"steps": 20}, "steps was 10, now 20"),
        (
            {"curriculum": {"name": "fixed", "args": {"ratio": 0.25}}},
            "curriculum.args.ratio was 0.5, now 0.25",
        ),
        ({"press": {"name": "block_dropout", "args": {"block_size": 8}}}, "block_size was None, now 8"),
        ({"data": {"kind": "text", "seq_len": 512}}, "data.seq_len was 256, now 512"),
        ({"seed": 1, "lr": 1e-3}, r"seed was 0, now 1 \(also lr\)"),
        ({"train_model": "full"}, r"train_model was 'lora', now 'full' \(also lora"),
    ],
)
def test_resume_from_another_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = make(tmp_path, 5)
    write_training_config(folder, config())
    check_config(folder, config())
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(folder, config(**changes))
    assert "\n" not in str(caught.value)


def test_what_may_change_between_runs(tmp_path: Path) -> None:
    folder = make(tmp_path, 5)
    with pytest.raises(ConfigError, match="has no training_config"):
        check_config(folder, config())
    write_training_config(folder, config(output_dir=str(tmp_path)))
    check_config(
        folder, config(output_dir="elsewhere", log_every=3, save_every=7, report_to="wandb", device="cpu")
    )


def test_settings_hold_no_path_of_a_machine(tmp_path: Path, toy_model_dir: Path) -> None:
    text = tmp_path / "corpus.txt"
    made = config(
        model=str(toy_model_dir),
        output_dir=str(tmp_path / "run"),
        data={"kind": "text", "path": [str(text), "relative/rows.jsonl"]},
        press={"name": "p", "args": {"table": str(tmp_path / "t.json"), "ratio_of": 1}},
        adapter=str(tmp_path / "first"),
    )
    settings = public_settings(made)
    assert str(tmp_path) not in json.dumps(settings) and str(toy_model_dir) not in json.dumps(settings)
    assert settings["model"] == toy_model_dir.name
    assert settings["data"]["path"] == ["corpus.txt", "relative/rows.jsonl"]
    assert (settings["adapter"], settings["press"]["args"]["table"]) == ("first", "t.json")
    assert public_settings(config())["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    write_training_config(tmp_path, config())
    again = read_training_config(tmp_path)
    assert again.model_copy(update={"model": "smollm2"}) == config()


def test_curriculum_state_survives(tmp_path: Path) -> None:
    curriculum = AdaptiveCurriculum(baseline=10.0)
    for metric in (10.0, 10.1, 99.0):
        curriculum.observe(metric)
    write_curriculum(tmp_path, curriculum)
    fresh = AdaptiveCurriculum(baseline=10.0)
    load_curriculum(tmp_path, fresh)
    assert fresh.state_dict() == curriculum.state_dict()
    assert fresh.ratio(0, 1) == 0.15
    with pytest.raises(ConfigError, match="is of curriculum 'adaptive', not 'fixed'"):
        load_curriculum(tmp_path, FixedCurriculum(0.5))


def test_metrics_repeat_no_row_after_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.start(0)
    for step in (10, 20, 30, 40):
        log.append(step, {"loss": step / 10, "kl": float("nan")})
    assert log.rows()[1] == {"step": 20, "loss": 2.0, "kl": None}
    with open(log.path, "ab") as stream:
        stream.write(b'{"step": 50, "lo')  # killed while writing
    assert [row["step"] for row in log.rows()] == [10, 20, 30, 40]
    log.start(20)
    log.append(30, {"loss": 3.5})
    assert [(row["step"], row["loss"]) for row in log.rows()] == [(10, 1.0), (20, 2.0), (30, 3.5)]
    # a torn line alone is removed too
    with open(log.path, "ab") as stream:
        stream.write(b'{"step')
    log.start(99)
    log.append(31, {})
    assert [row["step"] for row in log.rows()] == [10, 20, 30, 31]


def test_final_appears_when_it_is_whole(tmp_path: Path, toy_tokenizer: Any, toy_model_dir: Path) -> None:
    output = tmp_path / "run"
    made = config(model=str(toy_model_dir), output_dir=str(output))

    def save(folder: Path) -> None:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(toy_model_dir), "r": 64}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "relevance.safetensors").write_bytes(b"predictors")

    def fail(folder: Path) -> None:
        save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_final(
            output, made, save_weights=fail, tokenizer=toy_tokenizer, curriculum=made.make_curriculum()
        )
    assert list(output.iterdir()) == []
    (output / ".final.partial-killed" / "final").mkdir(parents=True)
    log = MetricsLog(output / "metrics.jsonl")
    log.append(10, {"loss": 1.25})
    for _ in range(2):  # the second replaces the first
        final = save_final(
            output, made, save_weights=save, tokenizer=toy_tokenizer, curriculum=made.make_curriculum()
        )
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl", "final"}
    assert {path.name for path in final.iterdir()} >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curriculum_state.json",
        "metrics.jsonl",
        "relevance.safetensors",
        "tokenizer.json",
        "training_config.json",
    }
    adapter = json.loads((final / "adapter_config.json").read_text())
    assert adapter == {"peft_type": "LORA", "base_model_name_or_path": toy_model_dir.name, "r": 64}
    for path in final.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(tmp_path).encode() not in content, path
            assert str(toy_model_dir.parent).encode() not in content, path
    assert "| loss | 1.25 | 10 |" in (final / "README.md").read_text()
