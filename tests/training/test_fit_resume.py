"""Fits that are cut off end as if they had not been; what decides the order of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsekv.errors import ConfigError
from sparsekv.training import fit_regression
from sparsekv.training.fit import run_fit
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_output import read_fit_config
from sparsekv.training.fit_regression import batches
from training.fit_runs import rows_of

Make = Callable[..., FitConfig]


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("solver", ["adamw", "least_squares"])
def test_a_run_that_was_cut_off_ends_as_an_uninterrupted_one(
    solver: str, fit_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    whole = run_fit(fit_run(output=tmp_path / "whole", regression={"solver": solver}))
    cut = fit_run(output=tmp_path / "cut", regression={"solver": solver})
    plain = fit_regression.seal
    seals = 0

    def killed_at(number: int) -> Callable[[Path], None]:
        def seal(folder: Path) -> None:
            nonlocal seals
            seals += 1
            if seals == number:
                raise Killed  # the checkpoint's files are there, its manifest is not
            plain(folder)

        return seal

    said: list[str] = []
    for number in (1, 3):
        monkeypatch.setattr(fit_regression, "seal", killed_at(number))
        with pytest.raises(Killed):
            run_fit(cut, say=said.append)
    monkeypatch.setattr(fit_regression, "seal", plain)
    found = run_fit(cut, say=said.append)
    assert any("checkpoint-8 is passed over: it was not finished" in line for line in said)
    assert any("going on from" in line and "checkpoint-8" in line for line in said)
    one, other = (load_file(run.folder / "relevance.safetensors") for run in (whole, found))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert found.report == whole.report
    assert rows_of(found.folder) == rows_of(whole.folder)
    again = run_fit(cut, say=said.append)  # a finished run is judged once more, and stays what it was
    assert again.report == whole.report and "checkpoint-20" in said[-1]


def test_another_config_does_not_go_on_from_these_checkpoints(fit_run: Make) -> None:
    run_fit(fit_run(steps=8))
    with pytest.raises(ConfigError, match=r"is of another config: lr was 0\.02, now 0\.01"):
        run_fit(fit_run(steps=8, lr=0.01))
    with pytest.raises(ConfigError, match="resume is false"):
        run_fit(fit_run(steps=8, resume=False))
    run_fit(fit_run(steps=8, save_every=4))  # what changes no weight may differ


def test_a_fit_records_its_dtype_and_does_not_go_on_in_another(
    fit_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekv.models.placement.computes_bf16", lambda device: False)
    folder = run_fit(fit_run(steps=8, dtype="auto")).folder
    assert read_fit_config(folder).dtype == "float32"
    monkeypatch.setattr("sparsekv.models.placement.computes_bf16", lambda device: True)
    with pytest.raises(ConfigError, match="is of another config: dtype was 'float32', now 'bfloat16'"):
        run_fit(fit_run(steps=8, dtype="auto"))


def test_batches_depend_on_the_seed_alone_and_can_start_anywhere() -> None:
    data = [{"sample_index": i} for i in range(5)]

    def first(n: int, **options: Any) -> list[list[tuple[int, int]]]:
        steps = batches(data, 2, options.pop("seed", 0), **options)
        return [[(sample["sample_index"], epoch) for sample, epoch in next(steps)] for _ in range(n)]

    whole = first(10)
    assert first(4, skip=6) == whole[6:]
    assert first(10, seed=1) != whole
    flat = [pair for batch in whole for pair in batch]
    for epoch in range(4):
        of_epoch = [index for index, number in flat if number == epoch]
        assert sorted(of_epoch) == [0, 1, 2, 3, 4]
    assert flat[:5] != [(index, 0) for index, _ in flat[5:10]]
