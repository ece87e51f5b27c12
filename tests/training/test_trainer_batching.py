"""How samples are put into micro-batches changes nothing: the same gradients, and the same weights after 5 steps.

The samples have different lengths and different numbers of labels, so that every mean over rows would show.
"""

from __future__ import annotations

import functools

import pytest
import torch

import sparsekv
from sparsekv.training import StandardLMObjective
from sparsekv.training.config_parts import LoraOptions
from toy import tiny_model
from training.ddp_worker import CASES, run_case, samples

WAYS = {
    "1x4": {"batch_size": 1, "accumulation": 4},
    "2x2, checkpointing": {"batch_size": 2, "accumulation": 2, "checkpointing": True},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """`together(case)`: the run with 4 samples in one batch."""

    @functools.cache
    def run(name):
        return run_case(name, tmp_path_factory.mktemp(name), batch_size=4, accumulation=1)

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_do_not_depend_on_batching(name, way, together, tmp_path):
    wanted, found = together(name), run_case(name, tmp_path, **WAYS[way])
    assert (found["gradient"] - wanted["gradient"]).norm() <= 1e-5 * wanted["gradient"].norm()
    assert (found["after"] - wanted["after"]).abs().max() <= 1e-6
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-5)
    assert (wanted["after"] - wanted["before"]).abs().max() > 1e-2, "training must move the weights"
    if name != "sparse_reg":  # it evicts nothing
        assert wanted["achieved"][-1] > 0.1
    torch.testing.assert_close(wanted["requested"], torch.tensor([0.4, 0.44, 0.48, 0.52, 0.56]))


def test_gradients_are_those_of_the_mean_over_all_labels(tmp_path):
    """Against plain autograd: neither accumulation nor Trainer divides a second time."""
    model = tiny_model("llama", num_hidden_layers=2)
    found = run_case(
        "sparse_reg",
        tmp_path,
        batch_size=1,
        accumulation=4,
        model=model,
        lora=None,
        press=sparsekv.FullPress(),
        objective=StandardLMObjective(),
        train_dataset=samples(4),
    )
    fresh = tiny_model("llama", num_hidden_layers=2)
    total, count = torch.zeros(()), 0
    for sample in samples(4):
        labels = torch.tensor(sample["labels"])[1:]
        logits = fresh(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    wanted = torch.cat([p.grad.flatten() for p in fresh.parameters()])
    assert (found["gradient"] - wanted).norm() <= 1e-5 * wanted.norm()
    assert abs(found["loss"][0] - (total / count)) <= 1e-5 * abs(found["loss"][0])


def test_adapters_start_from_the_runs_seed(tmp_path):
    """Whatever the global random state was, so that a run can be repeated."""
    starts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        options = {"batch_size": 4, "accumulation": 1, "lora": LoraOptions(r=2, alpha=4)}
        starts.append(run_case("token", tmp_path / str(noise), **options)["before"])
    assert torch.equal(*starts) and starts[0].abs().sum() > 0
