"""`sparsekv relevance fit` as a command: what it prints, one-line errors, kill -9, and the evaluation of its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsekv.cli.main import app, call
from toy import save_toy_model
from training import forked_cli
from training.fit_runs import fit_settings, rows_of, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy", num_hidden_layers=2)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    text = write_text(tmp_path / "text.jsonl")
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(fit_settings(model, text, tmp_path / "run")))
    return path


def test_a_fit_and_the_evaluation_of_its_folder(
    config: Path, model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictors alone are what an evaluation's `adapter` may be, beside the plain model as another variant."""
    assert call(app, "sparsekv", ["relevance", "fit", str(config), "steps=4"]) == 0
    said = capsys.readouterr().out.splitlines()
    final = tmp_path / "run" / "final"
    assert (
        said[0] == f"{final}: README.md, fit_config.json, held_out.json, metrics.jsonl, relevance.safetensors"
    )
    report = json.loads((final / "held_out.json").read_text())
    assert said[1].startswith(
        f"held-out rank correlation {report['fitted']['model']:.2f} over the whole model, "
    ) and said[1].endswith(f"(untrained {report['untrained']['model']:.2f}), 6 samples")

    settings = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "benchmarks": [{"name": "local", "path": str(toy_data)}],
        "methods": ["full"],
        "compression_ratios": [0.5],
        "output_dir": str(tmp_path / "out"),
        "progress": False,
        "variants": [
            {"name": "base"},
            {
                "name": "fitted",
                "adapter": str(final),
                "methods": [{"name": "relevance", "budget_scope": "model"}],
            },
        ],
    }
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert call(app, "sparsekv", ["eval", str(path)]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "fitted" / "results.jsonl").read_text().splitlines()
    ]
    assert {row["method"] for row in rows} == {"relevance"}
    assert all(abs(row["achieved_compression"] - 0.5) < 0.02 for row in rows)


def test_the_config_in_the_folder_runs_again(config: Path, model: Path, tmp_path: Path) -> None:
    assert call(app, "sparsekv", ["relevance", "fit", str(config), "steps=3"]) == 0
    final = tmp_path / "run" / "final"
    files = [f"model={model}", f"data.path={tmp_path / 'text.jsonl'}", f"output_dir={tmp_path / 'again'}"]
    assert call(app, "sparsekv", ["relevance", "fit", str(final / "fit_config.json"), *files]) == 0
    one, other = (
        load_file(folder / "relevance.safetensors") for folder in (final, tmp_path / "again" / "final")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


MISTAKES = {
    "key": (["stepz=4"], "unknown key 'stepz' (did you mean 'steps'?)"),
    "loss": (
        ["regression.loss=mes"],
        "regression.loss: input should be 'mse', 'bce' or 'ranking', got 'mes'",
    ),
    "feature": (["predictor.features=[hiden]"], "unknown feature group 'hiden' (did you mean 'hidden'?)"),
    "family": (
        ["data={kind: selfsup, families: {recal: 1}}"],
        "unknown family 'recal' (did you mean 'recall'?)",
    ),
    "model": (["model=smolm2"], "did you mean 'smollm2'?"),
    "start": (["start_from=no-such"], "no-such"),
    "training": (["way=end_to_end", "end_to_end.curriculum=liner"], "end_to_end.curriculum"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = MISTAKES[name]
    capsys.readouterr()
    assert call(app, "sparsekv", ["relevance", "fit", str(config), *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run" / "final").exists()


def test_a_missing_file_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(app, "sparsekv", ["relevance", "fit", "no-such.yaml"]) == 2
    assert "no-such.yaml" in capsys.readouterr().err
    assert call(app, "sparsekv", ["relevance", "fti", "x.yaml"]) == 2


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom sparsekv.cli.main import app, call\n"
        "assert call(app, 'sparsekv', ['relevance', 'fit', '--help']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "configs/relevance/smollm2_regression.yaml" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(config: Path, tmp_path: Path) -> None:
    """Killed at whatever it was doing: the weights are those of a run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = ["save_every=3", "log_every=1", "steps=12"]
    process = forked_cli.start(
        ["relevance", "fit", str(config), *changes, f"output_dir={whole}"], tmp_path / "a.log"
    )
    said = forked_cli.finish(process, tmp_path / "a.log")
    assert said.startswith("exit 0"), said

    def has_row(step: int) -> bool:
        path = killed / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()

    arguments = ["relevance", "fit", str(config), *changes, f"output_dir={killed}"]
    for step in (7,):
        process = forked_cli.start(arguments, tmp_path / "b.log")
        assert forked_cli.kill_when(process, lambda step=step: has_row(step)), "it ended before it was killed"
    process = forked_cli.start([*arguments, "progress=true"], tmp_path / "b.log")
    said = forked_cli.finish(process, tmp_path / "b.log")
    assert said.startswith("exit 0") and "going on from" in said, said
    one, other = (load_file(folder / "final" / "relevance.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert rows_of(whole / "final") == rows_of(killed / "final")
