"""Attention that gathers, query by query and head by head, the keys and values that are still there."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "gathering_reference"


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, evicted=None, **kwargs):
    """`evicted`: layer -> (evicted_at [B, H or 1, T], log_weight or None)."""
    at, weight = evicted[module.layer_idx]
    rows, n_heads, total, width = query.shape
    groups = n_heads // key.shape[1]
    output = []
    for row in range(rows):
        for head in range(n_heads):
            kv = head // groups
            spot = min(kv, at.shape[1] - 1)
            for q in range(total):
                leaves = at[row, spot, : q + 1]
                real = leaves > 0
                seen = (real & ((leaves > q) | torch.tensor(weight is not None))).nonzero().flatten()
                if len(seen) == 0:
                    output.append(query.new_zeros(width))
                    continue
                logits = key[row, kv, seen] @ query[row, head, q] * scaling
                if weight is not None:
                    gone = leaves[seen] <= q
                    logits = logits + torch.where(gone, weight[row, spot, seen], torch.zeros(()))
                output.append(logits.softmax(-1) @ value[row, kv, seen])
    return torch.stack(output).view(rows, n_heads, total, width).transpose(1, 2), None


@contextmanager
def gathering(model):
    """`model` with the reference as its attention."""
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
