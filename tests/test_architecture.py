"""Which layers can be compressed, and where the parts of a model are, on tiny models of every family."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from sparsekv import architecture
from sparsekv.errors import ConfigError

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# config -> indices of the layers that see the whole context, and the width of one key
CASES = {
    "llama": (LlamaConfig(**TINY), [0, 1, 2, 3], 8),
    "llama_head_dim": (LlamaConfig(**TINY, head_dim=16), [0, 1, 2, 3], 16),
    "qwen2": (Qwen2Config(**TINY), [0, 1, 2, 3], 8),
    "qwen2_window": (
        Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=3),
        [0, 1, 2],
        8,
    ),
    "qwen3": (Qwen3Config(**TINY, head_dim=16), [0, 1, 2, 3], 16),
    "mistral": (MistralConfig(**TINY, sliding_window=None), [0, 1, 2, 3], 8),
    "mistral_window": (MistralConfig(**TINY, sliding_window=16), [], 8),
    "phi3": (Phi3Config(**TINY), [0, 1, 2, 3], 8),
    "gemma3_text": (Gemma3TextConfig(**TINY, head_dim=8, sliding_window=16, layer_types=MIXED), [1, 3], 8),
    "gemma3": (
        Gemma3Config(text_config={**TINY, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
        [1, 3],
        8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compressible_layers_and_sizes(name):
    config, compressible, head_dim = CASES[name]
    assert architecture.compressible_layers(config) == compressible
    assert architecture.head_dim(config) == head_dim
    assert architecture.num_kv_heads(config) == 2
    assert architecture.num_layers(config) == 4
    assert architecture.max_context(config) == 128


@pytest.mark.parametrize("name", CASES)
def test_layer_types_agree_with_the_cache_that_transformers_builds(name):
    config, _, _ = CASES[name]
    stock = DynamicCache(config=config).layers
    expected = [i for i, layer in enumerate(stock) if not isinstance(layer, DynamicSlidingWindowLayer)]
    assert architecture.compressible_layers(config) == expected
    assert len(architecture.layer_types(config)) == len(stock)


@pytest.mark.parametrize("name", [n for n in CASES if n != "gemma3"])
def test_module_lookup_finds_the_layers_and_their_caches(name):
    config, _, head_dim = CASES[name]
    model = AutoModelForCausalLM.from_config(config)
    layers = architecture.decoder_layers(model)
    assert layers == list(model.model.layers)
    assert [m.layer_idx for m in architecture.attention_modules(model)] == [0, 1, 2, 3]
    with torch.no_grad():
        cache = model(torch.arange(1, 7)[None]).past_key_values
    assert all(layer.keys.shape == (1, 2, 6, head_dim) for layer in cache.layers)


def test_multimodal_gemma3_is_read_through_its_text_decoder():
    config = Gemma3Config(
        text_config={**TINY, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    model = Gemma3ForConditionalGeneration(config)
    assert architecture.decoder_layers(model) == list(model.model.language_model.layers)
    assert architecture.text_model(model).rotary_emb is model.model.language_model.rotary_emb
    assert architecture.compressible_layers(model) == [1, 3]
    architecture.check_supported(model)


def test_peft_wrapper_is_looked_through():
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    layers = list(plain.model.layers)
    wrapped = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    assert architecture.unwrap(wrapped) is plain
    assert architecture.unwrap(plain) is plain
    assert architecture.decoder_layers(wrapped) == layers
    assert architecture.compressible_layers(wrapped) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [n for n in CASES if n != "mistral_window"])
def test_supported_families_pass(name):
    architecture.check_supported(CASES[name][0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (GPT2Config(), r"'gpt2' is not supported; supported model types: llama, .*gemma3"),
        (BertConfig(), "'bert' is not supported"),
        (MistralConfig(**TINY, sliding_window=16), "all 4 layers have a sliding window of 16 tokens"),
    ],
)
def test_unsupported_models_are_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        architecture.check_supported(config)
    assert "\n" not in str(caught.value)


def test_module_tree_without_decoder_layers_is_refused():
    with pytest.raises(ConfigError, match="Linear has no decoder layers"):
        architecture.decoder_layers(nn.Linear(2, 2))
