"""Predictors fitted to what later queries attend to: read a sample, measure, take a step, forget the sample.

No activations outlive their sample. A run that was killed goes on from its newest whole checkpoint and ends with the
same weights: order, boundaries and pairs are drawn from the seed and the sample's number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset

from sparsekv.errors import ConfigError
from sparsekv.relevance.files import load_relevance, save_relevance
from sparsekv.relevance.predictor import RelevanceConfig
from sparsekv.training.checkpoints import (
    check_settings,
    checkpoint_folder,
    clear,
    latest_whole,
    list_checkpoints,
    rotate,
    seal,
    step_of,
)
from sparsekv.training.data_layout import Layout, Sample
from sparsekv.training.dropping import seed_of
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_futures import observation_of
from sparsekv.training.fit_least_squares import LeastSquares
from sparsekv.training.fit_output import read_fit_config, write_fit_config
from sparsekv.training.fit_solvers import Descent, Read, Solver
from sparsekv.training.fit_targets import observe, scored_slice
from sparsekv.training.output import METRICS_FILE, MetricsLog, public_settings

SOLVER_FILE = "solver.pt"


class Progress(Protocol):
    """Who is told how far a pass is (`cli.progress.Bar` is one)."""

    def start(self, what: str, total: int, done: int) -> None:
        """A pass begins: `total` steps of it, `done` of them from earlier runs."""
        ...

    def task(self, name: str) -> None:
        """How it goes, in a few words."""
        ...

    def advance(self, rows: int) -> None:
        """So many more are done."""
        ...


class SampleReader:
    """Reads samples with a model: from its tokens to every layer's entries and targets.

    Parameters
    ----------
    model : with predictors, frozen
    tokenizer : the model's
    config : FitConfig
    features : RelevanceConfig of the predictors

    Attributes
    ----------
    n_read, n_left_out : int
        Samples asked for, and those of them that said nothing: too short, or with nothing after the context.
    """

    def __init__(self, model: Any, tokenizer: Any, config: FitConfig, features: RelevanceConfig) -> None:
        self.model, self.tokenizer, self.config, self.features = model, tokenizer, config, features
        self.layout = Layout(tokenizer)
        self.n_read = self.n_left_out = 0

    def read(self, sample: Sample, epoch: int = 0) -> Read | None:
        """What was measured of a sample; None if all of its context stays anyway, or nothing follows."""
        futures, own = self.config.futures, self.config.predictor
        self.n_read += 1
        seen = observation_of(
            sample, self.layout, futures.kinds, futures.chunk_tokens, seed=self.config.seed, epoch=epoch
        )
        columns = scored_slice(len(seen.context), own.n_sink, own.n_recent) if seen else slice(0, 0)
        if seen is None or columns.stop - columns.start < 2:  # no order among fewer
            self.n_left_out += 1
            return None
        entries = observe(self.model, seen, self.features, tokenizer=self.tokenizer)
        return entries, columns, seed_of(seen.seed, 2)

    def read_all(self, samples: Iterable[tuple[Sample, int]]) -> Iterator[Read]:
        """Those of several (sample, epoch) that can be read, one at a time."""
        for sample, epoch in samples:
            found = self.read(sample, epoch)
            if found is not None:
                yield found


def latest_checkpoint(config: FitConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts.

    Raises
    ------
    ConfigError
        For checkpoints of another config, or any if `resume` is false.
    """
    output = Path(config.output_dir).expanduser()
    if not config.resume and list_checkpoints(output):
        raise ConfigError(
            f"output_dir '{output}' holds checkpoints and resume is false; use another output_dir, or resume: true"
        )
    path, skipped = latest_whole(output)
    for broken, reason in skipped.items():
        say(f"{broken} is passed over: {reason}")
    if path is not None:
        check_settings(path, public_settings(read_fit_config(path)), public_settings(config))
        say(f"going on from {path}")
    return path


def fit_regression(
    reader: SampleReader, data: Any, *, checkpoint: Path | None = None, progress: Progress | None = None
) -> None:
    """Fit the predictors of `reader.model` in place, with checkpoints in output_dir.

    Parameters
    ----------
    data : map-style or streamed data set of samples
    checkpoint : to go on from (`latest_checkpoint`)
    """
    config, model = reader.config, reader.model
    output = Path(config.output_dir).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    exact = config.regression.solver == "least_squares"
    solver: Solver = LeastSquares(model, config) if exact else Descent(model, config)
    done = 0
    if checkpoint is not None:
        done = step_of(checkpoint)
        load_relevance(model, checkpoint)
        solver.load_state_dict(torch.load(checkpoint / SOLVER_FILE, weights_only=True))
    log = MetricsLog(output / METRICS_FILE)
    log.start(-1 if checkpoint is None else done)
    if progress is not None:
        progress.start("fit", config.steps, done)
    steps = batches(data, config.batch_size, config.seed, skip=done)
    losses: list[float] = []
    for number, batch in zip(range(done, config.steps), steps, strict=False):
        loss = solver.step(number, reader.read_all(batch))
        if loss is not None:
            losses.append(_finite(loss, number))
        finished, last = number + 1, number + 1 == config.steps
        if finished % config.log_every == 0 or finished % config.save_every == 0 or last:
            # before every checkpoint too, so that a run that goes on from it logs the same rows
            mean = sum(losses) / len(losses) if losses else None
            log.append(finished, {"loss": mean})
            losses = []
            solver.settle()
        if progress is not None:
            progress.advance(1)
            progress.task("" if loss is None else f"loss {loss:.3f}")
        if finished % config.save_every == 0 or last:
            save_checkpoint(model, solver, config, finished)
    solver.settle()


def batches(data: Any, batch_size: int, seed: int, *, skip: int = 0) -> Iterator[list[tuple[Sample, int]]]:
    """Endless batches of (sample, epoch), the first `skip` of them left out.

    A map-style data set comes in another order every epoch, drawn from the seed; a stream as it is, again and again.
    """
    if isinstance(data, IterableDataset):
        endless = ((sample, epoch) for epoch in count() for sample in data)
        every = islice(endless, skip * batch_size, None)
        while True:
            yield list(islice(every, batch_size))
    size = len(data)
    known, order = -1, list[int]()
    for number in count(skip):
        batch = []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, rank = divmod(place, size)
            if epoch != known:
                known, order = epoch, shuffled(size, seed, epoch)
            batch.append((data[order[rank]], epoch))
        yield batch


def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """The numbers below `size` in an epoch's order."""
    order = list(range(size))
    random.Random(seed_of(seed, epoch, 4)).shuffle(order)
    return order


def save_checkpoint(model: Any, solver: Solver, config: FitConfig, step: int) -> Path:
    """Write `checkpoint-STEP`, whole once its manifest is there, and remove older ones."""
    output = Path(config.output_dir).expanduser()
    folder = checkpoint_folder(output, step)
    clear(folder)
    folder.mkdir(parents=True)
    save_relevance(model, folder)
    torch.save(solver.state_dict(), folder / SOLVER_FILE)
    write_fit_config(folder, config)
    seal(folder)
    rotate(output, config.keep_checkpoints)
    return folder


def _finite(loss: float, step: int) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise ConfigError(
            f"the loss of step {step + 1} is {loss}: the model's activations are not finite on this text, or lr is "
            "too high; nothing after the last checkpoint is kept"
        )
    return loss
