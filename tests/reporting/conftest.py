"""What pictures show."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def legend_texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What the legends of figures show once they are drawn, and whether as mathematics."""
    from matplotlib.axes import Axes

    texts: list[tuple[str, bool]] = []
    legend = Axes.legend

    def record(self: Axes, **options: Any) -> Any:
        made = legend(self, **options)
        texts.extend((text.get_text(), text.get_parse_math()) for text in made.get_texts())
        return made

    monkeypatch.setattr(Axes, "legend", record)
    return texts
