"""What fitting leaves: `output_dir/final/` with predictors, config, held-out report and card. No path of a machine.

Imports no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsekv import __version__
from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.files import write_atomically
from sparsekv.training.card import TAGS, front_matter, license_of, settings_table
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.output import FINAL, METRICS_FILE, public_settings, whole_folder, write_json

FIT_CONFIG_FILE = "fit_config.json"
REPORT_FILE = "held_out.json"


def write_fit_config(folder: Path, config: FitConfig) -> None:
    """Write fit_config.json, which `sparsekv relevance fit` reads; absolute paths are left out but for their name."""
    write_json(folder / FIT_CONFIG_FILE, public_settings(config))


def read_fit_config(folder: Path) -> FitConfig:
    """The config in a checkpoint's fit_config.json.

    Raises
    ------
    ConfigError
        If there is none (the checkpoint is of something else), or it cannot be read.
    """
    path = folder / FIT_CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"checkpoint '{folder}' has no {FIT_CONFIG_FILE}: it is not of `sparsekv relevance fit`; use another "
            "output_dir"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return parse_config(FitConfig, settings, source=str(path))


def save_fitted(
    config: FitConfig, report: Mapping[str, Any], save_weights: Callable[[Path], object], metrics: Path
) -> Path:
    """Write `output_dir/final`, which appears under its name when it is whole, and return it.

    Parameters
    ----------
    config : FitConfig
    report : of `fit_report.judge`
    save_weights : writes relevance.safetensors into the folder it is given
    metrics : metrics.jsonl of the run
    """
    output = Path(config.output_dir).expanduser()
    with whole_folder(output) as folder:
        save_weights(folder)
        write_fit_config(folder, config)
        write_json(folder / REPORT_FILE, report)
        if metrics.exists():
            shutil.copyfile(metrics, folder / METRICS_FILE)
        card = fit_card(public_settings(config), report, license_id=license_of(config.model))
        write_atomically(folder / "README.md", card)
    return output / FINAL


def fit_card(settings: Mapping[str, Any], report: Mapping[str, Any], *, license_id: str | None) -> str:
    """The model card as text: YAML front matter and Markdown, with measured numbers only."""
    base = settings["model"]
    front: dict[str, Any] = {"base_model": base}
    if license_id is not None:
        front["license"] = license_id
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["learned-eviction", *TAGS]
    lines = [
        *front_matter(front),
        f"# Relevance predictors for {base.rpartition('/')[2]}",
        "",
        f"A score per token, layer and kv head of {base} that tells which KV-cache entries later queries will need.",
        f"The model itself is as it was: it was frozen while these were fitted with sparsekv {__version__}.",
        "",
        *settings_table(_settings(settings)),
        "`fit_config.json` has all of them; `sparsekv relevance fit fit_config.json` runs them again, where the files",
        "that it names are there.",
        "",
        "## Held out",
        "",
        *_held_out(report),
        "",
        "## Use",
        "",
        "With this folder downloaded as `fitted`:",
        "",
        "```python",
        "from sparsekv import Budget, compress, load_model",
        "",
        f'model, tokenizer = load_model("{base}", adapter="fitted")',
        'ids = tokenizer("a long context", return_tensors="pt").input_ids',
        'cache = compress(model, ids, "relevance", Budget(compression_ratio=0.7, scope="model"), tokenizer=tokenizer)',
        "```",
        "",
        "In an evaluation: `sparsekv eval CONFIG adapter=fitted`, method `relevance`, `budget_scope: model`.",
        "",
    ]
    return "\n".join(lines)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    own, futures = settings["predictor"], settings["futures"]
    kind = f"{own['width']} hidden units" if own["width"] else "linear"
    rows = [("way", settings["way"]), ("predictors", f"{kind}, on {', '.join(own['features'])}")]
    if settings["way"] == "regression":
        regression = settings["regression"]
        rows.append(("targets", f"the most attention from {' and '.join(futures['kinds'])}"))
        rows.append(("loss, solver", f"{regression['loss']}, {regression['solver']}"))
    else:
        rows.append(("objective", settings["end_to_end"]["objective"]["name"]))
        rows.append(("ratio (fraction removed)", settings["end_to_end"]["curriculum"]["name"]))
    rows.append(
        ("steps", f"{settings['steps']} of {settings['batch_size']} samples, seed {settings['seed']}")
    )
    if settings["regression"]["solver"] != "least_squares":
        rows.append(("learning rate", f"{settings['lr']:g}, {settings['schedule']}"))
    return rows


def _held_out(report: Mapping[str, Any]) -> list[str]:
    """The rank correlations as tables."""
    fitted, untrained = report["fitted"], report["untrained"]
    rows = [
        f"| {layer} | {_two(value)} | {_two(untrained['layers'][layer])} |"
        for layer, value in fitted["layers"].items()
    ]
    return [
        f"On {report['samples']} samples that were not fitted on. Spearman's rank correlation of the scores with the",
        f"most attention that an entry later gets ({' and '.join(report['futures'])}); by layer it is the mean over kv",
        "heads.",
        "",
        "| layer | fitted | untrained |",
        "|---|---:|---:|",
        f"| whole model | {_two(fitted['model'])} | {_two(untrained['model'])} |",
        *rows,
        "",
        "How many of the entries that get the most attention, in the whole model, are kept:",
        "",
        "| removed | fitted | untrained |",
        "|---:|---:|---:|",
        *(
            f"| {ratio} | {_two(value)} | {_two(untrained['kept'][ratio])} |"
            for ratio, value in fitted["kept"].items()
        ),
    ]


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
