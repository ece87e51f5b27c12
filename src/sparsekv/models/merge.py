"""A trained adapter and its base as one plain Hugging Face folder, which any engine serves."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError
from sparsekv.models.embedded import embedded_by_public_id
from sparsekv.models.load import load_model
from sparsekv.models.locate import ADAPTER_CONFIG, cached_folder, locate_model
from sparsekv.relevance.files import RELEVANCE_FILE, load_relevance
from sparsekv.relevance.predictor import detach_relevance

_TRAINING_CONFIG = "training_config.json"
_FINAL = "final"


def merge_adapter(
    trained: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write config, generation config, safetensors and tokenizer of the merged model, and its predictors beside them.

    The folder appears under its name only when it is whole.

    Parameters
    ----------
    trained : folder
        Of a LoRA adapter; of a fully fine-tuned model; of predictors alone (relevance.safetensors); or the output
        folder of a training run, whose `final/` is taken.
    output : folder
        Where to write; it must not be there yet, or be empty.
    model : str, optional
        The base of an adapter or of predictors, as for `load_model`; by default the one that the folder names.
    dtype : str
        Of the weights; "auto": that of the base's files.
    trust_remote_code : bool
        Allow code from the base's repository to run.

    Returns
    -------
    Path
        The output folder.

    Raises
    ------
    ConfigError
        For a folder that is not one of these, an output that is in use, a base that cannot be loaded, or an adapter or
        predictors of another model.
    """
    source, target = _trained_folder(trained), Path(output).expanduser()
    _check_output(target, source)
    base, adapter = _parts(source, model)
    loaded, tokenizer = load_model(
        base,
        adapter=adapter,
        dtype=_stored_dtype(base) if dtype == "auto" else dtype,
        device="cpu",
        trust_remote_code=trust_remote_code,
    )
    if (source / RELEVANCE_FILE).is_file():
        load_relevance(loaded, source)  # whether they fit is told before anything is written
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"output folder '{target}' cannot be written: {error.strerror or error}") from error
    try:
        folder = work / "merged"
        detach_relevance(loaded)  # they are no part of the plain model, and have a file of their own
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (source / RELEVANCE_FILE).is_file():
            shutil.copyfile(source / RELEVANCE_FILE, folder / RELEVANCE_FILE)
        if target.exists():
            target.rmdir()  # empty, as was checked
        folder.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _trained_folder(trained: str | Path) -> Path:
    """The folder itself, or the `final/` of a run's output folder."""
    folder = Path(trained).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"folder '{trained}' does not exist; give an adapter's folder or a run's output folder"
        )
    if (folder / _FINAL).is_dir() and not _is_trained(folder):
        folder = folder / _FINAL
    if not _is_trained(folder):
        raise ConfigError(
            f"folder '{trained}' has no {ADAPTER_CONFIG}, config.json or {RELEVANCE_FILE}: nothing to merge"
        )
    return folder


def _is_trained(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json", RELEVANCE_FILE))


def _check_output(target: Path, source: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output '{target}' is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"output folder '{target}' is not empty; give a new one")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise ConfigError(f"output folder '{target}' lies in the trained folder '{source}'; give another one")


def _parts(source: Path, model: str | None) -> tuple[str, Path | None]:
    """The base's name and the adapter's folder, if there is one."""
    if (source / ADAPTER_CONFIG).is_file():
        return (str(source), None) if model is None else (model, source)
    if (source / "config.json").is_file():
        if model is not None:
            raise ConfigError(
                f"folder '{source}' is a whole model (it has a config.json), so model {model!r} cannot be its base; "
                "leave the model out"
            )
        return str(source), None
    if model is None:
        try:
            model = _at_hand(json.loads((source / _TRAINING_CONFIG).read_text(encoding="utf-8"))["model"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"folder '{source}' does not name its base model; give it (--model)") from None
    return str(model), None


def _at_hand(model: str) -> str:
    """The embedded name of a public id that is not in the Hub's cache, as for the base of an adapter."""
    embedded = embedded_by_public_id(model)
    return model if embedded is None or cached_folder(model) is not None else embedded.name


def _stored_dtype(base: str) -> str:
    """The dtype of a model's files, as their config says."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(locate_model(base).path)
    except (OSError, ValueError, KeyError):
        return "auto"  # load_model will say what is wrong with it
    stored = getattr(config, "dtype", None)
    return "float32" if stored is None else str(stored).removeprefix("torch.")
