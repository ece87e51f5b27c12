"""Two processes that share the weights (FSDP2, gloo) train as one does, and write the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsekv.errors import ConfigError
from sparsekv.training.build import run_training
from sparsekv.training.config import load_train_config
from sparsekv.training.sharded import check_plugin
from toy import save_toy_model
from training.ddp_worker import JUDGED, run_case
from training.fsdp_worker import ADAM, run_averaged, run_full

pytestmark = pytest.mark.slow

CASES = ("token", "layer", "relevance", "sparse_reg", "adaptive_blocks", "mixed")
WORKER = Path(__file__).with_name("fsdp_worker.py")
ONE = {"batch_size": 4, "accumulation": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two processes' runs."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_worker(str(folder), *CASES)
    return folder


def run_worker(*arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two_processes(folder):
    return torch.load(folder / "found.pt")


def check_same(found, wanted, *, weights=1e-6):
    assert (found["gradient"] - wanted["gradient"]).norm() <= 1e-5 * wanted["gradient"].norm()
    assert (found["after"] - wanted["after"]).abs().max() <= weights
    for logged in ("loss", "ce", "achieved"):
        torch.testing.assert_close(found[logged], wanted[logged], rtol=1e-5, atol=1e-5)
    assert (wanted["after"] - wanted["before"]).abs().max() > 1e-2


def check_same_files(found, wanted, *, within):
    names = sorted(path.name for path in wanted.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in found.glob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(found / name), load_file(wanted / name)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=within)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    check_same(two_processes[name], run_case(name, tmp_path, **ONE))


def test_full_fine_tuning(two_processes, folder, tmp_path):
    check_same(two_processes["full"], run_full(tmp_path, **ONE))
    check_same_files(folder / "full" / "checkpoint-5", tmp_path / "checkpoint-5", within=1e-6)


def test_adam_clipping_checkpointing_held_out_data_and_what_is_served(two_processes, folder, tmp_path):
    found = two_processes["adam"]
    wanted = run_case("relevance", tmp_path, **ONE, arguments=ADAM, judged=JUDGED, final=True)
    check_same(found, wanted, weights=1e-4)  # Adam divides by gradients that are nearly 0
    torch.testing.assert_close(found["perplexity"], wanted["perplexity"], rtol=1e-4, atol=0.0)
    check_same_files(folder / "adam" / "final", tmp_path / "final", within=1e-4)


def test_mixed_precision(two_processes, tmp_path):
    """Predictors compute in float32 beside a model in bf16, as they do when they are served."""
    found, wanted = two_processes["bf16"], run_case("relevance", tmp_path, **ONE, arguments={"bf16": True})
    moved = wanted["after"] - wanted["before"]
    assert (found["gradient"] - wanted["gradient"]).norm() <= 0.05 * wanted["gradient"].norm()
    assert (found["after"] - wanted["after"]).norm() <= 0.05 * moved.norm()
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=0.01, atol=0.0)


def test_two_processes_resume(two_processes):
    whole, resumed = two_processes["adam"], two_processes["resumed"]
    assert torch.equal(resumed["after"], whole["after"])
    assert torch.equal(resumed["loss"], whole["loss"])


def test_one_process_goes_on_from_what_two_saved(two_processes, folder, tmp_path):
    """Its optimizer's state too: without it, Adam's third step would be larger."""
    resumed = run_case("relevance", tmp_path, **ONE, arguments=ADAM, resume=folder / "adam" / "checkpoint-2")
    assert (two_processes["adam"]["after"] - resumed["after"]).abs().max() <= 1e-4
    torch.testing.assert_close(resumed["loss"], two_processes["adam"]["loss"], rtol=1e-4, atol=1e-4)


def test_averaged_predictors(folder, tmp_path):
    run_averaged(tmp_path, **ONE)
    served, start = (
        load_file(path / "final" / "relevance.safetensors") for path in (folder / "averaged", tmp_path)
    )
    for key, tensor in start.items():
        torch.testing.assert_close(
            served[key], tensor, rtol=0, atol=1e-3
        )  # quantiles are averaged: near, not equal


def test_the_command_under_accelerate_launch(tmp_path):
    """It hands FSDP over by environment variables; nothing of the config says so."""
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"The fox {i} jumps over {i * i} dogs. " * 4}) + "\n" for i in range(24))
    )
    settings = {
        "model": str(save_toy_model(tmp_path / "toy", num_hidden_layers=2)),
        "data": {"kind": "text", "path": str(text), "seq_len": 48},
        "press": {"name": "block_dropout", "args": {"block_size": 4, "n_sink": 1, "n_recent": 3}},
        "relevance": {"enabled": True, "bias": 0.5, "n_sink": 1, "n_recent": 3},
        "press_share": 0.5,
        "objective": {"name": "eit"},
        "curriculum": {"name": "linear", "args": {"start_ratio": 0.2, "end_ratio": 0.6}},
        "lora": {"r": 2, "alpha": 4},
        "held_out": 3,
        "eval_every": 2,
        "steps": 4,
        "save_every": 2,
        "report_to": [],
        "device": "cpu",
        "progress": False,
    }
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings))
    wanted = run_training(load_train_config(config, ["batch_size=2", f"output_dir={tmp_path / 'one'}"]))
    launched = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    run_worker("sparsekv", "train", str(config), "batch_size=1", f"output_dir={tmp_path / 'two'}", **launched)
    check_same_files(tmp_path / "two" / "final", wanted, within=1e-4)
    rows = [(tmp_path / each / "metrics.jsonl").read_text().splitlines() for each in ("one", "two")]
    for ours, theirs in zip(*rows, strict=True):
        one, two = json.loads(ours), json.loads(theirs)
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "ce", "kl", "eval_perplexity", "eval_perplexity_evicted"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert (tmp_path / "two" / "checkpoint-4" / "optimizer_by_name.pt").is_file()


@pytest.mark.parametrize(
    ("plugin", "best", "message"),
    [
        ({"fsdp_version": 1}, False, "FSDP version 1 is not supported"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, False, "use gradient_checkpointing"),
        ({"fsdp_version": 2}, True, "load_best_model_at_end is not supported under FSDP"),
    ],
)
def test_what_is_refused(plugin, best, message):
    with pytest.raises(ConfigError, match=message):
        check_plugin(SimpleNamespace(**plugin), loads_best=best)
