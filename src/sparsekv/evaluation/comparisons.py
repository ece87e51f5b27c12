"""Settings of several variants beside each other: differences with intervals, shares, gaps closed.

Knows scores; nothing of models or folders. What is compared with what:

    baseline   every setting, with the baseline: one setting of one variant, the base's full cache
    same       a variant's setting, with the same method and budget in the baseline's variant; and the mean over methods
    own        a compressed setting, with the full cache of its own variant

`same` and `own` are left out where they are the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsekv.benchmarks.scoring import higher_is_better
from sparsekv.config import CompareConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.bootstrap import Estimate, Floats, Means, Statistic, average, estimate, paired_means
from sparsekv.evaluation.cells import UNCOMPRESSED, Setting, Task
from sparsekv.evaluation.records import SCHEMA_VERSION, ComparisonRow

NOTHING = Estimate(None, None, None)


@dataclass(frozen=True)
class Line:
    """A setting of a variant."""

    variant: str
    setting: Setting

    @property
    def compressed(self) -> bool:
        """Whether anything is evicted."""
        return self.setting.method != UNCOMPRESSED

    @property
    def budget(self) -> tuple[float | None, int | None]:
        """As requested."""
        return self.setting.compression_ratio, self.setting.budget_tokens


@dataclass(frozen=True)
class TaskScores:
    """What all lines scored on the same rows of one task.

    Parameters
    ----------
    metric : the task's
    scores : float [rows, lines]
    achieved : float [lines], mean achieved_compression
    """

    metric: str
    scores: Floats
    achieved: Floats


def baseline_line(settings: Mapping[str, Sequence[Setting]], config: CompareConfig) -> Line:
    """The line that all others are compared with.

    Parameters
    ----------
    settings : variant -> its settings, in order

    Raises
    ------
    ConfigError
        If the baseline's variant has no such method, or has it at several budgets.
    """
    variant = config.baseline or next(iter(settings))
    found = [s for s in settings[variant] if config.method in (s.method, s.label)]
    if len(found) != 1:
        problem = "is not a method" if not found else f"has {len(found)} budgets"
        labels = ", ".join(dict.fromkeys(s.label for s in settings[variant]))
        raise ConfigError(
            f"compare.method '{config.method}' {problem} of variant '{variant}'; it must be one of its methods, with "
            f"one budget: {labels}"
        )
    return Line(variant, found[0])


def compare(
    lines: Sequence[Line],
    baseline: Line,
    tasks: Mapping[Task, TaskScores],
    config: CompareConfig,
    run_seed: int = 0,
) -> list[ComparisonRow]:
    """The rows of comparisons.jsonl: of every pair its average over tasks, then each task.

    The average is over the tasks that are percentages and on which the baseline scores at least `min_baseline_score`;
    where there is none, there are no averages.

    Parameters
    ----------
    lines : all that was run; `baseline` is one of them
    tasks : columns of their scores are `lines`
    """
    return _Comparison(lines, baseline, tasks, config, run_seed).rows()


class _Comparison:
    def __init__(
        self,
        lines: Sequence[Line],
        baseline: Line,
        tasks: Mapping[Task, TaskScores],
        config: CompareConfig,
        run_seed: int,
    ) -> None:
        self.lines, self.tasks, self.config = list(lines), tasks, config
        self.seed = run_seed if config.seed is None else config.seed
        self.base = self.lines.index(baseline)
        self.means = {
            task: paired_means(found.scores, config.resamples, self.seed, str(task))
            for task, found in tasks.items()
        }
        self.counted = [
            task
            for task, found in tasks.items()
            if higher_is_better(found.metric)
            and self.means[task].observed[self.base] >= config.min_baseline_score
        ]
        self.average = average([self.means[task] for task in self.counted]) if self.counted else None

    def rows(self) -> list[ComparisonRow]:
        """All pairs, in the order of `lines`."""
        found: list[ComparisonRow] = []
        for index in range(len(self.lines)):
            if index != self.base:
                found += self._pair("baseline", [index], [self.base])
        same = self._same()
        for index, other in same.items():
            if other != self.base:
                found += self._pair("same", [index], [other])
        groups: dict[tuple[str, tuple[float | None, int | None]], list[int]] = {}
        for index in same:
            if self.lines[index].compressed:
                groups.setdefault((self.lines[index].variant, self.lines[index].budget), []).append(index)
        for group in groups.values():
            if len(group) > 1:
                found += self._pair("same", group, [same[index] for index in group])
        for index, line in enumerate(self.lines):
            own = self._uncompressed(line.variant)
            if line.compressed and own not in (None, self.base):
                found += self._pair("own", [index], [own])
        return found

    def _same(self) -> dict[int, int]:
        """Line of another variant -> the line of the baseline's variant with the same setting."""
        home = self.lines[self.base].variant
        pairs = {}
        for index, line in enumerate(self.lines):
            twin = Line(home, line.setting)
            if line.variant != home and twin in self.lines:
                pairs[index] = self.lines.index(twin)
        return pairs

    def _uncompressed(self, variant: str) -> int | None:
        return next(
            (i for i, line in enumerate(self.lines) if line.variant == variant and not line.compressed), None
        )

    def _best_rival(self, line: Line) -> int | None:
        """The best compressed line of the baseline's variant at a line's budget, on average."""
        home = self.lines[self.base].variant
        if self.average is None or line.variant == home or not line.compressed:
            return None
        rivals = [
            i
            for i, other in enumerate(self.lines)
            if other.variant == home and other.compressed and other.budget == line.budget
        ]
        observed = self.average.observed
        return max(rivals, key=lambda index: observed[index], default=None)

    def _pair(self, against: str, ours: list[int], theirs: list[int]) -> list[ComparisonRow]:
        found = [] if self.average is None else [self._row(against, ours, theirs, None, self.average)]
        return found + [self._row(against, ours, theirs, task, means) for task, means in self.means.items()]

    def _row(
        self, against: str, ours: list[int], theirs: list[int], task: Task | None, means: Means
    ) -> ComparisonRow:
        """One comparison of the mean over lines `ours` with that over `theirs`; `task` None: the average."""
        confidence = self.config.confidence
        line, other = self.lines[ours[0]], self.lines[theirs[0]]
        alone = len(ours) == 1
        tasks = self.counted if task is None else [task]

        def difference(m: Floats) -> Floats:
            return m[..., ours].mean(axis=-1) - m[..., theirs].mean(axis=-1)

        def percent(m: Floats) -> Floats:
            return 100 * m[..., ours].mean(axis=-1) / m[..., theirs].mean(axis=-1)

        apart, share = estimate(means, difference, confidence), estimate(means, percent, confidence)
        rival = self._best_rival(line) if against == "baseline" and task is None else None
        closed = NOTHING if rival is None else estimate(means, self._closed(ours[0], rival), confidence)
        return ComparisonRow(
            schema_version=SCHEMA_VERSION,
            against=against,
            variant=line.variant,
            method=line.setting.method if alone else None,
            method_args=line.setting.args if alone else {},
            label=line.setting.label if alone else f"mean of {len(ours)} methods",
            compression_ratio=line.setting.compression_ratio,
            budget_tokens=line.setting.budget_tokens,
            budget_scope=line.setting.budget_scope if alone else None,
            achieved_compression=float(np.mean([self.tasks[t].achieved[ours].mean() for t in tasks])),
            reference_variant=other.variant,
            reference_method=other.setting.method if alone else None,
            benchmark=None if task is None else task.benchmark,
            task=None if task is None else task.task,
            context_length=None if task is None else task.context_length,
            tasks=[str(t) for t in tasks],
            in_average=task is None or task in self.counted,
            metric=None if task is None else self.tasks[task].metric,
            n=sum(len(self.tasks[t].scores) for t in tasks),
            score=float(means.observed[ours].mean()),
            reference_score=float(means.observed[theirs].mean()),
            difference=float(difference(means.observed)),
            difference_interval=apart.interval,
            percent=share.value,
            percent_interval=share.interval,
            gap_closed=closed.value,
            gap_closed_interval=closed.interval,
            gap_closed_from=None if rival is None else self.lines[rival].setting.label,
            confidence=confidence,
            resamples=self.config.resamples,
            seed=self.seed,
        )

    def _closed(self, ours: int, rival: int) -> Statistic:
        """Percent of the way from the best rival to the baseline; undefined where the rival is no worse."""

        def share(m: Floats) -> Floats:
            gap = m[..., self.base] - m[..., rival]
            return 100 * (m[..., ours] - m[..., rival]) / np.where(gap > 0, gap, np.nan)

        return share
