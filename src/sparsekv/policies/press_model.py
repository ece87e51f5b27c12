"""Two routes for presses that are more than a choice inside each layer: those that run the model, and native
ones.

PressModel     runs the model itself (KVzip, KVgrad, KVCompose, FastKVzip, DuoAttention): what its cache lost
is read PressNative    changes entries or works while decoding: kvpress's own hooks and prefill run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kvpress import (
    BasePress,
    CompressionRatioDecodingPress,
    DecodingPress,
    FinchPress,
    KVComposePress,
    KVzipPress,
)
from torch import Tensor
from transformers import DynamicCache

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.base import ModelPolicy, NativePolicy
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import check_numbers
from sparsekv.policies.press_copies import (
    clear_download_error,
    downloads,
    fresh,
    guard_loading,
    lend_tokenizer,
    nested,
    own_sizes,
    with_ratio,
)
from sparsekv.policies.press_routes import (
    check_own_sizes,
    decided_ratio,
    keeps_all,
    reason,
    refusing,
    unmasked,
)
from sparsekv.policies.press_rows import kept_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _FirstRows(DynamicCache):
    """A cache that remembers each layer's keys and values after its first update."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.first.setdefault(layer_idx, stored)
        return stored


@dataclass(frozen=True, eq=False)
class PressModel(ModelPolicy):
    """A press that runs the model itself (KVzip, KVgrad, KVCompose, FastKVzip, DuoAttention).

    Parameters
    ----------
    template : kvpress press
    name : str
    """

    template: BasePress
    name: str = "press"

    def check_budget(self, budget: Budget) -> None:
        """Refuse a ratio or a number of tokens beside sizes of the press's own."""
        check_own_sizes(self.template, self.name, budget)

    def keep_model(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        budget: Budget,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Tensor:
        """BoolTensor [1, L, H, T]: what the press left in its cache, by mask or by row.

        The context is read under `press(model)` into a cache that is thrown away. Any attention but eager
        will do.

        Raises
        ------
        ConfigError
            If the tokenizer is needed and there is none, a download fails, or kvpress refuses the model.
        """
        plain: Any = architecture.unwrap(model)
        n = input_ids.shape[1]
        modules = architecture.attention_modules(plain)
        shape = (1, len(modules), architecture.num_kv_heads(plain), n)
        if keeps_all(budget, n):
            return torch.ones(shape, dtype=torch.bool, device=input_ids.device)
        if len(architecture.compressible_layers(plain)) < len(modules):
            raise ConfigError(
                f"method {self.name} spreads its budget over all layers, but some layers of this model have"
                " a sliding window and can't be compressed"
            )
        rounds_evicted = not isinstance(self.template, KVComposePress)
        ratio = decided_ratio(self.template, self.name, budget, n, counts_evicted=rounds_evicted)
        press = with_ratio(self.template, ratio)
        cache = _FirstRows()
        for module in modules:
            module.masked_key_indices = None  # type: ignore[assignment]
        try:
            with (
                torch.no_grad(),
                lend_tokenizer(tokenizer),
                refusing(press, self.name),
                clear_download_error(press, plain, self.name),
            ):
                if not downloads(press) and tokenizer is None and isinstance(press, KVzipPress):
                    _need_tokenizer(plain, self.name)
                with press(plain):
                    architecture.text_model(plain)(input_ids=input_ids, past_key_values=cache, use_cache=True)
            kept = [self._kept(module, layer, cache) for layer, module in enumerate(modules)]
        finally:
            for module in modules:
                module.masked_key_indices = None  # type: ignore[assignment]
        return torch.stack(kept, dim=1).to(input_ids.device)

    def _kept(self, module: Any, layer: int, cache: _FirstRows) -> Tensor:
        keys, values = cache.first[layer]
        check_numbers(keys, self.name, layer, "keys")
        left: Any = cache.layers[layer]
        if module.masked_key_indices is not None:
            return unmasked(module.masked_key_indices, keys)
        return kept_rows((keys[0], values[0]), (left.keys[0], left.values[0]), self.name)[None]


def _need_tokenizer(model: Any, name: str) -> None:
    from transformers import AutoTokenizer

    path = model.config.name_or_path
    try:
        if not path:
            raise OSError("the model has no path")
        AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"method {name} needs the model's tokenizer; none was given, and {path!r} has none: "
            f"{reason(error)}"
        ) from error


@dataclass(frozen=True, eq=False)
class PressNative(NativePolicy):
    """A press that changes entries, works while decoding, or needs its own prefill in another way.

    Parameters
    ----------
    template : kvpress press
    name : str
    decoding : bool
        True if only kvpress's own generation loop can run it.
    """

    template: BasePress
    name: str = "press"
    decoding: bool = False

    def press(self, budget: Budget) -> Any:
        """A fresh press with the budget set: its ratio, or for decoding presses `target_size` from tokens.

        Raises
        ------
        ConfigError
            If the press takes no ratio, or its own size is missing (think: key_channel_compression_ratio).
            Its context manager raises one where a download fails.
        """
        template = self.template
        if isinstance(template, DecodingPress) and not isinstance(template, CompressionRatioDecodingPress):
            twin = fresh(template)
            if budget.compression_ratio:
                raise ConfigError(
                    f"method {self.name} keeps target_size entries: give budget tokens, not a ratio"
                )
            if budget.tokens is not None:
                twin.target_size = budget.tokens
            return guard_loading(twin, self.name)
        for part in nested(template):
            if isinstance(part, FinchPress) and part.delimiter_token_id is None:
                raise ConfigError(
                    f"method {self.name} needs a delimiter token: call the press's update_model_and_tokenizer"
                    "(model, tokenizer), end the context with its delimiter_token, and use from_press(press)"
                )
            if own_sizes(part) == "key_channel_compression_ratio" and not part.key_channel_compression_ratio:
                raise ConfigError(
                    f"method {self.name} needs its argument key_channel_compression_ratio (> 0)"
                )
        if budget.tokens is not None:
            raise ConfigError(f"method {self.name} takes a compression ratio, not a number of tokens")
        if isinstance(template, CompressionRatioDecodingPress) and not budget.given:
            return guard_loading(fresh(template), self.name)
        ratio = decided_ratio(template, self.name, budget, 1)
        return guard_loading(with_ratio(template, ratio), self.name)
