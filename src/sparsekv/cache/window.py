"""The model's own sliding window as a cache layer: not compressed, but forked and restored with the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):
    """The model's own sliding window, without the views that would keep evicted keys alive."""

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, cache_kwargs)
        left = self.held()
        if left[0].shape[-2] < keys.shape[-2]:
            self.keys, self.values = (x.clone() for x in left)
        return keys, values

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the window, [B, H, up to sliding_window - 1, D]; both empty before the first update."""
        keys, values = self.keys, self.values
        return (torch.empty(0), torch.empty(0)) if keys is None or values is None else (keys, values)

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens. A window that a forward did not reach, before it broke off, stays as it is."""
        if max_length < 0 or max_length < self.cumulative_length:
            super().crop(max_length)

    def snapshot(self) -> Any:
        """References suffice: an update makes new tensors."""
        return self.is_initialized, self.keys, self.values, self.cumulative_length

    def restore(self, state: Any) -> None:
        """Back to a snapshot."""
        self.is_initialized, self.keys, self.values, self.cumulative_length = state

    def fork(self, rows: int) -> WindowLayer:
        """The same window, for `rows` copies of a single row."""
        twin = WindowLayer(self.sliding_window)
        if self.is_initialized:
            twin.lazy_initialization(self.keys, self.values)
            twin.keys, twin.values = (x.repeat_interleave(rows, dim=0) for x in (self.keys, self.values))
            twin.cumulative_length = self.cumulative_length
        return twin
