"""notebooks/quickstart.ipynb runs from top to bottom, here on the toy model; in the repository it has no outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_outputs_are_stripped() -> None:
    assert code_cells()
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


def test_it_runs_from_top_to_bottom(
    toy_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"MODEL": str(toy_model_dir), "TOKENS": "384", "ROWS": "1", "OUTPUT": str(tmp_path / "out")}
    for name, value in settings.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", value)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, cell in enumerate(code_cells()):
            exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), found)

    cache = found["cache"]
    assert cache.seen == 384 and float(cache.stored_counts().float().mean()) == 192
    assert set(found["answers"]) == {"full", "sink_recent", "snapkv", "tova"}
    assert abs(found["plain_loss"] - found["sparse_loss"]) > 1e-3, "hiding entries must change the loss"

    first, second = found["log"]
    assert (first["requested_compression"], second["requested_compression"]) == pytest.approx((0.2, 0.4))
    assert first["achieved_compression"] == pytest.approx(0.2, abs=0.01)
    assert first["kl"] > 0 and first["grad_norm"] > 0 and 0 < first["retained_attention"] < 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()

    rows = found["rows"]
    assert len(rows) == 2 * 2 * 3 and set(rows.model) == {"base", "trained"}
    assert rows[rows.method == "knorm"].achieved_compression.to_numpy() == pytest.approx(0.5, abs=0.01)
    trained = json.loads((tmp_path / "out" / "trained" / "run.json").read_text(encoding="utf-8"))
    assert trained["identity"]["adapter"]
    assert not [path for path in tmp_path.iterdir() if path.name != "out"], "it writes where it is told to"
