"""Tensors that can't be written to any more. Knows nothing of caches."""

from __future__ import annotations

import torch
from torch import Tensor


def is_frozen(x: Tensor) -> bool:
    """Whether a tensor was made in torch.inference_mode(), which is over: torch refuses to change it in place.

    A cache may be filled in that mode and go on outside of it, as stock transformers caches do.
    """
    return x.is_inference() and not torch.is_inference_mode_enabled()
