"""Predictors that are served as a mean of what training began with and what it ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsekv.errors import ConfigError
from sparsekv.relevance import RELEVANCE_FILE, attach_relevance, load_relevance, save_relevance
from sparsekv.relevance.predictor import NAME, RelevanceConfig, relevance_modules, served_of
from sparsekv.training import FixedCurriculum, SparseKVTrainer
from sparsekv.training.averaging import averaged, measured_quantiles, predictor_weights
from sparsekv.training.checkpoints import check_settings
from sparsekv.training.config import TrainConfig
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.samples import StreamedSamples
from toy import tiny_model
from training.toy_trainer import trainer_for

RATIO = 0.5


def given(**changes: Any) -> dict[str, Any]:
    """What a trainer of predictors that a model came with is given."""
    settings = {"share": 0.5, "threshold": "quantile", "config": RelevanceConfig(), **changes}
    return {
        "model": attach_relevance(tiny_model("llama", num_hidden_layers=2), settings["config"]),
        "relaxation": Relaxation(n_sink=1, n_recent=3, threshold=settings["threshold"]),
        "curriculum": FixedCurriculum(RATIO),
        "relevance_lr": 0.5,
        "relevance_start_share": settings["share"],
    }


def trained(folder: Path, *, share: float, threshold: Any = "quantile") -> SparseKVTrainer:
    """A trainer whose predictors have moved far from where they began."""
    trainer = trainer_for(folder, **given(share=share, threshold=threshold))
    trainer.train()
    return trainer


@pytest.fixture
def moved(tmp_path) -> SparseKVTrainer:
    return trained(tmp_path / "run", share=0.75)


def flat(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"layers.{index}.{name}": value
        for index, state in predictor_weights(model).items()
        for name, value in state.items()
    }


def test_scores_of_linear_predictors_are_averaged_within_the_context_alone() -> None:
    model = attach_relevance(tiny_model("llama", num_hidden_layers=2), seed=1)
    start = predictor_weights(attach_relevance(tiny_model("llama", num_hidden_layers=2), seed=2))
    predictors = {index: getattr(module, NAME) for index, module in relevance_modules(model).items()}
    hidden = torch.randn(2, 5, model.config.hidden_size)

    def scores() -> dict[int, torch.Tensor]:
        return {index: predictor(hidden).detach() for index, predictor in predictors.items()}

    before = scores()
    with averaged(model, start, 1.0):
        begun = scores()
    with averaged(model, start, 0.25):
        found = scores()
    after = scores()
    for index in before:
        assert (before[index] - begun[index]).abs().max() > 0.05
        assert torch.allclose(found[index], 0.25 * begun[index] + 0.75 * before[index], atol=1e-5)
        assert torch.equal(after[index], before[index])


def test_what_is_written_is_the_mean_and_training_goes_on_from_its_own(moved, tmp_path) -> None:
    before = flat(moved.model)
    moved.save_weights(tmp_path)
    moved.save_model(str(tmp_path / "checkpoint"))
    written, own = load_file(tmp_path / RELEVANCE_FILE), load_file(tmp_path / "checkpoint" / RELEVANCE_FILE)
    start = {
        f"layers.{index}.{name}": value
        for index, state in moved.relevance_start.items()
        for name, value in state.items()
    }
    assert written.keys() == before.keys() == own.keys()
    for name, value in before.items():
        assert (value - start[name]).abs().max() > 0.1
        assert torch.allclose(written[name], 0.75 * start[name] + 0.25 * value, atol=1e-6)
        assert torch.equal(own[name], value), "checkpoints hold what goes on training"
        assert torch.equal(flat(moved.model)[name], value)


def test_the_threshold_is_that_of_the_averaged_scores(moved, tmp_path) -> None:
    """Where nobody gives a ratio, as much stays as the ratio that was trained says."""
    moved.save_weights(tmp_path)
    model = moved.accelerator.unwrap_model(moved.model)
    served = served_of(load_relevance(model, tmp_path))
    found = measured_quantiles(moved, moved.train_dataset)
    assert found is not None
    values = torch.tensor(found.state_dict()["values"])
    assert abs(float((values > served.threshold).float().mean()) - (1 - RATIO)) < 0.03
    assert (served.n_sink, served.n_recent) == (1, 3)
    with averaged(model, moved.relevance_start, 1.0):
        begun = measured_quantiles(moved, moved.train_dataset)
    assert begun is not None and abs(begun.threshold(RATIO, 1e-3) - served.threshold) > 0.01


def test_without_a_share_what_was_trained_is_written(tmp_path) -> None:
    trainer = trained(tmp_path / "run", share=0.0)
    trainer.save_weights(tmp_path)
    written = load_file(tmp_path / RELEVANCE_FILE)
    assert all(torch.equal(written[name], value) for name, value in flat(trainer.model).items())
    quantile = trainer.quantiles.threshold(RATIO, 1e-3)
    assert served_of(trainer.model).threshold == pytest.approx(quantile)


def test_without_a_sample_the_threshold_is_the_trained_ones_and_it_says_so(moved, tmp_path, caplog) -> None:
    assert measured_quantiles(moved, None) is None
    moved.train_dataset = StreamedSamples(iter([]), moved.processing_class, 64)
    moved.save_weights(tmp_path)
    assert "threshold of the trained ones" in caplog.text
    served = served_of(load_relevance(tiny_model("llama", num_hidden_layers=2), tmp_path))
    assert served.threshold == pytest.approx(moved.quantiles.threshold(RATIO, 1e-3))


def test_what_fails_while_it_is_written_leaves_the_trained_ones(moved, tmp_path, monkeypatch) -> None:
    before = flat(moved.model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("sparsekv.training.resumable.save_weights", fails)
    with pytest.raises(OSError, match="no space"):
        moved.save_weights(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in flat(moved.model).items())
    assert served_of(moved.model).threshold == pytest.approx(moved.quantiles.threshold(RATIO, 1e-3))


@pytest.mark.parametrize(
    "config", [RelevanceConfig(width=6), RelevanceConfig(features=("hidden", "handcrafted"))]
)
def test_every_weight_of_any_predictor_is_averaged(config, tmp_path) -> None:
    trainer = trainer_for(tmp_path / "run", **given(share=0.25, config=config))
    trainer.train()
    own = flat(trainer.model)
    trainer.save_weights(tmp_path)
    written = load_file(tmp_path / RELEVANCE_FILE)
    assert len(written) == len(own) > 4
    for index, state in trainer.relevance_start.items():
        for name, value in state.items():
            key = f"layers.{index}.{name}"
            assert torch.allclose(written[key], 0.25 * value + 0.75 * own[key], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relevance_start_share": 3.0}, r"must be a number in \[0, 1\), got 3.0"),
        ({"relevance_start_share": True}, r"must be a number in \[0, 1\), got True"),
        ({"relaxation": Relaxation(n_sink=1, n_recent=3, threshold="learned")}, "with threshold 'quantile'"),
        ({"model": tiny_model("llama", num_hidden_layers=2)}, "needs a model that has predictors"),
    ],
)
def test_a_share_that_means_nothing_is_refused(changes, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_for(tmp_path, **{**given(), **changes})


def test_a_share_needs_a_start_and_may_change_when_a_run_goes_on(tmp_path) -> None:
    model = attach_relevance(tiny_model("llama", num_hidden_layers=2))
    save_relevance(model, tmp_path)

    def config(**relevance: Any) -> TrainConfig:
        options = {"enabled": True, "threshold": "quantile", "n_sink": 1, "n_recent": 3, **relevance}
        parts = {
            "data": {"path": "book_train"},
            "objective": {"name": "eit"},
            "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
        }
        return TrainConfig.model_validate({"model": "smollm2", "relevance": options, "steps": 1, **parts})

    for missing in ({"start_from": None}, {"enabled": False}, {"threshold": "learned"}):
        with pytest.raises(ValueError, match=r"start_share 0\.5 needs enabled: true, start_from"):
            config(**{"start_share": 0.5, "start_from": str(tmp_path), **missing})
    with pytest.raises(ValueError, match="less than 1"):
        config(start_share=1.0, start_from=str(tmp_path))
    old = config(start_from=str(tmp_path)).model_dump(mode="json")
    new = config(start_from=str(tmp_path), start_share=0.5).model_dump(mode="json")
    check_settings(tmp_path, old, new)
    with pytest.raises(ConfigError, match=r"relevance\.noise was 0\.5, now 0\.25"):
        check_settings(tmp_path, old, config(start_from=str(tmp_path), noise=0.25).model_dump(mode="json"))
