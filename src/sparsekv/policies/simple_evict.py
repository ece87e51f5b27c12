"""The functional form of sink + recent + uniform middle: a config and the indices of the tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.picks import spread_blocks, strided_blocks
from sparsekv.policies.sizes import check_size

MiddleStrategy = Literal["none", "uniform"]
MIDDLE_STRATEGIES: tuple[MiddleStrategy, ...] = ("none", "uniform")


@dataclass(frozen=True)
class SimpleEvictConfig:
    """What `build_simple_keep_token_idx` keeps.

    Parameters
    ----------
    sink_tokens : int >= 0
        First tokens that stay.
    recent_tokens : int >= 0
        Last tokens that stay.
    middle_strategy : "none" or "uniform"
        Whether anything between the two stays.
    middle_budget_tokens : int >= 0
        "uniform": tokens of the middle to keep, in evenly spread blocks, the last one cut to meet it.
    uniform_stride : int >= 0
        "uniform": keep the absolute blocks 0, stride, 2 * stride, ... of the middle instead; it overrides
        `middle_budget_tokens`. 0: off.

    Raises
    ------
    ConfigError
        For an unknown strategy, a negative size, or sizes for a middle that "none" does not keep.
    """

    sink_tokens: int = 256
    recent_tokens: int = 512
    middle_strategy: MiddleStrategy = "none"
    middle_budget_tokens: int = 0
    uniform_stride: int = 0

    def __post_init__(self) -> None:
        for field in ("sink_tokens", "recent_tokens", "middle_budget_tokens", "uniform_stride"):
            check_size("SimpleEvictConfig", field, getattr(self, field))
        if self.middle_strategy not in MIDDLE_STRATEGIES:
            raise unknown("middle_strategy", self.middle_strategy, MIDDLE_STRATEGIES)
        if self.middle_strategy == "none" and (self.middle_budget_tokens or self.uniform_stride):
            raise ConfigError(
                f"SimpleEvictConfig: middle_budget_tokens={self.middle_budget_tokens} and uniform_stride="
                f"{self.uniform_stride} need middle_strategy='uniform', got 'none'"
            )


def build_simple_keep_token_idx(
    total_len: int, block_n: int = 128, cfg: SimpleEvictConfig | None = None
) -> Tensor:
    """Indices of the tokens to keep.

    Parameters
    ----------
    total_len : int >= 0
        Tokens in the context.
    block_n : int >= 1
        Tokens per middle block.
    cfg : SimpleEvictConfig, optional
        Default: 256 sinks, 512 recent, no middle.

    Returns
    -------
    LongTensor [kept], ascending, without repetition. All of them if the context is no longer than sinks and
    recent.
    """
    cfg = cfg or SimpleEvictConfig()
    check_size("build_simple_keep_token_idx", "total_len", total_len)
    check_size("build_simple_keep_token_idx", "block_n", block_n, 1)
    start = min(cfg.sink_tokens, total_len)
    stop = max(start, total_len - cfg.recent_tokens)
    if cfg.uniform_stride:
        middle = strided_blocks(start, stop, block_n, cfg.uniform_stride)
    else:
        middle = spread_blocks(start, stop, block_n, cfg.middle_budget_tokens)
    return torch.cat([torch.arange(start), middle, torch.arange(stop, total_len)])
