"""What a trained model leaves on the disk: the adapter or the model, and the predictors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

from sparsekv.models import public_name
from sparsekv.relevance.files import save_relevance
from sparsekv.relevance.predictor import NAME, has_relevance
from sparsekv.training.output import name_base, set_in_json


def has_adapter(model: Any) -> bool:
    """True for a model wrapped by PEFT."""
    return hasattr(model, "disable_adapter")


def without_predictors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a plain model of transformers has it: predictors are in a file of their own."""
    return {name: value for name, value in state.items() if f".{NAME}." not in name}


def save_weights(
    model: Any,
    folder: str | Path,
    *,
    only_predictors: bool = False,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapter or the model, and the predictors; nothing of this machine or of the run.

    Parameters
    ----------
    only_predictors : bool
        The model itself was not trained, so it is not written.
    dtype : torch.dtype, optional
        Of the weights in the files; default: as they are. Predictors are always float32.
    state : state dict, optional
        The whole one, where the model's weights are not all here.
    """
    if not only_predictors:
        written = model.state_dict() if state is None else state
        if dtype is not None:
            written = _converted(written, dtype)
        with serving_config(model):
            model.save_pretrained(str(folder), state_dict=without_predictors(written))
        tidy(model, folder)
        if dtype is not None and not has_adapter(model):
            # What the files hold; transformers wrote what the model in memory has.
            set_in_json(Path(folder) / CONFIG_NAME, "dtype", str(dtype).removeprefix("torch."))
    if has_relevance(model):
        save_relevance(model, folder, state)


def _converted(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another dtype. Tied ones stay one tensor, which transformers writes once."""
    made: dict[Any, Tensor] = {}
    for x in state.values():
        if x.is_floating_point() and _place(x) not in made:
            made[_place(x)] = x.to(dtype)
    return {name: made.get(_place(x), x) for name, x in state.items()}


def _place(x: Tensor) -> Any:
    return x.device, x.data_ptr(), x.dtype, x.shape, x.stride()


def tidy(model: Any, folder: str | Path) -> None:
    """Take this machine out of what PEFT and Trainer wrote: the base's path, an empty card, pickled arguments."""
    folder = Path(folder)
    for name in ("README.md", "training_args.bin"):
        (folder / name).unlink(missing_ok=True)
    if has_adapter(model):
        name_base(folder, public_name(str(model.get_base_model().config.name_or_path)))


@contextmanager
def serving_config(model: Any) -> Iterator[None]:
    """The config as it is served: checkpointing switches the cache off, which is no property of the model."""
    config = model.config
    before = config.use_cache
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = before
