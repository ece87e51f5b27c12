"""What benchmarks read, and predictors where only their cost counts."""

from __future__ import annotations

from typing import Any

import torch

from sparsekv.benchmarks.data import haystack_text
from sparsekv.relevance import attach_relevance, has_relevance


def book_ids(tokenizer: Any, book: str) -> torch.Tensor:
    """LongTensor [1, T]: a packaged book, or a .txt file, without special tokens."""
    text = haystack_text(book)
    ids: torch.Tensor = tokenizer(
        text, return_tensors="pt", add_special_tokens=False, verbose=False
    ).input_ids
    return ids


def with_predictors(model: Any) -> Any:
    """The model, with fresh relevance predictors if it has none, which is said."""
    if has_relevance(model):
        return model
    print("fresh predictors: give --adapter for fitted ones")
    return attach_relevance(model)
