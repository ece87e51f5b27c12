"""What the rest of the library needs to know about a model's architecture.

Knows configs and module trees; knows nothing of weights, downloads, policies or caches. Everything here works
on a transformers config, a model, or a model wrapped by PEFT, and imports neither torch nor transformers when
it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsekv.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

SUPPORTED_MODEL_TYPES: tuple[str, ...] = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma3_text",
    "gemma3",
)
"""`config.model_type` of the families whose attention, rotary embedding and cache the equivalence tests cover."""

# For a cache a chunked layer is like a sliding one: transformers drops its old entries by itself.
_WINDOWED = frozenset({"sliding_attention", "chunked_attention"})


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; a plain model is returned as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def text_config(model_or_config: Any) -> Any:
    """The config of the text decoder: of a model, of a config, or nested in a multimodal config (Gemma-3)."""
    config = getattr(unwrap(model_or_config), "config", model_or_config)
    return config.get_text_config(decoder=True)


def text_model(model: Any) -> nn.Module:
    """The decoder stack that owns `.layers`, `.norm` and `.rotary_emb`.

    Args:
        model: a `…ForCausalLM` or `…ForConditionalGeneration`, plain or wrapped by PEFT, or the bare stack.

    Raises:
        ConfigError: no list of decoder layers where the supported families have it.
    """
    plain = unwrap(model)
    inner = getattr(plain, "model", plain)
    decoder = getattr(inner, "language_model", inner)
    if not hasattr(decoder, "layers"):
        raise ConfigError(
            f"model {type(plain).__name__} has no decoder layers at model.layers or model.language_model.layers;"
            f" supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return decoder


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order, first to last."""
    return list(text_model(model).layers)  # type: ignore[arg-type]


def attention_modules(model: Any) -> list[nn.Module]:
    """The self-attention module of every decoder layer, in layer order."""
    return [layer.self_attn for layer in decoder_layers(model)]  # type: ignore[misc]


def layer_types(model_or_config: Any) -> list[str]:
    """The kind of every layer that owns a cache layer: "full_attention", "sliding_attention", …

    The rule by which transformers' `DynamicCache(config=…)` chooses its layers (transformers/cache_utils.py), so
    that the two never disagree: `layer_types` where the config lists them, else one kind for all layers, windowed
    if the config has a window. Layers that share another layer's keys and values are left out.
    """
    config = text_config(model_or_config)
    types = getattr(config, "layer_types", None)
    if types is None:
        windowed = "sliding_attention" if sliding_window(config) is not None else "full_attention"
        types = [windowed] * config.num_hidden_layers
    if n_shared := getattr(config, "num_kv_shared_layers", 0):
        types = types[:-n_shared]
    return list(types)


def sliding_window(model_or_config: Any) -> int | None:
    """Window of the windowed layers in tokens, None where the model has none."""
    config = text_config(model_or_config)
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def compressible_layers(model_or_config: Any) -> list[int]:
    """Indices of the layers whose cache may be compressed: those that attend to the whole context.

    Layers with a sliding or chunked window keep the model's own window: their cache is bounded already and
    transformers evicts from it by itself. They count neither in a budget nor in the achieved compression.
    """
    return [index for index, kind in enumerate(layer_types(model_or_config)) if kind not in _WINDOWED]


def num_layers(model_or_config: Any) -> int:
    """Number of decoder layers."""
    return int(text_config(model_or_config).num_hidden_layers)


def num_kv_heads(model_or_config: Any) -> int:
    """Key/value heads per layer (H in the shape legends)."""
    config = text_config(model_or_config)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(model_or_config: Any) -> int:
    """Width D of one key or value vector."""
    config = text_config(model_or_config)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def max_context(model_or_config: Any) -> int:
    """Longest context in tokens that the model was made for (`max_position_embeddings`)."""
    config = text_config(model_or_config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise ConfigError(
            f"model type {config.model_type!r} does not say its longest context (max_position_embeddings)"
        )
    return int(limit)


def check_supported(model_or_config: Any) -> None:
    """Raise a `ConfigError` that says why, if the library cannot compress this model's cache.

    Encoder-decoders, architectures outside `SUPPORTED_MODEL_TYPES`, and models in which every layer has a
    sliding window (nothing to compress) are refused.
    """
    config = getattr(unwrap(model_or_config), "config", model_or_config)
    allowed = f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model type {config.model_type!r} is an encoder-decoder; only decoders work; {allowed}"
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(f"model type {config.model_type!r} is not supported; {allowed}")
    if not compressible_layers(config):
        raise ConfigError(
            f"model type {config.model_type!r}: all {num_layers(config)} layers have a sliding window of "
            f"{sliding_window(config)} tokens, so there is no full-attention cache to compress"
        )
