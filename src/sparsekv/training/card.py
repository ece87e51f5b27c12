"""The model card of a trained adapter or model: a README.md fit for a Hub repository. Only measured numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsekv import __version__
from sparsekv.models import public_id
from sparsekv.training.config_parts import ObjectiveConfig

if TYPE_CHECKING:
    from sparsekv.training.objective import Objective

TAGS = ("kv-cache", "kv-cache-compression", "long-context", "sparsekv")
_NOT_MEASURED = {"step", "epoch", "learning_rate", "grad_norm", "total_flos"}
_LABELS = {
    "loss": "loss",
    "ce": "cross-entropy per token",
    "kl": "KL to the full-cache teacher per token",
    "kl_context": "KL to the full-cache teacher per token of the context",
    "requested_compression": "requested compression",
    "achieved_compression": "achieved compression",
    "retained_attention": "retained attention, of that step alone",
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
        lora=_lora_of(folder),
        relevance=(folder / "relevance.safetensors").is_file(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    license_id: str | None,
    relevance: bool,
    lora: Mapping[str, Any] | None = None,
) -> str:
    """The card as text: YAML front matter and Markdown.

    Parameters
    ----------
    settings, metrics
        As for `write_card`. What was trained (`train_model`) decides what the card says of how to load it.
    license_id : of the base; None if it isn't known
    relevance : whether predictors lie beside
    lora : r, alpha and targets of the adapter, where the settings don't say them because training went on from one
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
        *settings_table(_settings(settings, settings.get("lora") or lora)),
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


def _lora_of(folder: Path) -> dict[str, Any] | None:
    """r, alpha and targets in a folder's adapter_config.json; None where they aren't there."""
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    r, alpha, targets = (found.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if r is None or alpha is None or not targets:
        return None
    return {"r": r, "alpha": alpha, "targets": [targets] if isinstance(targets, str) else sorted(targets)}


def _settings(settings: Mapping[str, Any], lora: Mapping[str, Any] | None) -> list[tuple[str, str]]:
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
    if lora:
        rows.append(("LoRA", f"r {lora['r']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}"))
    if settings.get("adapter"):
        rows.append(("went on from", f"adapter {settings['adapter']}"))
    if relevance.get("enabled"):
        width = relevance["width"]
        kind = f"{width} hidden units" if width else "linear"
        rows.append(("predictors", f"{kind}, learning rate {relevance['lr']:g}"))
        share = relevance.get("start_share")
        if share:
            rows.append(
                ("weights of the predictors", f"{share:g} of the start's, {1 - share:g} of the trained ones")
            )
    samples = settings["batch_size"] * settings["accumulation"]
    rows.append(("steps", f"{settings['steps']} of {samples} samples per process, seed {settings['seed']}"))
    rows.append(("learning rate", f"{settings['lr']:g}, {settings['schedule']}"))
    return rows


def _named(part: Mapping[str, Any]) -> str:
    args = ", ".join(f"{key}={value}" for key, value in part.get("args", {}).items())
    return f"{part['name']}({args})" if args else str(part["name"])


def _objective(part: Mapping[str, Any]) -> str:
    """Every term of an objective with its weight."""
    from sparsekv.training.objectives import make_objective

    given = ObjectiveConfig.model_validate(part)
    return _terms(make_objective(given.name, **given.arguments()))


def _terms(objective: Objective) -> str:
    from sparsekv.training import objectives as kinds

    if isinstance(objective, kinds.MixedObjective):
        return " + ".join(f"{weight:g} · ({_terms(one)})" for one, weight in objective.objectives)
    terms: list[tuple[float, str]] = [(1.0, "cross-entropy")]
    if isinstance(objective, kinds.EITObjective):
        context = f"KL on {objective.context_tokens} tokens of the context"
        terms = [
            (objective.lambda_ce, "cross-entropy"),
            (objective.lambda_kl, f"KL at temperature {objective.temperature:g}"),
            (objective.lambda_context, context),
        ]
    elif isinstance(objective, kinds.SparseLMObjective):
        terms.append((objective.sparsity_weight, f"sparsity of attention ({objective.sparsity_kind})"))
    elif isinstance(objective, kinds.ReconstructionObjective):
        repeated = f"cross-entropy of {objective.span - objective.cue} repeated tokens"
        terms.append((objective.weight, repeated))
    return " + ".join(_weighed(weight, what) for weight, what in terms if weight)


def _weighed(weight: float, what: str) -> str:
    return what if weight == 1 and what == "cross-entropy" else f"{weight:g} · {what}"


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
