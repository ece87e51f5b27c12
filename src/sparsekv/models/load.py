"""Load a model and its tokenizer by name, with or without a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv.architecture import check_supported
from sparsekv.errors import ConfigError, one_line
from sparsekv.models.locate import ADAPTER_CONFIG, ModelSource, locate_model
from sparsekv.models.placement import resolve_device, resolve_dtype
from sparsekv.relevance import RELEVANCE_FILE, load_relevance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


def load_model(
    name: str,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    merge_adapter: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model for inference, and its tokenizer.

    Args:
        name: an embedded name ("smollm2": fetched now if it was not yet), a local folder, or a Hub id. The
            folder may be that of a LoRA adapter, whose base is then found by the id that the adapter names.
        adapter: folder of a LoRA adapter, or of relevance predictors alone, to put on top of `name`, whatever
            base it names itself.
        dtype: "auto" (bfloat16 if the device computes in it, else float32), "float32", "bfloat16", "float16".
        device: "auto" (CUDA, else Apple's GPU, else CPU) or a torch device.
        device_map: as in transformers, e.g. "auto" to spread the layers over all GPUs; excludes `device`.
        attn_implementation: as in transformers; None leaves the choice to it.
        trust_remote_code: allow code from the model's repository to run.
        merge_adapter: add the adapter's product to the weights and return the plain model, which hooks and
            presses need. False returns a `PeftModel` that keeps the adapter apart, in float32.

    Returns:
        The model in eval mode, and its tokenizer (left padding, with a pad token). Relevance predictors that lie
        beside the adapter or the model (relevance.safetensors) are attached.

    Raises:
        ConfigError: an unknown name, an incomplete folder, an adapter that does not fit, an unsupported
            architecture, a Hub that cannot be reached; one line each.
    """
    from transformers import AutoModelForCausalLM

    if device_map is not None and device != "auto":
        raise ConfigError(f"device {str(device)!r} and device_map {device_map!r} are both given; give one")
    place = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, place)
    source = locate_model(name, adapter)
    config = _load_config(name, source, trust_remote_code)
    check_supported(config)

    options: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, _safetensors_error()) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and only warn
        raise ConfigError(
            f"model {name!r} is incomplete: {len(missing)} weights are missing, first {missing[0]!r}"
        )
    if device_map is None:
        model = model.to(place)
    if source.adapter is not None and (source.adapter / ADAPTER_CONFIG).is_file():
        model = add_adapter(model, source.adapter, name=name, merge=merge_adapter)
    for folder in (source.adapter, source.path):
        if folder is not None and (Path(folder) / RELEVANCE_FILE).is_file():
            load_relevance(model, folder)
            break
    return model.eval(), _load_tokenizer(name, source, trust_remote_code)


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model (of the base, for an adapter's folder); no weights are read.

    Args:
        name: as for `load_model`.
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ConfigError: as for `load_model`.
    """
    return _load_config(name, locate_model(name), trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (of the base, for an adapter's folder), with left padding and a pad token.

    Args:
        name: as for `load_model`.
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ConfigError: as for `load_model`.
    """
    return _load_tokenizer(name, locate_model(name), trust_remote_code)


def add_adapter(
    model: PreTrainedModel, folder: Path, *, name: str, merge: bool = False, trainable: bool = False
) -> PreTrainedModel:
    """Put a LoRA adapter on a model.

    Args:
        model: the plain model; its weights are used, whatever base the adapter names.
        folder: the adapter's folder.
        name: the model's name, for messages.
        merge: add the adapter to the weights and return the plain model; otherwise a `PeftModel`.
        trainable: the adapter's weights take gradients (those of the model don't).

    Raises:
        ConfigError: the adapter's layers or shapes are not those of the model.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    misfit = f"adapter {str(folder)!r} does not fit model {name!r}"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        wrapped = PeftModelForCausalLM(model, config, "default")
        result = wrapped.load_adapter(
            str(folder),
            "default",
            torch_device=str(model.device),
            is_trainable=trainable,
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )
    except (ValueError, RuntimeError, KeyError, TypeError, _safetensors_error()) as error:
        raise ConfigError(f"{misfit}: {one_line(error)}") from error
    # PEFT only warns of these, or says nothing
    for keys, problem in (
        (result.unexpected_keys, "has weights for"),
        (result.missing_keys, "lacks weights for"),
    ):
        if keys:
            raise ConfigError(
                f"{misfit}: it {problem} {len(keys)} modules that do not match, first {sorted(keys)[0]!r}"
            )
    return wrapped.merge_and_unload(safe_merge=True) if merge else wrapped


def _load_config(name: str, source: ModelSource, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {name!r}: its config.json cannot be read: {one_line(error)}") from error


def _load_tokenizer(name: str, source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(source.path)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        # transformers would make up a tokenizer of three tokens
        raise ConfigError(f"model folder {name!r} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model {name!r}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
