"""Which dtype and which device "auto" means on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekv.errors import ConfigError, unknown

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
# what multiplies in bf16, by torch's names: two x86 extensions (2020 and 2023), and two of ARM v8.6
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def named_device(device: str | torch.device) -> torch.device:
    """The device of that name, whether this machine has it or not; a ConfigError if there is none."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise unknown("device", device, DEVICES) from error
    if chosen.type == "meta":  # a device of torch that holds no numbers
        raise unknown("device", device, DEVICES)
    return chosen


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first CUDA GPU, else Apple's GPU, else the CPU; anything else is a torch device string.

    Raises:
        ConfigError: not a device's name, or a device that this machine does not have.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = named_device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(device)!r} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {str(device)!r} is not there: torch finds no Apple GPU on this machine")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load weights in.

    Args:
        dtype: "auto", "float32" or "fp32", "bfloat16" or "bf16", "float16" or "fp16", or a torch dtype.
            "auto" is bfloat16 where `computes_bf16(device)`, else float32.
        device: where the model will run.

    Raises:
        ConfigError: another dtype.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise unknown("dtype", name, ("auto", *_DTYPES))
    return getattr(torch, _DTYPES[name])


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that bf16 is faster than fp32 there.

    A GPU: compute capability 8.0 and later (torch emulates bf16 on older ones), Apple's from macOS 14. A
    CPU: one with AVX512-BF16, AMX-BF16 or ARM's BF16 extension; others emulate it and lose time.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and any(feature in cpu_features() for feature in _CPU_BF16)


def cpu_features() -> set[str]:
    """Instruction sets of this CPU, in torch's and Linux' spelling: "avx512_bf16", "amx_bf16", "bf16", …"""
    import torch

    get_capabilities = getattr(
        torch.cpu, "get_capabilities", None
    )  # not in the older torch versions we allow
    if get_capabilities is not None:
        return {name for name, has in get_capabilities().items() if has is True}
    cpuinfo = Path("/proc/cpuinfo")
    return linux_cpu_features(cpuinfo.read_text(errors="replace")) if cpuinfo.is_file() else set()


def linux_cpu_features(cpuinfo: str) -> set[str]:
    """The instruction sets in a text of /proc/cpuinfo's form: "flags" on x86, "Features" on ARM."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    listed = [flags for key, _, flags in lines if key.strip() in ("flags", "Features")]
    # Linux says svebf16 where torch says sve_bf16
    return {"sve_bf16" if flag == "svebf16" else flag for flags in listed for flag in flags.split()}
