"""Other names that users know for what presses and methods take, with ours. Plain data, no torch."""

from __future__ import annotations

RATIOS: dict[str, str] = {"drop_ratio": "compression_ratio", "keep_ratio": "compression_ratio"}
"""`keep_ratio` is the complement."""

PROTECTED: dict[str, str] = {"protect_start": "n_sink", "protect_recent": "n_recent", "recent": "n_recent"}
"""Entries that always stay."""

OF_ANCHORS: dict[str, str] = {"n_sink": "sink_size", "n_recent": "recent_size"}
"""Ours, with the fields of an AnchorConfig."""


def names_of(parameter: str) -> tuple[str, ...]:
    """Every name of one of our parameters, its own first."""
    others = [name for name, ours in {**RATIOS, **PROTECTED}.items() if ours == parameter]
    anchors = [OF_ANCHORS[parameter]] if parameter in OF_ANCHORS else []
    return (parameter, *others, *anchors)
