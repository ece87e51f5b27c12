"""kvpress presses as values: fresh copies with a ratio, what they download, what they read from a module.

A press is a mutable object whose ratio lives in an attribute. A policy keeps one as a template that nobody
changes: every use takes a `fresh` copy. Knows nothing of policies.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from kvpress import (
    BasePress,
    ComposedPress,
    CompressionRatioDecodingPress,
    CURPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    LeverageScorePress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    RandomPress,
    SimLayerKVPress,
    ThinKPress,
)
from torch import nn

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget
from sparsekv.policies.press_table import DOWNLOADS

_OWN_SIZES: dict[type, str] = {
    ThinKPress: "key_channel_compression_ratio",
    SimLayerKVPress: "lazy_threshold",
    DMSPress: "threshold",
    DuoAttentionPress: "head_compression_ratio",
    PerLayerCompressionPress: "compression_ratios",
}
"""Presses without a settable compression_ratio, and the argument that decides instead."""

# Half a millionth of an entry keeps int() on the wanted side of a whole number, and is far above float64's
# error.
_NUDGE = 1e-6

_ALREADY_LOADED = (
    "stats_folder",
    "_budget_curves",
    "gates",
    "q_filters",
    "kvzap_model",
    "restore_embeddings",
)
"""Attributes that hold what a press would otherwise download (or say where it lies)."""

_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    AssertionError,
    TypeError,
    AttributeError,
    httpx.HTTPError,
)


def nested(press: BasePress) -> Iterator[BasePress]:
    """The press and every press inside it, outermost first."""
    yield press
    for value in vars(press).values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, BasePress):
                yield from nested(part)


def fresh(press: BasePress) -> BasePress:
    """An independent copy: inner presses and containers are copied, tensors and loaded models shared."""
    twin = copy.copy(press)
    for name, value in vars(press).items():
        if isinstance(value, BasePress):
            vars(twin)[name] = fresh(value)
        elif isinstance(value, (list, tuple)) and any(isinstance(part, BasePress) for part in value):
            vars(twin)[name] = type(value)(fresh(p) if isinstance(p, BasePress) else p for p in value)
        elif isinstance(value, (list, dict, set)):
            vars(twin)[name] = copy.copy(value)
    return twin


def own_sizes(press: BasePress) -> str | None:
    """The argument that decides instead of a compression ratio, or None if the press takes a ratio."""
    for cls, argument in _OWN_SIZES.items():
        if isinstance(press, cls):
            return argument
    if isinstance(press, DecodingPress) and not isinstance(press, CompressionRatioDecodingPress):
        return "target_size"
    if isinstance(press, PrefillDecodingPress) and press.prefilling_press is None:
        return "decoding_press"
    return None


def own_ratio(press: BasePress) -> float:
    """The ratio that the press itself was given; 0 if none (or if it has sizes of another kind)."""
    if own_sizes(press) is not None:
        return 0.0
    if isinstance(press, CompressionRatioDecodingPress):
        return 0.0  # its target has a default, so it says nothing about what the user wants
    if isinstance(press, ComposedPress):
        return max((own_ratio(part) for part in press.presses), default=0.0)
    if isinstance(press, PrefillDecodingPress):
        return 0.0 if press.prefilling_press is None else own_ratio(press.prefilling_press)
    return float(getattr(press, "compression_ratio", 0.0) or 0.0)


def with_ratio(press: BasePress, ratio: float) -> BasePress:
    """A fresh copy with its ratio set; parts of a composed press that have own sizes keep them."""
    twin = fresh(press)
    _set_ratio(twin, ratio)
    return twin


def _set_ratio(press: BasePress, ratio: float) -> None:
    if own_sizes(press) is not None:
        return
    if isinstance(press, CompressionRatioDecodingPress):
        press.target_compression_ratio = ratio
    elif isinstance(press, ComposedPress):
        for part in press.presses:
            _set_ratio(part, ratio)
    elif isinstance(press, PrefillDecodingPress):
        if press.prefilling_press is not None:
            _set_ratio(press.prefilling_press, ratio)
    else:
        press.compression_ratio = ratio


def exact_ratio(budget: Budget, n: int, *, counts_evicted: bool = False) -> float:
    """The ratio at which kvpress's rounding leaves the budget's number of entries of `n`.

    Parameters
    ----------
    budget : Budget
        A ratio is passed on as it is.
    n : int
        Entries before eviction.
    counts_evicted : bool
        True for presses that round the number of EVICTED entries, `int(n * ratio)` (the KVzip family); the
        others round the kept ones, `int(n * (1 - ratio))`.
    """
    if budget.tokens is None:
        return float(budget.compression_ratio or 0.0)
    if budget.tokens >= n:
        return 0.0
    return (n - budget.tokens + (_NUDGE if counts_evicted else -_NUDGE)) / n


def given_arguments(press: BasePress) -> dict[str, Any]:
    """Numbers, switches and texts that a press, or one inside it, was given and that aren't the defaults."""
    given: dict[str, Any] = {}
    for part in nested(press):
        for name, parameter in inspect.signature(type(part)).parameters.items():
            value = getattr(part, name, parameter.default)
            if isinstance(value, (int, float, str)) and value != parameter.default:
                given.setdefault(name, value)
    given.pop("compression_ratio", None)  # the budget's
    return given


def draws(press: BasePress) -> bool:
    """True if scoring draws from torch's global generator."""
    return any(
        isinstance(part, LeverageScorePress)
        or (isinstance(part, RandomPress) and part.seed is None)
        or (isinstance(part, CURPress) and part.use_random_leverage)
        for part in nested(press)
    )


@contextmanager
def drawing(press: BasePress, seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for a press that draws, and put them back afterwards."""
    if not draws(press):
        yield
        return
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# ---- what a press reads from a module
# -------------------------------------------------------------------------


def _rotary_class(attention: type) -> Any:
    """`LlamaAttention` -> `LlamaRotaryEmbedding`, from the same transformers module."""
    name = attention.__name__.replace("Attention", "RotaryEmbedding")
    module = importlib.import_module(attention.__module__)
    if not hasattr(module, name):
        raise ConfigError(f"no rotary embedding {name} beside {attention.__name__}; this press needs one")
    return getattr(module, name)


class _LayerRotary(nn.Module):
    """Gemma-3's rotary embedding with the layer's type filled in."""

    def __init__(self, rotary: nn.Module, layer_type: str) -> None:
        super().__init__()
        self.rotary, self.layer_type = rotary, layer_type

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, position_ids, self.layer_type)


@contextmanager
def readable_by_presses(module: nn.Module) -> Iterator[None]:
    """Lend an attention module what presses read from it and not every model family has; taken back
    afterwards.

    kvpress sets `rotary_emb` on every layer in its own context manager and leaves it there; here it is lent
    per call. `config.head_dim` is missing from Qwen2's and Phi-3's configs.
    """
    config: Any = module.config
    lend_head_dim = getattr(config, "head_dim", None) is None
    kept = module._modules.get("rotary_emb")
    layer_type = getattr(module, "layer_type", None)
    per_type = "gemma3" in config.model_type and layer_type is not None
    if kept is None or per_type:
        device = next(module.parameters()).device
        rotary = _rotary_class(type(module))(config, device=device)
        module.rotary_emb = _LayerRotary(rotary, str(layer_type)) if per_type else rotary
    if lend_head_dim:
        config.head_dim = module.head_dim
    try:
        yield
    finally:
        if lend_head_dim:
            del config.head_dim
        if kept is None:
            del module._modules["rotary_emb"]
        else:
            module.rotary_emb = kept


# ---- what a press loads
# ---------------------------------------------------------------------------------------


def downloads(press: BasePress) -> str | None:
    """What the press (or one inside it) fetches from the network, in words; None if nothing."""
    for part in nested(press):
        if any(getattr(part, name, None) is not None for name in _ALREADY_LOADED):
            continue
        for cls in type(part).__mro__:
            if cls.__name__ in DOWNLOADS:
                return DOWNLOADS[cls.__name__]
    return None


def load(press: BasePress, model: Any, name: str) -> BasePress:
    """A fresh copy whose weights are loaded for `model` (anything with `.config`, `.dtype` and `.device`).

    Raises
    ------
    ConfigError
        If they can't be fetched: one line that names them.
    """
    twin = fresh(press)
    with clear_download_error(twin, model, name):
        for part in nested(twin):
            part.post_init_from_model(model)
    return twin


@contextmanager
def clear_download_error(press: BasePress, model: Any, name: str) -> Iterator[None]:
    """Turn what a failed download raises into a ConfigError that names what was wanted."""
    wanted = downloads(press)
    if wanted is None:
        yield
        return
    try:
        yield
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        of = getattr(model.config, "name_or_path", "") or "this model"
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConfigError(
            f"method {name} needs {wanted} for {of!r}, which could not be loaded: {first}"
        ) from error


def guard_loading(press: BasePress, name: str) -> BasePress:
    """Make `press(model)` raise a ConfigError where its download fails. Changes and returns `press`."""
    if downloads(press) is not None:
        original = press.post_init_from_model

        def post_init_from_model(model: Any) -> None:
            with clear_download_error(press, model, name):
                original(model)

        press.post_init_from_model = post_init_from_model
    return press


_tokenizer_lock = threading.RLock()


@contextmanager
def lend_tokenizer(tokenizer: Any) -> Iterator[None]:
    """KVzip loads the tokenizer by the model's path; hand it this one instead (None: let it load)."""
    if tokenizer is None:
        yield
        return
    module: Any = importlib.import_module("kvpress.presses.kvzip_press")

    class _Lent:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> Any:
            return tokenizer

    with _tokenizer_lock:
        original = module.AutoTokenizer
        module.AutoTokenizer = _Lent
        try:
            yield
        finally:
            module.AutoTokenizer = original
