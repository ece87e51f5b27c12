"""`sparsekv train` for real, on a toy model: what it writes, what it refuses, what it falls back to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsekv.cli.main import app, call
from sparsekv.models import load_model
from toy import save_toy_model

LINE = (
    "The quick fox {i} jumps over {j} lazy dogs. Then it sleeps, and dreams of hens; there were {k} of them. "
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy-base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [{"text": LINE.format(i=i, j=i * i, k=7 * i + 3)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(model: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """`config(**changes)`: a config file of a run of 4 steps; None takes a key out."""

    def write(**changes: Any) -> Path:
        settings = {
            "model": str(model),
            "dtype": "float32",
            "device": "cpu",
            "output_dir": str(tmp_path / "run"),
            "data": {"kind": "text", "path": str(text), "seq_len": 48, "min_tokens": 16},
            "press": {"name": "block_dropout", "args": {"block_size": 4, "n_sink": 1, "n_recent": 3}},
            "objective": "standard_lm",
            "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
            "steps": 4,
            "lr": 0.01,
            "lora": {"r": 2, "alpha": 4},
            "save_every": 2,
            "log_every": 1,
            **changes,
        }
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    code = call(app, "sparsekv", ["train", str(path)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


BEFORE_THE_MODEL = {
    "press": ({"press": "block_droput"}, "unknown press 'block_droput' (did you mean 'block_dropout'?)"),
    "press argument": (
        {"press": {"name": "block_dropout", "args": {"blok_size": 4}}},
        "unknown argument of BlockDropoutPress 'blok_size' (did you mean 'block_size'?)",
    ),
    "press value": (
        {"press": {"name": "block_dropout", "args": {"block_size": 0}}},
        "block_size must be a whole number >= 1, got 0",
    ),
    "press of presses": (
        {"press": {"name": "eviction_aug", "args": {"presses": ["snapvk"]}}},
        "did you mean 'snapkv'?",
    ),
    "sparsity": (
        {"press": {"name": "sparse_reg", "args": {"kind": "entropi"}}},
        "did you mean 'entropy'?",
    ),
    "sparsity argument": (
        {"press": {"name": "sparse_reg", "args": {"wieght": 1}}},
        "did you mean 'weight'?",
    ),
    "method": ({"press": None, "method": "knrom"}, "unknown method 'knrom' (did you mean 'knorm'?)"),
    "method that runs the model": ({"press": None, "method": "kvzip"}, "can't be trained under"),
    "objective": ({"objective": "eti"}, "unknown objective 'eti' (did you mean 'eit'?)"),
    "objective argument": (
        {"objective": {"name": "reconstruction", "args": {"spam": 9}}},
        "unknown argument of objective reconstruction 'spam' (did you mean 'span'?)",
    ),
    "objective of a mix": (
        {"objective": {"name": "mixed", "weights": {"eit": 1, "standard": 1}}},
        "unknown objective 'standard' (did you mean 'standard_lm'?)",
    ),
    "curriculum": ({"curriculum": {"name": "liner"}}, "did you mean 'linear'?"),
    "curriculum of 1": (
        {"curriculum": {"name": "linear", "args": {"end_ratio": 1.0, "warmup_steps": 2}}},
        "end_ratio must be in [0, 1)",
    ),
    "curriculum below 0": ({"curriculum": {"name": "fixed", "args": {"ratio": -0.1}}}, "must be in [0, 1)"),
    "short sequences": (
        {"press": {"name": "block_dropout", "args": {"n_sink": 4, "n_recent": 64}}},
        "sequences of 48 tokens are no longer than the 68 sink and recent tokens",
    ),
    "optimizer": (
        {"optimizer": "adamw_troch"},
        "unknown optimizer 'adamw_troch' (did you mean 'adamw_torch'?)",
    ),
    "report_to": ({"report_to": ["tensorbord"]}, "report_to 'tensorbord'"),
}


@pytest.mark.parametrize("name", BEFORE_THE_MODEL)
def test_mistakes_that_are_told_before_the_model_is_loaded(
    name: str,
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model's weights were loaded first")

    monkeypatch.setattr("sparsekv.training.build.load_model", load)
    changes, message = BEFORE_THE_MODEL[name]
    assert message in refused(config(**changes), capsys)


def test_mistakes_that_only_the_model_or_the_data_show(
    config: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"lora": {"targets": ["q_prj"]}}
    error = refused(config(**missing), capsys)
    assert "lora.targets: 'q_prj' matches no linear layer of the model (did you mean 'q_proj'?)" in error
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n{"text": ""}\n')
    data = {"kind": "text", "path": str(short), "seq_len": 48, "min_tokens": 16}
    error = refused(config(data=data), capsys)
    assert "no usable row in" in error and "1 x shorter than min_tokens, 16" in error
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"context": "a", "question": "b"}\n')
    assert "answer" in refused(config(data={"kind": "qa", "path": str(rows), "seq_len": 48}), capsys)
    error = refused(config(held_out=500, eval_every=2), capsys)
    assert "held_out 500 leaves nothing" in error
    assert "no-such" in refused(config(model=str(tmp_path / "no-such")), capsys)
    assert "no-such" in refused(config(adapter=str(tmp_path / "no-such")), capsys)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


def run(path: Path, *overrides: str) -> None:
    assert call(app, "sparsekv", ["train", str(path), *overrides]) == 0


def test_a_run_its_files_and_its_checkpoints(
    config: Callable[..., Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run; then resumes that are refused, and ones that fall back."""
    path, output = config(), tmp_path / "run"
    run(path)
    final = output / "final"
    names = {file.name for file in final.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "training_config.json",
        "curriculum_state.json",
        "metrics.jsonl",
        "README.md",
    } <= names
    assert "relevance.safetensors" not in names
    for file in final.iterdir():
        assert (
            str(tmp_path).encode() not in file.read_bytes() and str(model).encode() not in file.read_bytes()
        )
    rows = [json.loads(line) for line in (final / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["requested_compression"] == 0.5 for row in rows)
    assert all(0.4 < row["achieved_compression"] <= 0.55 for row in rows)
    assert all(0 < row["retained_attention"] < 1 and row["tokens_per_s"] > 0 for row in rows)

    # the adapter does what was trained
    base, _ = load_model(str(model), dtype="float32", device="cpu")
    trained, _ = load_model(str(model), adapter=final, dtype="float32", device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (base(ids).logits - trained(ids).logits).abs().max()
    assert difference > 1e-3
    weights = load_file(final / "adapter_model.safetensors")

    # another config may not go on from these checkpoints
    assert "is of another config: lr was 0.01, now 0.02" in refused(config(lr=0.02), capsys)
    assert "resume is false" in refused(config(resume=False), capsys)

    # the newest checkpoint is broken in some way: the one before it is taken, and this is said
    breaks: dict[str, Callable[[Path], None]] = {
        "was not finished": lambda folder: (folder / "manifest.json").unlink(),
        "bytes instead of": lambda folder: truncate(folder / "adapter_model.safetensors"),
        "optimizer.pt is corrupt": lambda folder: flip(folder / "optimizer.pt"),
        "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    }
    config()
    for reason, damage in breaks.items():
        damage(output / "checkpoint-4")
        shutil.rmtree(final)
        capsys.readouterr()
        run(path)
        said = capsys.readouterr().err
        assert "checkpoint-4 is passed over: " in said and reason in said and "going on from" in said
        again = load_file(final / "adapter_model.safetensors")
        assert all(torch.equal(weights[name], again[name]) for name in weights)
    # nothing whole is left: it starts anew, says so even where nothing else is said, and ends the same
    for step in (2, 4):
        truncate(output / f"checkpoint-{step}" / "optimizer.pt")
    capsys.readouterr()
    run(path, "progress=false")
    said = capsys.readouterr().err
    assert said.count("is passed over") == 2 and "going on from" not in said
    again = load_file(final / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
