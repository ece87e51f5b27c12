"""Two processes (torchrun, gloo) train exactly as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from sparsekv.errors import ConfigError
from sparsekv.training.given import prepare_arguments
from training.ddp_worker import JUDGED, Stream, run_case
from training.torchrun import run_two

pytestmark = pytest.mark.slow

EXACT = ("token", "layer", "relevance")
WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_two(WORKER, str(folder), "1", "2", "quantile", *EXACT)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    found, wanted = two_processes[name], run_case(name, tmp_path, batch_size=4, accumulation=1)
    assert (found["gradient"] - wanted["gradient"]).norm() <= 1e-5 * wanted["gradient"].norm()
    assert (found["after"] - wanted["after"]).abs().max() <= 1e-6
    for logged in ("loss", "ce", "achieved"):
        torch.testing.assert_close(found[logged], wanted[logged], rtol=1e-5, atol=1e-5)
    assert (wanted["after"] - wanted["before"]).abs().max() > 1e-2


def test_quantiles_over_processes_are_averaged(two_processes, tmp_path):
    """The threshold is the mean of both processes' quantiles: near that of one process, not equal to it."""
    found, wanted = two_processes["quantile"], run_case("quantile", tmp_path, batch_size=4, accumulation=1)
    assert (found["gradient"] - wanted["gradient"]).norm() <= 1e-5 * wanted["gradient"].norm(), "none yet"
    difference = (found["after"] - wanted["after"]).abs().max()
    assert difference <= 1e-2 * (wanted["after"] - wanted["before"]).abs().max()


def test_two_processes_resume(two_processes):
    whole, resumed = two_processes[EXACT[-1]], two_processes["resumed"]
    assert torch.equal(resumed["after"], whole["after"])
    assert torch.equal(resumed["loss"], whole["loss"]), "the logged rows of the first two steps come along"


def test_a_stream_is_read_by_every_process(two_processes, tmp_path):
    """Samples of different lengths: handed out by one process they could not be put together."""
    found = two_processes["stream"]
    wanted = run_case("token", tmp_path, batch_size=4, accumulation=1, train_dataset=Stream())
    assert (found["gradient"] - wanted["gradient"]).norm() <= 1e-5 * wanted["gradient"].norm()
    assert (found["after"] - wanted["after"]).abs().max() <= 1e-6


def test_batches_that_one_process_hands_out_are_refused(tmp_path):
    given = TrainingArguments(str(tmp_path), use_cpu=True)
    prepare_arguments(given, idle_predictors=False)
    assert given.accelerator_config.dispatch_batches is False
    given.accelerator_config.dispatch_batches = True
    with pytest.raises(ConfigError, match="dispatch_batches must be False"):
        prepare_arguments(given, idle_predictors=False)


def test_every_held_out_sample_is_judged_once(two_processes, tmp_path):
    """Of a data set and of a stream, whose number is no multiple of the processes."""
    found = two_processes[EXACT[-1]]["perplexity"]
    wanted = run_case(EXACT[-1], tmp_path, batch_size=4, accumulation=1, judged=JUDGED)["perplexity"]
    assert len(found) == 2 and wanted[0] == pytest.approx(float(wanted[1]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
