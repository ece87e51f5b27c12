"""What "auto" means for dtype and device."""

from pathlib import Path

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.models import placement
from sparsekv.models.placement import linux_cpu_features, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx2", "avx512_f", "avx512_vnni"}, torch.float32),
        ({"avx2", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        ({"neon", "bf16"}, torch.bfloat16),
        ({"neon", "fp16_arith"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_computes_in_it(monkeypatch, features, dtype):
    monkeypatch.setattr(placement, "cpu_features", lambda: features)
    assert resolve_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_on_a_gpu_asks_for_bf16_in_hardware(monkeypatch, hardware):
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or hardware

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if hardware else torch.float32)


def test_named_dtypes():
    names = ["float32", "fp32", "bfloat16", "bf16", "float16", "fp16", "torch.bfloat16", torch.float16]
    expected = [
        *[torch.float32] * 2,
        *[torch.bfloat16] * 2,
        *[torch.float16] * 2,
        torch.bfloat16,
        torch.float16,
    ]
    assert [resolve_dtype(name, CPU) for name in names] == expected
    with pytest.raises(
        ConfigError, match=r"unknown dtype 'bloat16' \(did you mean 'bfloat16'\?\); allowed: auto"
    ):
        resolve_dtype("bloat16", CPU)
    with pytest.raises(ConfigError, match=r"unknown dtype 'int8'.*; allowed: auto, float32"):
        resolve_dtype(torch.int8, CPU)


def test_features_as_linux_lists_them():
    x86 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx512_bf16 amx_bf16\nbugs\t\t: spectre\n"
    assert linux_cpu_features(x86) == {"fpu", "avx512_bf16", "amx_bf16"}
    assert linux_cpu_features("Features\t: fp asimd svebf16 bf16\n") == {"fp", "asimd", "sve_bf16", "bf16"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_torch_and_linux_agree_about_this_cpu(monkeypatch):
    by_torch = resolve_dtype("auto", CPU)
    monkeypatch.setattr(
        placement, "cpu_features", lambda: linux_cpu_features(Path("/proc/cpuinfo").read_text())
    )
    assert resolve_dtype("auto", CPU) == by_torch


@pytest.mark.parametrize(("cuda", "mps", "device"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_device(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert resolve_device() == torch.device(device)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="'cuda:2' is not there: this machine has 2 CUDA GPUs"):
        resolve_device("cuda:2")
    with pytest.raises(ConfigError, match=r"unknown device 'gpu' .*allowed: auto, cpu, cuda, cuda:N, mps"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match="unknown device 'meta'"):  # torch has it, but it holds no numbers
        resolve_device("meta")
