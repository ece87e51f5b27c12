"""Score against achieved compression, one line per method. Needs matplotlib (the extra `vis`)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sparsekv.evaluation.records import ResultRow
from sparsekv.reporting.summary import Line, summarize

MARKERS = "osD^vP*Xph<>8d"
# Tick labels are set as mathematics by some users' settings, and would then show its source.
VERBATIM = {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}


@contextmanager
def verbatim() -> Iterator[None]:
    """Texts of figures are drawn as they are: labels and models are the user's, and a "$" in them is no mathematics.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context(VERBATIM):
        yield


def legend_label(name: str) -> str:
    """A line's label that shows `name`: matplotlib leaves labels that start with "_" out of legends."""
    return f" {name}" if name.startswith("_") else name


@verbatim()
def scores_png(
    rows: Sequence[ResultRow], title: str, labels: Mapping[str, str] | None = None
) -> bytes | None:
    """A PNG: the average score of every method over its achieved compression, and the uncompressed score as
    a line. Averages that are not over the same rows as the others are left out.

    Returns
    -------
    bytes, or None if there is nothing to draw: no compressed line, or no task whose score is a percentage.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    summary = summarize(rows, labels)
    curves: dict[str, list[Line]] = {}
    for line in summary.lines:
        if not line.uncompressed and line.average is not None and line.complete:
            curves.setdefault(line.method, []).append(line)
    if not curves:
        return None
    # Best first, so that the legend reads in the order of the curves.
    methods = sorted(
        curves, key=lambda name: -sum(line.average or 0.0 for line in curves[name]) / len(curves[name])
    )
    palette = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors
    height = max(4.8, 0.27 * len(methods) + 1.4)
    figure, axes = plt.subplots(figsize=(8.6 if len(methods) <= 12 else 11, height), layout="constrained")
    for line in summary.lines:
        if line.uncompressed and line.average is not None and line.complete:
            axes.axhline(line.average, color="0.25", linestyle="--", linewidth=1.3, label="uncompressed")
    for index, method in enumerate(methods):
        points = sorted(curves[method], key=lambda line: line.achieved)
        axes.plot(
            [line.achieved for line in points],
            [line.average for line in points],
            marker=MARKERS[(index // len(palette) + index) % len(MARKERS)],
            color=palette[index % len(palette)],
            markersize=7,
            linewidth=1.6,
            label=legend_label(method),
        )
    n_tasks = len(summary.percentages)
    axes.set_xlabel("achieved compression (fraction of KV entries removed)")
    axes.set_ylabel(f"average score over {n_tasks} task{'s' if n_tasks != 1 else ''} (0–100)")
    achieved = [line.achieved for lines in curves.values() for line in lines]
    axes.set_xlim(max(-0.02, min(achieved) - 0.08), min(1.0, max(achieved) + 0.08))
    top = max(line.average for line in summary.lines if line.average is not None)
    axes.set_ylim(-0.02 * max(top, 10), min(103, max(top, 10) * 1.08 + 1))
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()
