"""Benchmarks × methods × budgets on one model: planned, answered, measured and written down.

    with RunFolder("results/mine") as folder:
        outcome = run_evaluation(load_eval_config("configs/eval/demo.yaml"), folder)

Names load on first use: they need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.plan import Plan, make_plan
    from sparsekv.evaluation.runner import Outcome, run_evaluation

_HOME = {
    "Outcome": "runner",
    "Plan": "plan",
    "RunFolder": "folder",
    "make_plan": "plan",
    "run_evaluation": "runner",
}

__all__ = ["Outcome", "Plan", "RunFolder", "make_plan", "run_evaluation"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
