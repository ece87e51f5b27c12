"""Two processes that share the weights (FSDP2, gloo) train as one does, and write the same files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsekv.errors import ConfigError
from sparsekv.training.build import run_training
from sparsekv.training.config import load_train_config
from sparsekv.training.sharded import check_dtypes, check_plugin, in_step
from toy import save_toy_model, tiny_model
from training.ddp_worker import JUDGED, run_case
from training.fsdp_worker import ADAM, run_alternating, run_averaged, run_full
from training.torchrun import run_two

pytestmark = pytest.mark.slow

CASES = ("token", "layer", "relevance", "sparse_reg", "adaptive_blocks", "mixed")
WORKER = Path(__file__).with_name("fsdp_worker.py")
ONE = {"batch_size": 4, "accumulation": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two processes' runs."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_two(WORKER, str(folder), *CASES)
    return folder


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
    """Tied weights, SGD with nothing to remember, a resumed run and one that goes on from its end."""
    wanted = run_full(tmp_path, **ONE)
    check_same(two_processes["full"], wanted)
    check_same_files(folder / "full" / "checkpoint-4", tmp_path / "checkpoint-4", within=1e-6)
    assert torch.equal(two_processes["full resumed"]["after"], two_processes["full"]["after"])
    assert torch.equal(two_processes["full resumed"]["loss"], two_processes["full"]["loss"])
    saved = load_file(folder / "full resumed" / "checkpoint-4" / "model.safetensors")
    assert sum(x.numel() for x in saved.values()) == len(two_processes["finished"]["after"])


def test_weights_that_some_steps_leave_out(two_processes, tmp_path):
    """Steps of a press, and of predictors: these have no optimizer's state before their first."""
    found = two_processes["alternating"]
    wanted = run_alternating(tmp_path, **ONE, arguments=ADAM)
    check_same(found, wanted, weights=1e-4)
    assert torch.equal(two_processes["alternating resumed"]["after"], found["after"])


def test_adam_clipping_checkpointing_held_out_data_and_what_is_served(two_processes, folder, tmp_path):
    found = two_processes["adam"]
    wanted = run_case("relevance", tmp_path, **ONE, arguments=ADAM, judged=JUDGED, final=True)
    check_same(found, wanted, weights=1e-4)  # Adam divides by gradients that are nearly 0
    torch.testing.assert_close(found["perplexity"], wanted["perplexity"], rtol=1e-4, atol=0.0)
    check_same_files(folder / "adam" / "final", tmp_path / "final", within=1e-4)


@pytest.mark.parametrize("name", ["bf16", "half"])
def test_lower_precision(name, two_processes, tmp_path):
    """Mixed precision, without scores that rounding could tip; and a bf16 model with float32 weights beside it."""
    if name == "bf16":
        wanted = run_case("token", tmp_path, **ONE, arguments={"bf16": True})
    else:
        half = tiny_model("llama", num_hidden_layers=2).to(torch.bfloat16)
        wanted = run_case("relevance", tmp_path, **ONE, model=half)
    found, moved = two_processes[name], wanted["after"] - wanted["before"]
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
    places = (folder / "averaged", tmp_path)
    two, one = (load_file(path / "final" / "relevance.safetensors") for path in places)
    for key, tensor in one.items():  # quantiles are averaged: near, not equal
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-3)


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
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }
    run_two(
        WORKER, "sparsekv", "train", str(config), "batch_size=1", f"output_dir={tmp_path / 'two'}", **launched
    )
    check_same_files(tmp_path / "two" / "final", wanted, within=1e-4)
    rows = [(tmp_path / each / "metrics.jsonl").read_text().splitlines() for each in ("one", "two")]
    for ours, theirs in zip(*rows, strict=True):
        one, two = json.loads(ours), json.loads(theirs)
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "ce", "kl", "eval_perplexity", "eval_perplexity_evicted"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert (tmp_path / "two" / "checkpoint-4" / "optimizer_by_name.pt").is_file()


BF16 = SimpleNamespace(param_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("plugin", "given", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP version 1 is not supported"),
        ({"activation_checkpointing": True}, {}, "use gradient_checkpointing"),
        ({"cpu_ram_efficient_loading": True}, {}, "cpu_ram_efficient_loading is not supported"),
        ({"mixed_precision_policy": BF16}, {"predictors": True}, "load the model in bfloat16 instead"),
        ({}, {"loads_best": True}, "load_best_model_at_end is not supported under FSDP"),
    ],
)
def test_what_is_refused(plugin, given, message):
    usual = {"loads_best": False, "predictors": False}
    check_plugin(SimpleNamespace(fsdp_version=2, mixed_precision_policy=BF16), **usual)
    with pytest.raises(ConfigError, match=message):
        check_plugin(SimpleNamespace(**{"fsdp_version": 2, **plugin}), **{**usual, **given})


def test_one_dtype_is_trained():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="one dtype of all trainable weights, these are bfloat16, float32"):
        check_dtypes(model)
    check_dtypes(model[1].requires_grad_(False) and model)


class OfMany:
    """accelerate's gather, of a process among others whose votes are known."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = list(others)

    def gather(self, votes):
        return torch.cat([votes, torch.tensor([self.others.pop(0)])])


def test_batches_in_step():
    shorter = OfMany([1, 1], [1, 1], [1, 1], [0, 1])
    assert list(in_step("ab", shorter)) == [("a", True), ("b", True), ("b", False)]
    longer = OfMany([1, 1], [0, 1], [0, 1])
    assert list(in_step("ab", longer)) == [("a", True), ("b", True)]
    assert list(in_step("", OfMany([0, 0]))) == []
    with pytest.raises(ConfigError, match="fewer samples than there are processes"):
        list(in_step("", OfMany([1, 1])))
    with pytest.raises(ConfigError, match="fewer samples than there are processes"):
        list(in_step("a", OfMany([0, 0])))
