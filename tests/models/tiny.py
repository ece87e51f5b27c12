"""A tiny random llama, and how llama.cpp writes it as a GGUF file."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
N_HEAD, N_KV_HEAD, HEAD_DIM, HIDDEN = 4, 2, 8, 32


def tiny_llama(**changes) -> LlamaForCausalLM:
    """A random llama, its weights exact in bfloat16 and so large that every part shows in the logits."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV_HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        parameter.data = parameter.data.bfloat16().float()
    return model


def llama_cpp_rows(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: i and i + D/2 of a head side by side."""
    rows = []
    dim = weight.shape[0] // n_head
    for head in range(n_head):
        for i in range(dim // 2):
            rows += [weight[head * dim + i], weight[head * dim + i + dim // 2]]
    return np.stack(rows)


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, quantized: bool = False, architecture: str = "llama"
) -> Path:
    """Write `model` as llama.cpp's converter does; with `quantized`, the projections as Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if "q_proj" in name:
            array = llama_cpp_rows(array, config.num_attention_heads)
        elif "k_proj" in name:
            array = llama_cpp_rows(array, config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight",))
        if quantized and "proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
