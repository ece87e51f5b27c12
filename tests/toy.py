"""Tiny random models and a byte-level tokenizer: every model family at the size of a unit test.

Plain functions, so that scripts and parametrised tests can call them; conftest.py has fixtures around them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FAMILIES: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3")

SPECIALS = ("<|end|>", "<|start|>", "<|pad|>")
"""Ids 0, 1 and 2; the 256 bytes follow."""

VOCAB_SIZE = 304
"""Rounded up: ids 259..303 have no token and decode to nothing."""

GEMMA_WINDOW = 24
"""Sliding window of the toy Gemma-3's middle layer, in tokens."""

FLATTER = 0.4
"""Factor on the query and key projections: attention logits with a standard deviation near 1."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a toy model: 3 layers, 4 heads on 2 kv heads, head_dim 16, 304 tokens."""
    from transformers import (
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
    )

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,  # large enough that one flipped cache entry moves the logits
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
        "attention_dropout": 0.0,
    }
    if family == "llama":
        made = LlamaConfig(**(common | overrides))
    elif family == "qwen2":
        made = Qwen2Config(**(common | {"use_sliding_window": False} | overrides))
    elif family == "qwen3":
        made = Qwen3Config(**(common | {"use_sliding_window": False} | overrides))
    elif family == "mistral":
        made = MistralConfig(**(common | {"sliding_window": None} | overrides))
    elif family == "phi3":
        made = Phi3Config(
            **(common | {"sliding_window": None, "original_max_position_embeddings": 8192} | overrides)
        )
    elif family == "gemma3":
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        own = {"sliding_window": GEMMA_WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 16}
        made = Gemma3TextConfig(**(common | own | overrides))
    else:
        raise ValueError(f"no toy family {family!r}; there are {', '.join(FAMILIES)}")
    return made


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A fresh random fp32 model in eval mode with sdpa attention; `generation_config` never stops early.

    The same seed gives the same weights. `overrides` go to the config (num_hidden_layers=1, ...).
    """
    from transformers import AutoModelForCausalLM

    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), dtype=torch.float32, attn_implementation="sdpa"
        )
        # Norm weights and biases start at constants, which would hide a mistake in how they are applied.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
            # At this initializer_range a head would look at two or three entries; the rest would not count.
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(FLATTER)
                elif name.endswith("qkv_proj.weight"):
                    parameter[: parameter.shape[0] - 2 * 16].mul_(FLATTER)
    finally:
        torch.random.set_rng_state(before)
    model.generation_config.eos_token_id = None
    return model.eval()


def toy_tokenizer() -> Any:
    """A byte-level tokenizer with a chat template: one token per byte of UTF-8, ids = byte order + 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *letters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        pad_token=SPECIALS[2],
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_toy_model(folder: str | Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A Hugging Face folder with a toy model and its tokenizer; returns the folder."""
    target = Path(folder)
    model = tiny_model(family, seed=seed, **overrides)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(target)
    toy_tokenizer().save_pretrained(target)
    return target
