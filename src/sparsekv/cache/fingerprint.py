"""Whose entries are these? A short hash of what a model computes with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sparsekv import architecture
from sparsekv.policies.learned_scores import NAME as PREDICTOR

_SAMPLES = 64

_NO_MATTER = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "problem_type"),
        *("attn_implementation", "_attn_implementation", "use_cache", "return_dict", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    )
)
"""Fields of a config that change no key and no value (numbers are compared where a cache meets a model)."""


def weights_fingerprint(model: Any) -> str:
    """A hash over the config and a sample of every parameter: another computation gives another fingerprint.

    Of the config everything that the computation depends on (RoPE, head counts, windows, softcaps), but neither paths
    nor versions nor the dtype. Adapters count, also whether they are switched off; relevance predictors, which only
    look on, do not.
    """
    config = architecture.text_config(model)
    fields = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, module in sorted(model.named_modules()):
        if getattr(module, "disable_adapters", False) is True:  # a peft layer whose adapter is switched off
            digest.update(f"off {name}".encode())
    for name, parameter in sorted(model.named_parameters()):
        if PREDICTOR in name.split("."):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
