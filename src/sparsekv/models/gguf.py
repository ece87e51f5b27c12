"""Convert a GGUF file of a llama-architecture model into a Hugging Face folder (bfloat16 safetensors).

Knows the GGUF format and llama.cpp's conventions; knows nothing of where files come from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv.errors import ConfigError
from sparsekv.models.tokenizer import build_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig

# llama.cpp's tensor names of one block -> transformers' names below `model.layers.{i}.`
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face folder.

    The folder gets config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's
    files with the chat template. Quantized tensors are dequantized in float32 and then rounded to bfloat16.

    Args:
        path: the GGUF file.
        folder: an existing, empty folder.

    Raises:
        ConfigError: not a readable GGUF file, or an architecture, tensor or tokenizer that is not handled.
        OSError: the folder cannot be written.
    """
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"file {path} is not a readable GGUF file: {error}") from error
    metadata = read_metadata(reader)
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ConfigError(f"GGUF architecture {architecture!r} cannot be converted; supported: 'llama'")

    weights = read_weights(reader, n_head=_n_head(metadata), n_kv_head=_n_kv_head(metadata))
    config = read_config(metadata, tie_word_embeddings="lm_head.weight" not in weights)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    build_tokenizer(metadata).save_pretrained(folder)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, as safetensors words it
        raise OSError(str(error)) from error
    # safetensors makes its file private; a cache may be shared as far as the user's umask says
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def read_metadata(reader: Any) -> dict[str, Any]:
    """Key to plain Python value of every metadata field of a `gguf.GGUFReader`."""
    return {key: field.contents() for key, field in reader.fields.items()}


def read_config(metadata: Mapping[str, Any], *, tie_word_embeddings: bool) -> LlamaConfig:
    """The transformers config that the metadata of a llama GGUF file describes."""
    from transformers import LlamaConfig

    hidden_size = metadata["llama.embedding_length"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=_n_head(metadata),
        num_key_value_heads=_n_kv_head(metadata),
        head_dim=metadata.get("llama.rope.dimension_count", hidden_size // _n_head(metadata)),
        max_position_embeddings=metadata["llama.context_length"],
        # stored as float32: 1e-05 comes back as 9.999999747e-06
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(metadata.get("llama.rope.freq_base", 10000.0)),
        },
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def read_weights(reader: Any, *, n_head: int, n_kv_head: int) -> dict[str, torch.Tensor]:
    """All tensors of a llama GGUF file under transformers' names, in bfloat16.

    Args:
        reader: a `gguf.GGUFReader`.
        n_head, n_kv_head: query heads and key/value heads, to undo llama.cpp's order of rotary dimensions.

    Raises:
        ConfigError: a tensor that has no place in a plain llama model.
    """
    import torch
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            array = unpermute(array, n_head)
        elif ".attn_k." in tensor.name:
            array = unpermute(array, n_kv_head)
        weights[transformers_name(tensor.name)] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    return weights


def transformers_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    raise ConfigError(f"GGUF tensor {name!r} has no place in a llama model and cannot be converted")


def unpermute(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of a query or key projection.

    llama.cpp rotates neighbouring dimensions (2i, 2i+1) where transformers rotates (i, i + D/2), and reorders
    the rows of each head so that both give the same result.

    Args:
        weight: [n_head · D, hidden], rows of each head interleaved: 0, D/2, 1, D/2 + 1, …
        n_head: heads in these rows.

    Returns:
        [n_head · D, hidden], rows of each head in order 0, 1, …, D - 1.
    """
    by_pair = weight.reshape(n_head, -1, 2, weight.shape[-1])
    return by_pair.swapaxes(1, 2).reshape(weight.shape)


def _n_head(metadata: Mapping[str, Any]) -> int:
    return int(metadata["llama.attention.head_count"])


def _n_kv_head(metadata: Mapping[str, Any]) -> int:
    return int(metadata.get("llama.attention.head_count_kv", _n_head(metadata)))
