"""`sparsekv train` and `sparsekv merge` as commands: exit codes, one-line errors, what Ctrl-C leaves.

The trainer itself is replaced by a stand-in here; tests/training has the real one.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv.cli.main import app, call, train_alias_app
from sparsekv.errors import ConfigError
from sparsekv.training.checkpoints import seal
from sparsekv.training.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    settings = {
        "model": "smollm2",
        "data": {"kind": "text", "seq_len": 256},
        "press": "block_dropout",
        "objective": "standard_lm",
        "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
        "steps": 10,
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


Training = Callable[[TrainConfig, Callable[[str], None]], None]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Training], None]:
    """`trainer(function)`: what `run_training(config, progress=..., warn=...)` does instead of training."""

    def put(function: Training) -> None:
        module: Any = types.ModuleType("sparsekv.training.build")
        module.run_training = lambda config, progress, warn: function(config, progress)
        monkeypatch.setitem(sys.modules, "sparsekv.training.build", module)

    return put


def finish(config: TrainConfig, progress: Callable[[str], None]) -> None:
    progress(f"step {config.steps} of {config.steps}")
    final = Path(config.output_dir) / "final"
    final.mkdir(parents=True)
    (final / "README.md").write_text("# Card\n")


def test_train_runs_the_config_with_overrides(
    config: Path, trainer: Callable[[Training], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[TrainConfig] = []

    def run(config: TrainConfig, progress: Callable[[str], None]) -> None:
        seen.append(config)
        finish(config, progress)

    trainer(run)
    assert call(app, "sparsekv", ["train", str(config), "steps=3", "lora.r=8"]) == 0
    assert seen[0].steps == 3 and seen[0].lora is not None and seen[0].lora.r == 8
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'run' / 'final'}: README.md\n"
    assert shown.err == "step 3 of 3\n"
    assert (
        call(train_alias_app, "sparsekv-train", ["--config", str(config), f"output_dir={tmp_path / 'b'}"])
        == 0
    )
    assert seen[1].steps == 10 and (tmp_path / "b" / "final").is_dir()


def test_only_the_first_process_speaks(
    config: Path,
    trainer: Callable[[Training], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(finish)
    monkeypatch.setenv("RANK", "1")
    assert call(app, "sparsekv", ["train", str(config)]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_is_passed_over_is_told_without_progress_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: TrainConfig, progress: Callable[[str], None], warn: Callable[[str], None]) -> None:
        warn("checkpoint-4 is passed over")
        finish(config, progress)

    module: Any = types.ModuleType("sparsekv.training.build")
    module.run_training = run
    monkeypatch.setitem(sys.modules, "sparsekv.training.build", module)
    assert call(app, "sparsekv", ["train", str(config), "progress=false"]) == 0
    assert capsys.readouterr().err == "checkpoint-4 is passed over\n"
    monkeypatch.setenv("RANK", "1")
    assert (
        call(app, "sparsekv", ["train", str(config), "progress=false", f"output_dir={config.parent / 'b'}"])
        == 0
    )
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "unknown key 'stpes' (did you mean 'steps'?)"),
        (["curriculum.args.ratio=1.0"], "ratio must be in [0, 1)"),
        (["press.args.n_recent=400"], "override"),
        (["steps"], "override 'steps' is not of the form key=value"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(app, "sparsekv", ["train", str(config), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_mistake_found_while_training(
    config: Path, trainer: Callable[[Training], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: TrainConfig, progress: Callable[[str], None]) -> None:
        raise ConfigError("unknown press 'block_droput'")

    trainer(run)
    assert call(app, "sparsekv", ["train", str(config)]) == 2
    assert capsys.readouterr().err == "error: unknown press 'block_droput'\n"
    assert call(app, "sparsekv", ["train", "no-such.yaml"]) == 2
    assert "config file 'no-such.yaml' does not exist" in capsys.readouterr().err


def test_ctrl_c_names_the_last_whole_checkpoint(
    config: Path, trainer: Callable[[Training], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: TrainConfig, progress: Callable[[str], None]) -> None:
        raise KeyboardInterrupt

    trainer(stop)
    assert call(app, "sparsekv", ["train", str(config), "steps=7"]) == 130
    error = capsys.readouterr().err
    assert "nothing is kept" in error and f"To start again: sparsekv train {config} steps=7" in error
    for step in (4, 6):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w")
        if step == 4:
            seal(folder)  # the run was stopped while it wrote the one of step 6
    assert call(app, "sparsekv", ["train", str(config), "steps=7"]) == 130
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'checkpoint-4'} is kept" in error
    assert f"To go on from there: sparsekv train {config} steps=7" in error


def test_merge_command(tmp_path: Path, toy_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "merged"
    assert call(app, "sparsekv", ["merge", str(toy_model_dir), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert (target / "model.safetensors").is_file()
    assert call(app, "sparsekv", ["merge", str(toy_model_dir), "--output", str(target)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert call(app, "sparsekv", ["merge", str(tmp_path / "none"), "-o", str(tmp_path / "x")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "merge"])
def test_help_is_light(command: str) -> None:
    code = (
        f"import sys; from sparsekv.cli.main import app, call; call(app, 'sparsekv', [{command!r}, '-h']);"
        "print('HEAVY', sorted({'torch', 'transformers', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: sparsekv" in done.stdout and done.stdout.endswith("HEAVY []\n")
