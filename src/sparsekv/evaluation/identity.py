"""Who computed a result: model, weights, seed; versions, machine, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sparsekv
from sparsekv.cache import kernel
from sparsekv.cache.fingerprint import weights_fingerprint
from sparsekv.config import EvalConfig
from sparsekv.models import public_name
from sparsekv.models.placement import resolve_device, resolve_dtype

_PACKAGES = ("torch", "transformers", "kvpress", "peft", "numpy")


def known_identity(config: EvalConfig) -> dict[str, Any]:
    """The part of `identity` that is known before weights are loaded; the error names the first that differs."""
    place = resolve_device(config.device)
    known = {
        "model": public_name(config.model),
        "adapter": None if config.adapter is None else public_name(config.adapter),
        "dtype": str(resolve_dtype(config.dtype, place)).removeprefix("torch."),
        "device": place.type,
        "seed": config.seed,
        "query_aware": config.query_aware,
        "max_new_tokens": config.max_new_tokens,
        "chunk": config.chunk,
    }
    if config.device_map is not None:
        del known["device"]  # transformers chooses
    return known


def identity(config: EvalConfig, model: Any) -> dict[str, Any]:
    """What runs that share an output folder have in common."""
    return {
        **known_identity(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device.type),
        "weights": weights_fingerprint(model),
    }


def versions() -> dict[str, str]:
    """Of Python, this library and those that results depend on."""
    found = {"python": platform.python_version(), "sparsekv": sparsekv.__version__}
    for package in _PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in bytes, GPUs; whether a CPU's compiled attention is there."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "compiled_attention": kernel.is_on(),
    }


def commit() -> str | None:
    """The git commit of this code ("+changed" if the package differs from it); None outside a clone."""
    package = Path(sparsekv.__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside someone's clone (in its virtual environment) without being part of it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = git("rev-parse", "HEAD")
    if not head:
        return None
    return f"{head}+changed" if git("status", "--porcelain", "--", ".") else head


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None
