"""The evaluation: a plan's cells, answered, written down row by row, and summed up.

Some examples are the unit of work: their answers in all cells are computed together and written together, so a run
that is stopped at any moment goes on where it was.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from sparsekv.benchmarks.scoring import METRICS
from sparsekv.config import EvalConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.cells import Cell, Task
from sparsekv.evaluation.cost import can_measure, measure, quick_collections
from sparsekv.evaluation.folder import RunFolder, check_identity
from sparsekv.evaluation.identity import commit, identity, machine, versions
from sparsekv.evaluation.plan import Plan, make_plan
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.records import SCHEMA_VERSION, CostRow, PredictionRow, ResultRow
from sparsekv.evaluation.reply import Reply
from sparsekv.evaluation.results import comparable, joined_commits, result_row
from sparsekv.evaluation.resume import check_resumable
from sparsekv.models import load_model


class Progress(Protocol):
    """Who is told how far a run is."""

    def start(self, what: str, total: int, done: int) -> None:
        """A pass begins: `total` rows of it, `done` of them from earlier runs."""
        ...

    def task(self, name: str) -> None:
        """The task that is worked on now."""
        ...

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        ...


class Silent:
    """Progress that nobody wants to see."""

    def start(self, what: str, total: int, done: int) -> None: ...

    def task(self, name: str) -> None: ...

    def advance(self, rows: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a run left in its folder.

    Parameters
    ----------
    results : the rows of results.jsonl, in the order of the plan (earlier cells of the folder after them)
    run : the content of run.json
    interrupted : stopped by Ctrl-C; what was done is kept
    """

    results: list[ResultRow]
    run: dict[str, Any]
    interrupted: bool


def run_evaluation(
    config: EvalConfig,
    folder: RunFolder,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
) -> Outcome:
    """Answer everything that `folder` does not hold yet.

    Parameters
    ----------
    config : of one model; one with variants is for `run_variants`
    folder : RunFolder
        Entered. Writes predictions.jsonl, costs.jsonl, run.json, results.jsonl and selections/.
    command : str, optional
        The command line, for run.json.
    plan : Plan, optional
        That of `config`, if it was made already.

    Raises
    ------
    ConfigError
        For anything wrong with the config, the data or the folder; before any weights are loaded where
        possible.
    """
    if config.variants:
        raise ConfigError("the config has variants: use run_variants, which runs one after the other")
    return _Run(config, folder, command, progress or Silent(), plan).go()


class _Run:
    """One run over one folder."""

    def __init__(
        self,
        config: EvalConfig,
        folder: RunFolder,
        command: str | None,
        progress: Progress,
        plan: Plan | None,
    ) -> None:
        self.plan = plan if plan is not None else make_plan(config)
        self.config, self.folder, self.command, self.progress = config, folder, command, progress
        self.before = folder.read_run()
        self.predictions = cast("list[PredictionRow]", folder.predictions.read())
        self.costs = cast("list[CostRow]", folder.costs.read())
        self.started = now()
        self.commit = commit()
        # of rows from before each row named its own
        self.earlier_commit: str | None = self.before.get("earlier_commit") or joined_commits(
            session.get("commit") for session in self.before.get("sessions", [])
        )

    def go(self) -> Outcome:
        """Check, answer, measure, sum up."""
        check_resumable(self.folder.path, self.before, self.predictions, self.plan, self.config)
        model, tokenizer = self._load()
        config = self.config
        self.identity = identity(config, model)
        if self.before:
            check_identity(self.folder.path, self.before["identity"], self.identity)
        self.answerer = Answerer(model, tokenizer, config.seed, self.plan.longest, config.batch_cells)
        self._write_run(finished=None)
        interrupted = False
        try:
            self._answer_all()
            self._record_all()
            self._measure_all()
        except KeyboardInterrupt:
            interrupted = True
        results = self._results()
        self.folder.write(
            "results.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results)
        )
        return Outcome(results, self._write_run(finished=None if interrupted else now()), interrupted)

    def _load(self) -> tuple[Any, Any]:
        config = self.config
        return load_model(
            config.model,
            adapter=config.adapter,
            dtype=config.dtype,
            device=config.device,
            device_map=config.device_map,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )

    def _write_run(self, finished: str | None) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        cells = dict(self.before.get("cells", {})) | {c.cell_id: c.definition() for c in self.plan.cells}
        metrics = dict(self.before.get("metrics", {}))
        for task, prompts in self.plan.prompts.items():
            metrics[str(task)] = prompts[0].example.metric
        session = {
            "started": self.started,
            "finished": finished,
            "command": self.command,
            "commit": self.commit,
            "versions": versions(),
            "machine": machine(),
        }
        run = {
            "schema_version": SCHEMA_VERSION,
            "identity": self.identity,
            **session,
            "seed": self.config.seed,
            "config": config,
            "metrics": metrics,
            "cells": cells,
            **self._unnamed_commit(),
            "sessions": [*self.before.get("sessions", []), session],
        }
        self.folder.write_run(run)
        return run

    def _unnamed_commit(self) -> dict[str, str | None]:
        unnamed = any("commit" not in row for row in self.predictions)
        return {"earlier_commit": self.earlier_commit} if unnamed else {}

    # ---- answering
    # -------------------------------------------------------------------------------------------------

    def _answer_all(self) -> None:
        done = {(row["cell_id"], row["example_id"]) for row in self.predictions}
        planned = [
            (task, [Cell(task, setting) for setting in self.plan.settings], prompts)
            for task, prompts in self.plan.prompts.items()
        ]
        ids = {cell: cell.cell_id for _, cells, _ in planned for cell in cells}
        n_done = sum(
            (ids[c], p.example.example_id) in done for _, cells, ps in planned for c in cells for p in ps
        )
        self.progress.start("answers", self.plan.n_rows, n_done)
        for task, cells, prompts in planned:
            self.progress.task(str(task))
            missing = ((p, [c for c in cells if (ids[c], p.example.example_id) not in done]) for p in prompts)
            left = [(prompt, todo) for prompt, todo in missing if todo]
            for start in range(0, len(left), self.config.batch_rows):
                asked = left[start : start + self.config.batch_rows]
                replies = self.answerer.answer_many(
                    [(p, [cell.setting for cell in todo]) for p, todo in asked]
                )
                rows = [
                    prediction_row(ids[cell], prompt, reply, self.commit)
                    for (prompt, todo), found in zip(asked, replies, strict=True)
                    for cell, reply in zip(todo, found, strict=True)
                ]
                self.folder.predictions.append(rows)
                self.predictions += rows
                self.progress.advance(len(rows))

    def _record_all(self) -> None:
        """The kept entries of the first examples of every cell, where they are not recorded yet."""
        for task, prompts in self.plan.prompts.items():
            for prompt in prompts[: self.config.record_selections]:
                missing = [
                    s for s in self.plan.settings if not self._trace_file(Cell(task, s), prompt).exists()
                ]
                for setting, trace in self.answerer.traces(prompt, missing):
                    file = self._trace_file(Cell(task, setting), prompt)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with full_disk_as_oserror(file):
                        trace.save(file)

    def _trace_file(self, cell: Cell, prompt: Prompt) -> Path:
        name = prompt.example.example_id.replace("/", ".") + ".safetensors"
        return self.folder.path / "selections" / cell.cell_id / name

    def _measure_all(self) -> None:
        rows = self.config.cost_rows
        n_tokens = self.config.cost_new_tokens
        done = {
            (row["cell_id"], row["example_id"]) for row in self.costs if row.get("new_tokens") == n_tokens
        }
        todo: list[tuple[Cell, Prompt]] = []
        for task in self._measured_tasks():
            prompts = self.plan.prompts[task]
            for setting in self.plan.settings:
                cell = Cell(task, setting)
                todo += [
                    (cell, prompt) for prompt in prompts[:rows] if can_measure(setting, prompt, self.answerer)
                ]
        if not todo:
            return
        left = [
            (cell, prompt) for cell, prompt in todo if (cell.cell_id, prompt.example.example_id) not in done
        ]
        self.progress.start("costs", len(todo), len(todo) - len(left))
        with quick_collections():
            for cell, prompt in left:
                self.progress.task(str(cell.task))
                row = measure(self.answerer, cell, prompt, n_tokens)
                self.folder.costs.append([row])
                self.costs.append(row)
                self.progress.advance(1)

    def _measured_tasks(self) -> list[Task]:
        """The first `cost_tasks` tasks of each context length."""
        of_length: dict[int | None, list[Task]] = {}
        for task in self.plan.prompts:
            of_length.setdefault(task.context_length, []).append(task)
        first = {task for tasks in of_length.values() for task in tasks[: self.config.cost_tasks]}
        return [task for task in self.plan.prompts if task in first]

    # ---- summing up
    # -------------------------------------------------------------------------------------------------

    def _results(self) -> list[ResultRow]:
        """Every cell that has predictions: the plan's, then those of earlier commands in the folder."""
        definitions = dict(self.before.get("cells", {}))
        metrics = dict(self.before.get("metrics", {}))
        cells = {cell.cell_id: cell for cell in self.plan.cells}
        for cell_id, definition in definitions.items():
            cells.setdefault(cell_id, Cell.from_definition(definition))
        for task, prompts in self.plan.prompts.items():
            metrics[str(task)] = prompts[0].example.metric
        answers: dict[str, list[PredictionRow]] = {}
        for prediction in self.predictions:
            answers.setdefault(prediction["cell_id"], []).append(prediction)
        costs: dict[str, list[CostRow]] = {}
        for cost in self.costs:
            costs.setdefault(cost["cell_id"], []).append(cost)
        return [
            result_row(
                cell,
                metrics[str(cell.task)],
                answers[cell_id],
                comparable(costs.get(cell_id, []), self.config.cost_new_tokens),
                self.identity,
                self.earlier_commit,
            )
            for cell_id, cell in cells.items()
            if cell_id in answers
        ]


@contextmanager
def full_disk_as_oserror(file: Path) -> Iterator[None]:
    """safetensors tells a full disk only in the text of an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        file.with_name(file.name + ".tmp").unlink(missing_ok=True)
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None


def prediction_row(cell_id: str, prompt: Prompt, reply: Reply, commit: str | None) -> PredictionRow:
    """The row of predictions.jsonl for one reply of the code at `commit`."""
    example = prompt.example
    return PredictionRow(
        cell_id=cell_id,
        example_id=example.example_id,
        benchmark=example.benchmark,
        task=example.task,
        context_tokens=prompt.context_tokens,
        prompt_sha=prompt.sha,
        prediction=reply.prediction,
        references=list(example.references),
        score=score(example.metric, reply, example.references),
        achieved_compression=reply.achieved_compression,
        finish_reason=reply.finish_reason,
        evidence=[list(span) for span in prompt.evidence],
        cache_bytes=reply.cache_bytes,
        full_cache_bytes=reply.full_cache_bytes,
        attended_fraction=reply.attended_fraction,
        commit=commit,
        max_new_tokens=prompt.max_new_tokens,
        passive_bytes=reply.passive_bytes,
    )


def score(metric: str, reply: Reply, references: Sequence[str]) -> float:
    """0 to 100 by the example's metric; in perplexity the perplexity itself."""
    if reply.perplexity is not None:
        return reply.perplexity
    return float(METRICS.get(metric)(reply.prediction, references))


def now() -> str:
    """The time as in run.json."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
