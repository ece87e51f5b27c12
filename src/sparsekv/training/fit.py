"""`sparsekv relevance fit`: relevance predictors on a frozen model, by regression or end to end; judged, then saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsekv.errors import ConfigError
from sparsekv.files import check_output_dir
from sparsekv.models import load_model
from sparsekv.relevance.files import save_relevance
from sparsekv.relevance.predictor import RelevanceConfig
from sparsekv.training.build import run_training
from sparsekv.training.data_split import split_data
from sparsekv.training.fit_config import TRAINING, FitConfig
from sparsekv.training.fit_output import save_fitted
from sparsekv.training.fit_regression import Progress, SampleReader, fit_regression, latest_checkpoint
from sparsekv.training.fit_report import center, judge
from sparsekv.training.output import METRICS_FILE
from sparsekv.training.setup import check_fits_model, with_dtype, with_predictors


class Fitted(NamedTuple):
    """What a run left: the folder `final/`, and the held-out report in it."""

    folder: Path
    report: dict[str, Any]


def run_fit(
    config: FitConfig, *, say: Callable[[str], None] = lambda line: None, progress: Progress | None = None
) -> Fitted:
    """Fit predictors to the end, going on from the newest whole checkpoint, judge and save them.

    Parameters
    ----------
    say : hears one line per thing that a user should know
    progress : hears how far it is

    Raises
    ------
    ConfigError
        For a wrong config, an output_dir that can't be a folder, data without a usable sample, checkpoints of another
        run, predictors that do not fit, several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("relevance fit runs in one process; start it without torchrun")
    config = with_dtype(config)
    output = Path(config.output_dir).expanduser()
    check_output_dir(output)
    checkpoint = latest_checkpoint(config, say) if config.way == "regression" else None
    trained = run_training(config.train_config(), progress=say) if config.way == "end_to_end" else None
    check_fits_model(config)
    model, tokenizer = load_model(
        config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    model.requires_grad_(False)
    start = trained if trained is not None else config.start_from
    features = RelevanceConfig(
        config.predictor.width, config.predictor.bias, tuple(config.predictor.features)
    )
    with_predictors(model, features, start, seed=config.seed)
    reader = SampleReader(model, tokenizer, config, features)
    data, held_out = split_data(
        config.data, config.judged_data(), config.held_out, config.seed, tokenizer, same_text=trained is None
    )
    if trained is None:
        fit_regression(reader, data, checkpoint=checkpoint, progress=progress)
    report = judge(reader, samples_of(held_out, config.held_out), progress=progress)
    if reader.n_left_out:
        say(
            f"{reader.n_left_out} of {reader.n_read} samples were left out: their contexts are too short, or nothing "
            "follows them"
        )
    if trained is None:
        center(model, config, report)
    metrics = (output / TRAINING if trained is not None else output) / METRICS_FILE
    folder = save_fitted(config, report, lambda folder: save_relevance(model, folder), metrics)
    return Fitted(folder, report)


def samples_of(data: Any, most: int) -> Iterable[Any]:
    """The first samples of a data set, map-style or streamed."""
    if hasattr(data, "__len__"):
        return (data[index] for index in range(min(most, len(data))))
    return islice(iter(data), most)
