"""`sparsekv …` in processes that can be killed: forked from one that has torch already, so that each starts quickly."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = [
    "sparsekv.cli.main",
    "sparsekv.training.build",
    "sparsekv.policies.training_presses",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
]
TIMEOUT_S = 100


def start(arguments: list[str], log: Path) -> Any:
    """A process that runs `sparsekv ARGUMENTS`; what it prints goes to the file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(arguments, str(log)))
    process.start()
    return process


def finish(process: Any, log: Path) -> str:
    """Wait for it; what it printed, with its exit code in front."""
    process.join(TIMEOUT_S)
    return f"exit {process.exitcode}\n{log.read_text()}"


def kill_when(process: Any, happened: Any, delay_s: float = 0.0) -> bool:
    """kill -9 once `happened()` is true and `delay_s` have passed; False if it ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.is_alive() and not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("the process went on without doing what was waited for")
        time.sleep(0.01)
    time.sleep(delay_s)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


def _run(arguments: list[str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from sparsekv.cli.main import app, call

    torch.set_num_threads(1)
    code = call(app, "sparsekv", arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
