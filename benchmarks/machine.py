"""What every benchmark prints first: the machine, the threads, whether the compiled kernel is there, the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from sparsekv.cache import kernel


def describe() -> str:
    """One line, to stand above the figures."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "kvpress"))
    threads = f"{torch.get_num_threads()} threads"
    attention = "compiled kernel" if kernel.is_on() else "torch's attention alone"
    return f"{model}, {os.cpu_count()} cores, {threads}, {attention}; {packages}"
