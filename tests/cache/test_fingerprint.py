"""The fingerprint: another computation gives another one, all else the same."""

from __future__ import annotations

import pytest
import torch

from sparsekv.attention import prepare
from sparsekv.cache.fingerprint import weights_fingerprint
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.relevance import attach_relevance
from toy import tiny_model


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("mistral", {"sliding_window": 16}),
        ("gemma3", {"attn_logit_softcapping": 20.0}),
        ("gemma3", {"query_pre_attn_scalar": 32}),
    ],
)
def test_a_config_that_computes_something_else_counts_although_the_weights_are_the_same(family, change):
    assert weights_fingerprint(tiny_model(family)) != weights_fingerprint(tiny_model(family, **change))


def test_what_no_key_depends_on_does_not_count():
    model = tiny_model("llama")
    before = weights_fingerprint(model)
    prepare(model)
    attach_relevance(model)
    model.config._name_or_path, model.config.transformers_version = "elsewhere", "9.9"
    model.config.pad_token_id, model.config.use_cache, model.config.dtype = 7, False, torch.bfloat16
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    assert weights_fingerprint(model) != before


def test_an_adapter_that_is_switched_off_counts():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    plain = model.get_base_model()
    on = weights_fingerprint(plain)
    with model.disable_adapter():
        assert weights_fingerprint(plain) != on
    assert weights_fingerprint(plain) == on


def test_a_cache_refuses_the_same_model_in_another_dtype():
    coarse = tiny_model("llama").to(torch.bfloat16)
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(3))
    model = prepare(coarse)
    cache = compress(model, ids[:, :20], "sink_recent", 12, cache=TieredCache(model, 16))
    fine = prepare(tiny_model("llama").to(torch.bfloat16).float())
    assert weights_fingerprint(fine) == weights_fingerprint(model), "the weights are the same numbers"
    with pytest.raises(ConfigError, match=r"entries of a model in bfloat16, it was given one in float32$"):
        compress(fine, ids, "sink_recent", 12, cache=cache)
