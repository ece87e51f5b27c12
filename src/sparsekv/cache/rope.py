"""Re-rotation: kept keys take consecutive positions again, as StreamingLLM does (arXiv 2309.17453, section 3.2).

Positions of new tokens are derived from tokens seen, so kept keys are rotated FORWARD to `[seen - stored, seen)`; RoPE
depends on distances only, so that equals moving them down to `[0, stored)`. Keys of an unbroken recent stretch do not
move at all; only what lies before a gap does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import ConfigError

# With these the frequencies are fixed, so a rotation by a difference of positions is exact.
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Rotation:
    """How to move one layer's keys.

    Parameters
    ----------
    inv_freq : FloatTensor [rotary size / 2]
    positions : LongTensor [B, T]
        RoPE position of every column of each row (padding does not count).
    """

    inv_freq: Tensor
    positions: Tensor

    def position(self, row: Tensor, column: Tensor) -> Tensor:
        """Original RoPE positions of entries."""
        row = row if self.positions.shape[0] > 1 else torch.zeros_like(row)
        return self.positions.to(row.device)[row, column]

    def seen(self, row: Tensor) -> Tensor:
        """The position that the next token of each row will have."""
        row = row if self.positions.shape[0] > 1 else torch.zeros_like(row)
        return self.positions.to(row.device)[row, -1] + 1

    def rotate(self, keys: Tensor, delta: Tensor) -> Tensor:
        """Rotate keys [N, D] by `delta` [N] positions, in fp32; only the rotary part of D turns."""
        angle = delta.to(torch.float32)[:, None] * self.inv_freq.to(device=keys.device, dtype=torch.float32)
        cos, sin = angle.cos(), angle.sin()
        half = angle.shape[-1]
        x = keys[:, : 2 * half].float()
        first, second = x[:, :half], x[:, half:]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(keys.dtype), keys[:, 2 * half :]], dim=-1)


def inverse_frequencies(decoder: Any) -> Tensor:
    """The frequencies that the decoder's full-attention layers rotate by.

    Raises
    ------
    ConfigError
        If the model rescales its frequencies with length (dynamic NTK, LongRoPE), where keys can't be moved.
    """
    rotary = decoder.rotary_emb
    kinds = getattr(rotary, "rope_type", "default")
    kind = kinds.get("full_attention", "default") if isinstance(kinds, dict) else kinds
    if kind not in _STATIC:
        raise ConfigError(
            f"re-rotation needs fixed RoPE frequencies; this model's rope_type is {kind!r} "
            f"(supported: {', '.join(_STATIC)})"
        )
    frequencies = getattr(rotary, "full_attention_inv_freq", None)
    if frequencies is None:
        frequencies = rotary.inv_freq
    return frequencies
