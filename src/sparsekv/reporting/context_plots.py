"""Memory, time, throughput and accuracy against the length of the context: a figure each, a line per method.

Needs matplotlib (the extra `vis`). Colours are Okabe and Ito's, which colour-blind readers can tell apart (without
the yellow, too light for lines on white); markers differ too, and lines that coincide differ in width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from sparsekv.reporting.by_context import ByContext, Curve, Point
from sparsekv.reporting.plots import MARKERS, legend_label, verbatim
from sparsekv.reporting.tables import MEGABYTE

UNCOMPRESSED_COLOUR = "#000000"
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", "-.")
WIDEST, NARROWEST = 3.4, 1.4

Value = Callable[[Point], "float | None"]


def context_figures(found: ByContext, title: str) -> dict[str, tuple[str, bytes]]:
    """File name -> (what it shows, PNG); figures of what was not measured are left out.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    both = any(point.passive_bytes for point in found.points)
    tiers = "active tier; dotted: both tiers" if both else "cache"
    panels: dict[str, tuple[str, list[tuple[str, Value]]]] = {
        "memory_by_context.png": (
            "memory of the cache",
            [(f"MB of the {tiers}", lambda p: p.active_bytes / MEGABYTE)],
        ),
        "time_by_context.png": (
            "time to read a context and per token",
            [
                ("seconds to read and compress the context", lambda p: p.read_s),
                (
                    "milliseconds per token of the answer",
                    lambda p: None if p.token_s is None else 1000 * p.token_s,
                ),
            ],
        ),
        "throughput_by_context.png": (
            "throughput of whole requests",
            [("tokens of the answer per second of the request", lambda p: p.throughput)],
        ),
        "accuracy_by_context.png": (
            "accuracy",
            [
                (
                    f"average score over {found.n_scored} task{'s' if found.n_scored != 1 else ''} (0–100)",
                    lambda p: p.score,
                )
            ],
        ),
    }
    made = {}
    for name, (shows, values) in panels.items():
        if any(value(point) is not None for _, value in values for point in found.points):
            made[name] = shows, _figure(found, f"{title}: {shows}", values, name.startswith("memory"))
    return made


@verbatim()
def _figure(found: ByContext, title: str, values: Sequence[tuple[str, Value]], by_tier: bool) -> bytes:
    """One panel per value, side by side, and one legend beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n_lines = len(found.curves)
    size = 4.6 * len(values) + 2.8, max(4.2, 0.27 * n_lines + 1.4)
    figure, panels = plt.subplots(1, len(values), figsize=size, layout="constrained", squeeze=False)
    for axes, (label, value) in zip(panels[0], values, strict=True):
        for index, curve in enumerate(found.curves):
            look = _look(index, curve, n_lines)
            _draw(axes, curve, value, **look, label=legend_label(curve.name))
            if by_tier and any(point.passive_bytes for point in curve.points.values()):
                whole = look | {"linestyle": ":", "linewidth": NARROWEST}
                _draw(axes, curve, _both_tiers, **whole, label=legend_label(f"{curve.name}, both tiers"))
        _dress(axes, found.sizes, label)
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9.5)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def _both_tiers(point: Point) -> float:
    return (point.active_bytes + point.passive_bytes) / MEGABYTE


def _look(index: int, curve: Curve, n_lines: int) -> dict[str, Any]:
    """How a curve is drawn, the same in all figures; later curves are narrower, so that none hides another."""
    turn = index // len(COLOURS)
    return {
        "color": UNCOMPRESSED_COLOUR if curve.uncompressed else COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "linewidth": WIDEST - (WIDEST - NARROWEST) * index / max(n_lines - 1, 1),
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "markersize": 9 - 4 * index / max(n_lines - 1, 1),
        "markerfacecolor": "none",
        "markeredgewidth": 1.4,
    }


def _draw(axes: Any, curve: Curve, value: Value, **look: Any) -> None:
    known = {size: y for size, point in curve.points.items() if (y := value(point)) is not None}
    if known:
        axes.plot(list(known), list(known.values()), **look)


def _dress(axes: Any, sizes: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
