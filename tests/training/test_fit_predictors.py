"""`sparsekv relevance fit` on a toy model: it learns, refuses what is wrong; its folder is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsekv.errors import ConfigError
from sparsekv.models import load_model
from sparsekv.relevance.files import load_relevance
from sparsekv.relevance.predictor import served_of
from sparsekv.training.checkpoints import list_checkpoints, seal
from sparsekv.training.fit import run_fit
from sparsekv.training.fit_config import FitConfig, load_fit_config
from sparsekv.training.fit_report import at_percent
from training.fit_runs import rows_of

Make = Callable[..., FitConfig]


FEATURED = {"n_sink": 1, "n_recent": 3, "features": ["hidden", "attention", "handcrafted"]}

WAYS = {
    "mse": {},
    "mlp": {"predictor": {"n_sink": 1, "n_recent": 3, "width": 8}},
    "bce": {"regression": {"loss": "bce"}},
    "ranking": {"regression": {"loss": "ranking", "pairs": 512}},
    "least squares": {"regression": {"solver": "least_squares"}},
    "features": {"predictor": FEATURED},
    "least squares of features": {"predictor": FEATURED, "regression": {"solver": "least_squares"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls_and_held_out_ranks_come_nearer(way: str, fit_run: Make, tmp_path: Path) -> None:
    found = run_fit(fit_run(**WAYS[way]))
    rows = rows_of(found.folder)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert rows[-1]["loss"] < (0.9 if way in ("bce", "ranking") else 0.75) * rows[0]["loss"]
    fitted, untrained = found.report["fitted"], found.report["untrained"]
    assert found.report["samples"] == 6
    assert abs(untrained["model"]) < 0.35, "predictors that were fitted on nothing know nothing"
    assert fitted["model"] > max(0.3, untrained["model"] + 0.2)
    assert set(fitted["layers"]) == {"0", "1"}
    for layer, value in fitted["layers"].items():
        assert value > untrained["layers"][layer] + 0.1
    assert fitted["kept"]["0.7"] > untrained["kept"]["0.7"] + 0.1
    assert json.loads((found.folder / "held_out.json").read_text()) == found.report


def test_what_a_run_leaves_and_how_it_is_served(fit_run: Make, fit_model: Path, tmp_path: Path) -> None:
    from sparsekv import Budget, compress

    found = run_fit(fit_run())
    names = {file.name for file in found.folder.iterdir()}
    assert names == {
        "relevance.safetensors",
        "fit_config.json",
        "held_out.json",
        "metrics.jsonl",
        "README.md",
    }
    for file in found.folder.iterdir():
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and str(fit_model).encode() not in content
    card = (found.folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: toy\n")
    assert f"| whole model | {found.report['fitted']['model']:.2f} |" in card
    assert [path.name for path in list_checkpoints(found.folder.parent)] == ["checkpoint-20", "checkpoint-16"]

    plain, _ = load_model(str(fit_model), dtype="float32", device="cpu")
    served, _ = load_model(str(fit_model), adapter=found.folder, dtype="float32", device="cpu")
    for name, value in plain.state_dict().items():
        assert torch.equal(served.state_dict()[name], value), "the model is as it was"
    assert (served_of(served).n_sink, served_of(served).n_recent, served_of(served).threshold) == (1, 3, 0.0)
    ids = torch.tensor([[3 + (7 * i) % 200 for i in range(60)]])
    cache = compress(served, ids, "relevance", Budget(compression_ratio=0.5, scope="model"))
    assert cache.achieved_compression[0] == pytest.approx(0.5, abs=0.02)


def test_zero_is_where_the_ratio_to_serve_is_on_held_out_contexts(fit_run: Make) -> None:
    for ratio in (0.5, 0.9):
        found = run_fit(
            fit_run(
                predictor={"n_sink": 1, "n_recent": 3, "serve_ratio": ratio},
                output=Path(fit_run().output_dir) / str(ratio),
            )
        )
        assert found.report["quantiles"][str(round(100 * ratio))] == 0.0
        assert found.report["quantiles"]["0"] < 0 < found.report["quantiles"]["100"]


def test_a_ratio_between_whole_percents_is_served_as_such() -> None:
    known = {str(percent): float(percent**2) for percent in range(101)}
    assert at_percent(known, 70.0) == 4900
    assert at_percent(known, 70.5) == (4900 + 5041) / 2
    assert 9801 < at_percent(known, 99.5) < 10_000, "not the greatest score: something stays"
    assert at_percent(known, 0.0) == 0 and at_percent(known, 100.0) == 10_000


# ---- end to end --------------------------------------------------------------------------------------------------


def test_end_to_end_is_the_training_room_without_touching_the_model(
    fit_run: Make, fit_model: Path, tmp_path: Path
) -> None:
    """From a regression's predictors: they are where it starts, and the trainer moves them."""
    first = run_fit(fit_run(output=tmp_path / "first"))
    settings = {
        "way": "end_to_end",
        "end_to_end": {"curriculum": {"name": "fixed", "args": {"ratio": 0.5}}, "threshold": "quantile"},
        "start_from": str(first.folder),
        "steps": 4,
        "lr": 1e-3,
        "save_every": 2,
        "log_every": 1,
    }
    found = run_fit(fit_run(**settings))
    names = {file.name for file in found.folder.iterdir()}
    assert {
        "relevance.safetensors",
        "fit_config.json",
        "held_out.json",
        "metrics.jsonl",
        "README.md",
    } == names
    start, end = (load_file(run.folder / "relevance.safetensors") for run in (first, found))
    moved = max(float((start[name] - end[name]).abs().max()) for name in start)
    assert 1e-5 < moved < 0.1
    rows = rows_of(found.folder)
    assert [row["kl"] > 0 for row in rows if "kl" in row] == [True] * 4
    assert any("eval_perplexity_evicted" in row for row in rows)
    assert found.report["fitted"]["model"] > found.report["untrained"]["model"] + 0.2
    served, _ = load_model(str(fit_model), dtype="float32", device="cpu")
    load_relevance(served, found.folder)
    assert served_of(served).n_recent == 3
    again = run_fit(fit_run(**settings))
    assert again.report == found.report, "a finished run stays what it was"


def test_end_to_end_reads_features_too(fit_run: Make) -> None:
    found = run_fit(fit_run(way="end_to_end", predictor=FEATURED, steps=2, save_every=2))
    weights = load_file(found.folder / "relevance.safetensors")
    assert any(".extra." in name for name in weights)
    assert set(found.report["fitted"]["layers"]) == {"0", "1"}


CONFIGS = Path(__file__).parents[2] / "configs" / "relevance"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_that_come_along(path: Path) -> None:
    """They are valid, and begin with the command that runs them."""
    assert path.read_text().startswith(f"# sparsekv relevance fit configs/relevance/{path.name}\n")
    found = load_fit_config(path)
    assert found.model == "smollm2"
    assert found.output_dir == f"output/relevance_{path.stem.removeprefix('smollm2_')}"


# ---- mistakes ----------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "way": ({"way": "regresion"}, "way"),
    "key": ({"regresion": {}}, "unknown key 'regresion' (did you mean 'regression'?)"),
    "key inside": ({"regression": {"los": "mse"}}, "unknown key 'los' in regression (did you mean 'loss'?)"),
    "feature": (
        {"predictor": {"features": ["hidden", "atention"]}},
        "unknown feature group 'atention' (did you mean 'attention'?); allowed: hidden, attention, handcrafted",
    ),
    "other way": ({"end_to_end": {"noise": 0.1}}, "end_to_end is given, but way is 'regression'; give one"),
    "loss of least squares": (
        {"regression": {"solver": "least_squares", "loss": "bce"}},
        "solver 'least_squares' minimises loss 'mse', got loss 'bce'",
    ),
    "width of least squares": (
        {"regression": {"solver": "least_squares"}, "predictor": {"width": 8}},
        "needs linear predictors (width 0), got width 8",
    ),
    "lr of least squares": (
        {"regression": {"solver": "least_squares"}, "lr": 0.1},
        "lr is of no use to solver 'least_squares'",
    ),
    "short": (
        {"predictor": {"n_sink": 4, "n_recent": 60}},
        "sequences of 64 tokens are no longer than the 64 sink and recent tokens",
    ),
    "warmup": ({"warmup": 20}, "warmup must be less than steps 20, got 20"),
    "ratio": ({"predictor": {"serve_ratio": 1.0}}, "must be in [0, 1)"),
    "nothing held out": ({"held_out": 0}, "held_out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_config(name: str, fit_run: Make) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        fit_run(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_that_only_data_and_model_show(fit_run: Make, fit_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="held_out 500 leaves nothing"):
        run_fit(fit_run(held_out=500))
    with pytest.raises(ConfigError, match=r"no-such.*cannot be read"):
        run_fit(fit_run(start_from=str(tmp_path / "no-such")))
    other = run_fit(fit_run(predictor={"width": 4, "n_sink": 1, "n_recent": 3}, steps=1))
    with pytest.raises(ConfigError, match="has predictors of width 4, the config asks for 0"):
        run_fit(fit_run(start_from=str(other.folder), output=tmp_path / "next"))
    foreign = tmp_path / "foreign"
    (foreign / "checkpoint-3").mkdir(parents=True)

    (foreign / "checkpoint-3" / "weights").write_text("x")
    seal(foreign / "checkpoint-3")
    with pytest.raises(ConfigError, match=r"is not of `sparsekv relevance fit`"):
        run_fit(fit_run(output=foreign))


def test_several_processes_are_refused(fit_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        run_fit(fit_run())


def test_activations_that_are_not_finite_are_told(fit_run: Make, fit_model: Path, tmp_path: Path) -> None:
    broken, tokenizer = load_model(str(fit_model), dtype="float32", device="cpu")
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    folder = tmp_path / "broken"
    broken.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ConfigError, match=r"the loss of step 1 is nan: the model's activations are not finite"
    ):
        run_fit(fit_run(model=str(folder)))
