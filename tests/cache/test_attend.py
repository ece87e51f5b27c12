"""Attention over what a layer stores: long segments read in pieces give what they give as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged
from sparsekv.attention import prepare
from sparsekv.cache import attend, kernel
from sparsekv.generation import compress
from toy import tiny_model

T, Q = 40, 7


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No compiled kernel, four threads, and segments of 4 entries are long: in how many pieces each was read."""
    used: list[int] = []
    whole = attend._in_pieces

    def counted(queries: Tensor, keys: Tensor, values: Tensor, pieces: int, scaling: float | None) -> Tensor:
        used.append(pieces)
        return whole(queries, keys, values, pieces, scaling)

    monkeypatch.setattr(kernel, "_library", lambda: None)
    monkeypatch.setattr(attend, "_in_pieces", counted)
    monkeypatch.setattr(attend, "_PIECE", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(
    ("segments", "n", "pieces"), [(1, 2, 2), (1, 63, 4), (2, 64, 4), (3, 100, 3), (1, 999, 7)]
)
@pytest.mark.parametrize(("n_queries", "width"), [(6, 16), (1, 80), (3, 256)])
def test_pieces_give_the_whole(
    dtype: torch.dtype,
    scaling: float | None,
    segments: int,
    n: int,
    pieces: int,
    n_queries: int,
    width: int,
) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(2, segments, n + 9, width).to(dtype)  # segments with room behind them, as in a cache
    keys, values = buffer[:, :, :n]
    keys[0, -1] *= 30  # one entry takes nearly all, far from the mean of the others
    queries = torch.randn(1, segments, n_queries, width).to(dtype)
    found = attend._in_pieces(queries, keys, values, pieces, scaling)
    exact = nn.functional.scaled_dot_product_attention(
        queries.double(), keys[None].double(), values[None].double(), scale=scaling
    )
    stock = nn.functional.scaled_dot_product_attention(queries, keys[None], values[None], scale=scaling)
    assert found.dtype == dtype and found.shape == stock.shape
    error, stock_error = ((x.double() - exact).abs().max() for x in (found, stock))
    assert error <= 2 * stock_error + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("policy", [Ragged(), Ends()])
def test_a_model_answers_the_same(policy: Any, in_pieces: list[int]) -> None:
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(3))
    cache = compress(model, ids[:, :T], policy, 0.5)
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    assert (masked - stepped_logits(model, cache, ids, None, [1] * Q)).abs().max() <= 1e-4
    assert set(in_pieces) == ({2, 3, 4} if isinstance(policy, Ragged) else {2})


def test_what_is_read_as_a_whole(in_pieces: list[int]) -> None:
    """Where a mask hides something, where gradients are asked for, and where segments are as many as cores."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (2, T + Q), generator=torch.Generator().manual_seed(3))
    one, two = (compress(model, rows[:, :T], Ragged(), 0.5) for rows in (ids[:1], ids))
    stepped_logits(model, one, ids[:1], None, [Q])
    assert not in_pieces, "several new tokens do not see each other alike"
    for rows, cache in ((ids[:1], one), (ids, two)):
        model(input_ids=rows[:, :1], past_key_values=cache)  # with gradients
    assert not in_pieces
    even = compress(model, ids[:, :T], Ends(), 0.5)
    stepped_logits(model, even, ids, None, [1] * Q)
    assert not in_pieces, "two rows of two kv heads: four cores have a segment each"


def test_autocast_reads_as_a_whole(in_pieces: list[int]) -> None:
    """It casts what the stock attention is given, and keys and values differ in dtype by then."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        cache = compress(model, ids[:, :T], Ragged(), 0.5)
        stepped_logits(model, cache, ids, None, [1] * Q)
    assert not in_pieces


def test_what_the_kernel_does_not_take_is_left_to_the_stock_attention(in_pieces: list[int]) -> None:
    def given(**changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = {
            "queries": torch.randn(1, 1, 3, 8),
            "keys": torch.randn(1, 64, 8),
            "values": torch.randn(1, 64, 8),
        }
        return tuple((plain | changed).values())  # type: ignore[return-value]

    assert attend._pieces(*given()) == 4
    across = torch.randn(1, 8, 64).transpose(1, 2)
    for changed in (
        {"queries": torch.randn(1, 1, 0, 8)},
        {"queries": torch.randn(1, 1, 33, 8)},
        {"queries": torch.randn(1, 1, 8, 3).transpose(2, 3)},
        {"keys": across},
        {"values": across},
        {"values": torch.randn(1, 64, 4)},
        {"values": torch.randn(1, 64, 8, dtype=torch.bfloat16)},
        {"values": torch.randn(1, 64, 8, requires_grad=True)},
        {"queries": torch.randn(1, 0, 3, 8), "keys": torch.randn(0, 64, 8), "values": torch.randn(0, 64, 8)},
    ):
        inputs = given(**changed)
        assert attend._pieces(*inputs) == 1
        if inputs[1].dtype == inputs[2].dtype:
            stock = nn.functional.scaled_dot_product_attention(inputs[0], inputs[1][None], inputs[2][None])
            assert torch.equal(attend._attend(*inputs, None, None), stock)
    assert attend._pieces(*(x.double() for x in given())) == 1
    assert not in_pieces
