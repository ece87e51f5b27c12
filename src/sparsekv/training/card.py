"""The model card of a trained adapter or model: a README.md fit for a Hub repository. Only measured numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsekv import __version__
from sparsekv.models import public_id

TAGS = ("kv-cache", "kv-cache-compression", "long-context", "sparsekv")
_NOT_MEASURED = {"step", "epoch", "learning_rate", "grad_norm", "total_flos"}
_LABELS = {
    "loss": "loss",
    "ce": "cross-entropy per token",
    "kl": "KL to the full-cache teacher per token",
    "requested_compression": "requested compression",
    "achieved_compression": "achieved compression",
    "retained_attention": "retained attention",
    "tokens_per_s": "tokens per second",
}


def write_card(
    folder: Path, settings: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], *, base: str
) -> None:
    """Write `folder/README.md`.

    Parameters
    ----------
    folder : Path
        With the adapter or model in it, and relevance.safetensors if predictors were trained.
    settings : mapping
        The config without paths (`output.public_settings`).
    metrics : sequence of mappings
        The rows of metrics.jsonl.
    base : str
        The model as it was named for loading; its license is looked up where its files are.
    """
    card = model_card(
        settings,
        metrics,
        license_id=license_of(base),
        relevance=(folder / "relevance.safetensors").is_file(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    license_id: str | None,
    relevance: bool,
) -> str:
    """The card as text: YAML front matter and Markdown.

    Parameters
    ----------
    settings, metrics
        As for `write_card`. What was trained (`train_model`) decides what the card says of how to load it.
    license_id : of the base; None if it isn't known
    relevance : whether predictors lie beside
    """
    base, trained = settings["model"], settings["train_model"]
    adapter, whole = trained == "lora", trained == "full"
    front: dict[str, Any] = {"base_model": base}
    if license_id is not None:
        front["license"] = license_id
    front["library_name"] = "peft" if adapter else "transformers"
    front["pipeline_tag"] = "text-generation"
    front["tags"] = [*(("lora",) if adapter else ()), *(("learned-eviction",) if relevance else ()), *TAGS]
    if adapter:
        front["base_model_relation"] = "adapter"
    elif whole:
        front["base_model_relation"] = "finetune"
    what = "A LoRA adapter for" if adapter else "Fine-tuned from" if whole else "Relevance predictors for"
    lines = [
        *front_matter(front),
        f"# {base.rpartition('/')[2]}, trained under KV-cache eviction",
        "",
        f"{what} [{base}](https://huggingface.co/{base})" if "/" in base else f"{what} {base}",
        f"that was trained with sparsekv {__version__} while KV entries were missing,",
        "so that it loses less when they are evicted.",
        *(
            ["`relevance.safetensors` holds a score per layer and kv head that tells which entries to keep."]
            if relevance
            else []
        ),
        "",
        *settings_table(_settings(settings)),
        "`training_config.json` has all of them; `sparsekv train training_config.json` runs them again, where the",
        "files that it names are there.",
        "",
        "## Measured while training",
        "",
        *_measured(metrics),
        "",
        "## Use",
        "",
        *_use(base, trained, relevance),
        "",
    ]
    return "\n".join(lines)


def front_matter(values: Mapping[str, Any]) -> list[str]:
    """The lines of a card's YAML front matter, and an empty one."""
    return ["---", yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def settings_table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of a card's section of settings, and an empty one."""
    return ["## Settings", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def license_of(base: str) -> str | None:
    """The license of a model as the Hub spells it: of an embedded model, or from the card beside the model's files.

    Asks no network: None where neither is on this machine.
    """
    from sparsekv.models.embedded import embedded_by_public_id

    embedded = embedded_by_public_id(public_id(base))
    if embedded is not None:
        return embedded.license.lower()
    card = Path(base).expanduser() / "README.md"
    if not card.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(base, "README.md")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    found = _front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license")
    return found if isinstance(found, str) else None


def _front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    press, method, relevance = settings.get("press"), settings.get("method"), settings.get("relevance") or {}
    drops = press or method
    rows = [
        ("entries dropped by", _named(drops) if drops else "learned relevance"),
        (
            "dropping",
            settings["dropping"] + (f", window {settings['window']}" if settings.get("window") else ""),
        ),
        ("ratio (fraction removed)", _named(settings["curriculum"])),
        ("objective", _objective(settings["objective"])),
        ("trained", settings["train_model"]),
    ]
    lora = settings.get("lora")
    if lora:
        rows.append(("LoRA", f"r {lora['r']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}"))
    if relevance.get("enabled"):
        width = relevance["width"]
        kind = f"{width} hidden units" if width else "linear"
        rows.append(("predictors", f"{kind}, learning rate {relevance['lr']:g}"))
    samples = settings["batch_size"] * settings["accumulation"]
    rows.append(("steps", f"{settings['steps']} of {samples} samples per process, seed {settings['seed']}"))
    rows.append(("learning rate", f"{settings['lr']:g}, {settings['schedule']}"))
    return rows


def _named(part: Mapping[str, Any]) -> str:
    args = ", ".join(f"{key}={value}" for key, value in part.get("args", {}).items())
    return f"{part['name']}({args})" if args else str(part["name"])


def _objective(part: Mapping[str, Any]) -> str:
    if part["name"] == "eit":
        return f"cross-entropy + {part['lambda_kl']:g} · KL at temperature {part['temperature']:g}"
    if part["name"] == "mixed":
        return " + ".join(f"{weight:g} · {name}" for name, weight in part["weights"].items())
    return str(part["name"])


def _measured(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last value of everything that was logged, with its step."""
    last: dict[str, tuple[float, int]] = {}
    for row in metrics:
        for key, value in row.items():
            if key not in _NOT_MEASURED and isinstance(value, (int, float)) and not isinstance(value, bool):
                last[key] = (value, row["step"])
    if not last:
        return ["Nothing was logged."]
    rows = [f"| {_LABELS.get(key, key)} | {value:.4g} | {step} |" for key, (value, step) in last.items()]
    return [
        "| | last value | at step |",
        "|---|---|---|",
        *rows,
        "",
        "`metrics.jsonl` has them at every step.",
    ]


def _use(base: str, trained: str, relevance: bool) -> list[str]:
    """How to load it: an adapter on its base, a whole model, or predictors on the base they were trained for."""
    alone = trained == "frozen"
    name = {"lora": f'"{base}", adapter="trained"', "full": '"trained"', "frozen": f'"{base}"'}[trained]
    lines = ["With this folder downloaded as `trained`:", "", "```python", "from sparsekv import load_model"]
    if alone:
        lines += ["from sparsekv.relevance import load_relevance"]
    lines += ["", f"model, tokenizer = load_model({name})"]
    if alone:
        lines += ['load_relevance(model, "trained")']
    lines += ["```", ""]
    if relevance:
        lines += ["The predictors are attached then; method `relevance` evicts by them.", ""]
    if trained == "full":
        return [*lines, "It is a plain folder, which any engine serves."]
    return [
        *lines,
        "As a plain folder that any engine serves:",
        "",
        f"    sparsekv merge trained --model {base} --output merged",
    ]
