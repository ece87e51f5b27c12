"""An output folder that can't be one is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekv.errors import ConfigError
from sparsekv.training import build, fit
from sparsekv.training.config import TrainConfig
from training.fit_runs import fit_config


def train(output: str) -> Any:
    return build.run_training(
        TrainConfig.model_validate(
            {
                "model": "smollm2",
                "data": {"kind": "text", "path": "book_train"},
                "press": "block_dropout",
                "output_dir": output,
                "dtype": "float32",
                "steps": 1,
                "objective": "standard_lm",
                "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
            }
        )
    )


def fit_predictors(output: str) -> Any:
    return fit.run_fit(fit_config(Path("smollm2"), Path("book_train"), Path(output)))


@pytest.mark.parametrize("run", [train, fit_predictors])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file.txt", "'file.txt' is a file; give a folder"),
        ("file.txt/sub", "'file.txt' is a file; give a folder"),
        ("/proc/nothing/here", "cannot be written"),
        ("a" * 300, "cannot be written: File name too long"),
    ],
)
def test_an_output_dir_that_cannot_be_a_folder_is_refused_before_the_model_loads(
    run: Callable[[str], Any], output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_model", load)
    monkeypatch.setattr(fit, "load_model", load)
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"^output_dir '") as caught:
        run(output)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "mine"
