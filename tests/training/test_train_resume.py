"""Runs that are killed with SIGKILL at random moments, again and again, end exactly as one that was left alone."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from toy import save_toy_model
from training import forked_cli

STEPS = 16
TEXT = (
    "The quick fox {i} jumps over {j} lazy dogs. Then it sleeps, and dreams of hens; there were {k} of them. "
)

PRESS = {
    "press": {"name": "block_dropout", "args": {"block_size": 4, "n_sink": 1, "n_recent": 3}},
    "objective": {"name": "eit"},
    "curriculum": {"name": "linear", "args": {"start_ratio": 0.0, "end_ratio": 0.6, "warmup_steps": 0.7}},
    "lora": {"r": 2, "alpha": 4, "dropout": 0.2},  # its masks come from the global random state
}
ADAPTIVE = {
    "press": {"name": "eviction_aug", "args": {"presses": ["knorm", "h2o"]}},
    "press_share": 0.3,
    "relevance": {"enabled": True, "bias": 0.5, "threshold": "quantile", "n_sink": 1, "n_recent": 3},
    "objective": {"name": "eit", "lambda_kl": 0.5},
    "curriculum": {"name": "adaptive", "args": {"start_ratio": 0.3, "tolerance": 0.02, "step": 0.1}},
    "held_out": 3,
    "eval_every": 2,
    "lora": {"r": 2, "alpha": 4},
    "log_every": 3,  # save_every is no multiple of it
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [{"text": TEXT.format(i=i, j=i * i, k=7 * i + 3)} for i in range(24)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(model, text, tmp_path):
    def write(changes) -> Path:
        settings = {
            "model": str(model),
            "dtype": "float32",
            "device": "cpu",
            "seed": 5,
            "data": {"kind": "text", "path": str(text), "seq_len": 48, "min_tokens": 16},
            "steps": STEPS,
            "batch_size": 2,
            "accumulation": 2,
            "lr": 0.01,
            "save_every": 2,
            "log_every": 1,
            **changes,
        }
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def rows_of(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    found = []
    for line in path.read_text().split("\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    files = sorted((output / "final").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def inode(output: Path) -> int:
    """Of metrics.jsonl: every start writes it anew."""
    path = output / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def has_reached(output: Path, step: int, *, unlike: int) -> bool:
    return inode(output) not in (0, unlike) and any(row["step"] >= step for row in rows_of(output))


def untimed(output: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows_of(output)]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "kills"), [(PRESS, 5), (ADAPTIVE, 5)], ids=["linear", "adaptive"])
def test_killed_runs_end_as_the_uninterrupted_one(changes, kills, config, tmp_path):
    path, whole, killed = config(changes), tmp_path / "whole", tmp_path / "killed"
    process = forked_cli.start(["train", str(path), f"output_dir={whole}"], tmp_path / "whole.log")
    said = forked_cli.finish(process, tmp_path / "whole.log")
    assert said.startswith("exit 0"), said

    draw = random.Random(
        int.from_bytes(str(tmp_path).encode(), "big")
    )  # another one in every run of the tests
    moments = sorted(draw.sample(range(1, STEPS), kills))
    arguments = ["train", str(path), f"output_dir={killed}"]
    for number, step in enumerate(moments):
        log, old = tmp_path / f"killed-{number}.log", inode(killed)
        process = forked_cli.start(arguments, log)
        reached = functools.partial(has_reached, killed, step, unlike=old)
        assert forked_cli.kill_when(process, reached, draw.uniform(0, 0.15)), log.read_text()
        assert not (killed / "final").exists()
    process = forked_cli.start(arguments, tmp_path / "last.log")
    said = forked_cli.finish(process, tmp_path / "last.log")
    assert said.startswith("exit 0") and "going on from" in said, said

    assert untimed(killed) == untimed(whole), f"killed at {moments}"
    weights, resumed = weights_of(whole), weights_of(killed)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    assert all(value.abs().max() > 1e-3 for name, value in weights.items() if "lora_B" in name)
    assert any(name.endswith("score.weight") for name in weights) == ("relevance" in changes)
    states = [(folder / "final" / "curriculum_state.json").read_text() for folder in (whole, killed)]
    assert states[0] == states[1]
    ratios = {row["requested_compression"] for row in rows_of(whole) if "requested_compression" in row}
    assert len(ratios) > 3, "the curriculum must have moved"

    said = forked_cli.finish(forked_cli.start(arguments, tmp_path / "again.log"), tmp_path / "again.log")
    assert said.startswith("exit 0"), said
    again = weights_of(killed)
    assert all(torch.equal(value, again[name]) for name, value in weights.items()), "finished is finished"
    assert not (killed / f"checkpoint-{STEPS + 1}").exists() and untimed(killed) == untimed(whole)
    left = "".join(path.read_text(errors="replace") for path in killed.rglob("*.json"))
    left += "".join(path.read_text() for path in killed.rglob("*.md"))
    assert str(tmp_path) not in left and not list(killed.rglob("training_args.bin")), (
        "no path of this machine"
    )
