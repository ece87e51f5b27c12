"""Variants beside the baseline: tables of differences with their intervals. Reads rows of comparisons.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekv.benchmarks.scoring import higher_is_better
from sparsekv.evaluation.cells import UNCOMPRESSED, shown_budget
from sparsekv.evaluation.records import ComparisonRow, ResultRow
from sparsekv.evaluation.results import joined_commits
from sparsekv.reporting.grid import Grid
from sparsekv.reporting.tables import facts_of, facts_table

LINE = ("variant", "method", "requested")
PAGE = "results.md"


def grids(rows: Sequence[ComparisonRow]) -> list[Grid]:
    """What a terminal shows: against the baseline, against the same method, and what is no percentage."""
    found = [_against_baseline(rows), _against_same(rows)]
    return [grid for grid in (*found, *_lower_is_better(rows)) if grid.rows]


def notes(rows: Sequence[ComparisonRow]) -> list[str]:
    """What a reader must know to read the tables."""
    if not rows:
        return ["there is one setting only: nothing to compare"]
    first = rows[0]
    found = [
        f"[low, high]: {first['confidence']:.0%} interval of a paired bootstrap over rows, within each task "
        f"({first['resamples']} resamples, seed {first['seed']}); –: can't be told, or not defined",
        "requested: compression_ratio, the fraction of the context's entries to remove; achieved: the fraction really "
        "removed, mean over the tasks of the average",
    ]
    singles = [row for row in _to_baseline(rows) if row["task"] is not None and _is_percentage(row)]
    name = _baseline_name(first)
    counted = list(dict.fromkeys(row["tasks"][0] for row in singles if row["in_average"]))
    left_out = {row["tasks"][0]: row["reference_score"] for row in singles if not row["in_average"]}
    many = "" if len(counted) == 1 else "s"
    found.append(f"average over {len(counted)} task{many}: {', '.join(counted) or 'none'}")
    if left_out:
        shown = ", ".join(f"{task} ({score:.1f})" for task, score in left_out.items())
        found.append(f"left out of the average, {name} scores too little on them: {shown}")
    rivals = dict.fromkeys(
        f"{row['gap_closed_from']} at {shown_requested(row)}" for row in rows if row["gap_closed_from"]
    )
    if rivals:
        best = ", ".join(rivals)
        found.append(
            f"gap closed: percent of the way from the best method of variant {first['reference_variant']} at the same "
            f"budget ({best}) to {name}"
        )
    return found


def _against_baseline(rows: Sequence[ComparisonRow]) -> Grid:
    averages = [row for row in _to_baseline(rows) if row["task"] is None]
    name = _baseline_name(rows[0]) if rows else ""
    lines = [
        (
            *_line(row),
            f"{row['score']:.1f}",
            _value(row["difference"], row["difference_interval"], signed=True),
            _value(row["percent"], row["percent_interval"]),
            _value(row["gap_closed"], row["gap_closed_interval"]),
            f"{row['achieved_compression']:.3f}",
        )
        for row in averages
    ]
    if averages:
        first = averages[0]
        base = (first["reference_variant"], str(first["reference_method"]), "–")
        lines.insert(0, (*base, f"{first['reference_score']:.1f}", "–", "–", "–", "–"))
    header = (*LINE, "average", "difference", "% of baseline", "gap closed %", "achieved")
    return Grid(f"Against {name}", header, tuple(lines), 2, frozenset({0}), spare=3)


def _against_same(rows: Sequence[ComparisonRow]) -> Grid:
    same = [row for row in rows if row["against"] == "same" and row["task"] is None]
    lines = tuple(
        (
            *_line(row),
            f"{row['reference_score']:.1f}",
            f"{row['score']:.1f}",
            _value(row["difference"], row["difference_interval"], signed=True),
        )
        for row in same
    )
    means = frozenset(index for index, row in enumerate(same) if row["method"] is None)
    home = same[0]["reference_variant"] if same else ""
    header = (*LINE, home, "average", "difference")
    return Grid(f"Against the same method of {home}", header, lines, 2, means)


def _lower_is_better(rows: Sequence[ComparisonRow]) -> list[Grid]:
    """One table per task that is no percentage: perplexity, beside the baseline and the own uncompressed cache."""
    found = []
    own = {_key(row): row for row in rows if row["against"] == "own" and row["task"] is not None}
    tasks = dict.fromkeys(
        row["tasks"][0] for row in rows if row["task"] is not None and not _is_percentage(row)
    )
    for task in tasks:
        ours = [row for row in _to_baseline(rows) if row["task"] is not None and row["tasks"] == [task]]
        lines = [
            (
                *_line(row),
                f"{row['score']:.2f}",
                _value(row["percent"], row["percent_interval"]),
                _value(*_share(own.get(_key(row)))),
            )
            for row in ours
        ]
        first = ours[0]
        base = (first["reference_variant"], str(first["reference_method"]), "–")
        lines.insert(0, (*base, f"{first['reference_score']:.2f}", "–", "–"))
        header = (*LINE, str(first["metric"]), "% of baseline", "% of own full")
        found.append(Grid(f"{task} (lower is better)", header, tuple(lines), 2, frozenset({0}), spare=1))
    return found


def task_grid(rows: Sequence[ComparisonRow]) -> Grid:
    """Every setting's score on every task, and its difference from the baseline."""
    singles = [row for row in _to_baseline(rows) if row["task"] is not None]
    tasks = list(dict.fromkeys(row["tasks"][0] for row in singles))
    lines: dict[tuple[Any, ...], dict[str, ComparisonRow]] = {}
    for row in singles:
        lines.setdefault(_key(row)[:-1], {})[row["tasks"][0]] = row
    body = [
        (*_line(next(iter(found.values()))), *(f"{_scored(found[task])}" for task in tasks))
        for found in lines.values()
    ]
    if singles:
        first = singles[0]
        base = {row["tasks"][0]: row["reference_score"] for row in singles}
        name = (first["reference_variant"], str(first["reference_method"]), "–")
        body.insert(0, (*name, *(f"{base[task]:.1f}" for task in tasks)))
    return Grid("Every task", (*LINE, *tasks), tuple(body), 2)


def own_grid(rows: Sequence[ComparisonRow]) -> Grid:
    """Every compressed setting of the other variants, in percent of its own variant's uncompressed score."""
    found = [row for row in rows if row["against"] == "own"]
    tasks = list(dict.fromkeys(row["tasks"][0] for row in found if row["task"] is not None))
    lines: dict[tuple[Any, ...], dict[str, ComparisonRow]] = {}
    for row in found:
        lines.setdefault(_key(row)[:-1], {})["average" if row["task"] is None else row["tasks"][0]] = row
    columns = ["average", *tasks]
    body = [
        (*_line(next(iter(line.values()))), *(_value(*_share(line.get(name))) for name in columns))
        for line in lines.values()
    ]
    return Grid("Percent of the variant's own uncompressed score", (*LINE, *columns), tuple(body), 2)


def variants_page(
    rows: Sequence[ComparisonRow],
    runs: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Sequence[ResultRow]],
    finished: str | None,
) -> str:
    """results.md of a run of variants.

    Parameters
    ----------
    rows : of comparisons.jsonl
    runs, results : variant -> its run.json, and its rows of results.jsonl
    finished : when the whole was done
    """
    parts = ["# Results\n"]
    for grid in (*grids(rows), task_grid(rows), own_grid(rows)):
        if grid.rows:
            parts.append(f"## {grid.title}\n\n{grid.markdown()}")
    parts.append("\n".join(f"- {note}" for note in notes(rows)) + "\n")
    parts.append("Each variant alone: " + ", ".join(f"[{name}]({name}/{PAGE})" for name in runs) + "\n")
    facts = [facts_of(results[name], {**run, "finished": finished}) for name, run in runs.items()]
    models = {f"model of {name}": fact["model"] for name, fact in zip(runs, facts, strict=True)}
    commits = joined_commits(c for fact in facts if fact["commit"] != "–" for c in fact["commit"].split(", "))
    shared = {key: text for key, text in facts[0].items() if key != "model"} | {"commit": commits or "–"}
    parts.append(facts_table({"command": shared.pop("command"), **models, **shared}))
    return "\n".join(parts)


def shown_requested(row: ComparisonRow) -> str:
    """The budget as it was asked for; "–" for an uncompressed line."""
    if row["method"] == UNCOMPRESSED:
        return "–"
    return shown_budget(row["compression_ratio"], row["budget_tokens"])


def _to_baseline(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    return [row for row in rows if row["against"] == "baseline"]


def _baseline_name(row: ComparisonRow) -> str:
    return f"{row['reference_variant']}, {row['reference_method']}"


def _is_percentage(row: ComparisonRow) -> bool:
    return row["metric"] is not None and higher_is_better(row["metric"])


def _key(row: ComparisonRow) -> tuple[Any, ...]:
    """What a row compares, whatever with; the task is last."""
    budget = row["compression_ratio"], row["budget_tokens"], row["budget_scope"]
    return row["variant"], row["label"], *budget, tuple(row["tasks"]) if row["task"] is not None else None


def _line(row: ComparisonRow) -> tuple[str, str, str]:
    scope = "" if row["budget_scope"] in ("head", None) else f" ({row['budget_scope']})"
    return row["variant"], row["label"] + scope, shown_requested(row)


def _share(row: ComparisonRow | None) -> tuple[float | None, list[float] | None]:
    return (None, None) if row is None else (row["percent"], row["percent_interval"])


def _scored(row: ComparisonRow) -> str:
    return f"{row['score']:.1f} ({_value(row['difference'], row['difference_interval'], signed=True)})"


def _value(value: float | None, interval: Sequence[float] | None, signed: bool = False) -> str:
    """ "97.2 [95.1, 99.0]"; signed: "+1.0 [-0.5, +2.5]"."""
    form = "+.1f" if signed else ".1f"
    if value is None:
        return "–"
    ends = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    return f"{value:{form}}{ends}"
