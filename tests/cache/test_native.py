"""The compiled kernel of decoding: what torch computes in float64, or nothing at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged
from sparsekv.attention import prepare
from sparsekv.cache import native
from sparsekv.generation import compress
from toy import tiny_model

T, Q = 40, 7


@pytest.fixture
def kernel() -> None:
    """Only where there is no compiler may the kernel be missing."""
    if not native.is_on():
        assert shutil.which(os.environ.get("CC", "cc")) is None, "there is a compiler, but no kernel"
        pytest.skip("no C compiler")


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The next one who asks looks for the kernel anew."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def exact(queries: Tensor, keys: Tensor, values: Tensor, sizes: Any, scaling: float | None) -> Tensor:
    """In float64, segment by segment."""
    counts, tail, room = sizes
    parts = [x.double().split([count + room for count in counts]) for x in (keys, values)]
    return torch.stack(
        [
            nn.functional.scaled_dot_product_attention(
                query[None].double(), k[None, : n + tail], v[None, : n + tail], scale=scaling
            )[0]
            for query, k, v, n in zip(queries, *parts, counts, strict=True)
        ]
    )


def given_segments(
    sizes: Any, n_queries: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random queries, keys and values; slots that nobody may read are NaN."""
    counts, tail, room = sizes
    random = torch.Generator().manual_seed(seed)
    shapes = (len(counts), n_queries, width), *[(sum(counts) + len(counts) * room, width)] * 2
    queries, keys, values = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    end = 0
    for count in counts:
        end += count + room
        keys[end - room + tail : end] = values[end - room + tail : end] = torch.nan
    return queries, keys, values


@pytest.mark.usefixtures("kernel")
@settings(deadline=None, max_examples=200)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=9).map(tuple),
    tail=st.integers(1, 5),
    spare=st.integers(0, 4),
    n_queries=st.integers(1, 9),
    width=st.sampled_from([1, 7, 16, 64, 80, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 6),
    scaling=st.sampled_from([None, 0.3]),
)
def test_what_torch_computes(
    counts: tuple[int, ...],
    tail: int,
    spare: int,
    n_queries: int,
    width: int,
    dtype: torch.dtype,
    threads: int,
    scaling: float | None,
) -> None:
    sizes = counts, tail, tail + spare
    inputs = given_segments(sizes, n_queries, width, dtype)
    inputs[1][-1 - spare] *= 30  # one entry takes nearly all, far from the mean of the others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(native, "_SERIAL", 0)
        found = native.attend(*inputs, *sizes, scaling)
    assert found is not None and found.dtype == dtype and found.shape == inputs[0].shape
    error = (found.double() - exact(*inputs, sizes, scaling)).abs().max()
    assert error <= (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("threads", [1, 3])
def test_nan_stays_in_its_segment(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "_SERIAL", 0)
    sizes = (50, 200, 3), 1, 2
    for place in (1, 2):  # keys, values
        inputs = given_segments(sizes, 2, 16, torch.float32)
        inputs[place][60, 5] = torch.nan
        found = native.attend(*inputs, *sizes)
        assert found is not None
        lost = found.isnan()
        assert not lost[0].any() and not lost[2].any()
        assert lost[1].all() if place == 1 else lost[1, :, 5].all()


@pytest.mark.usefixtures("kernel")
def test_lengths_that_do_not_fit_are_refused() -> None:
    sizes = (5, 9), 1, 2
    queries, keys, values = given_segments(sizes, 2, 16, torch.float32)
    for wrong in (((5, 10), 1, 2), ((5, 9), 1, 3), ((5, 9), 3, 2), ((14,), 1, 4)):
        with pytest.raises(ValueError, match="don't lie in keys of"):
            native.attend(queries, keys, values, *wrong)
    with pytest.raises(ValueError, match="don't lie in keys of"):
        native.attend(queries, keys, values[:, :8].contiguous(), *sizes)


@pytest.mark.usefixtures("kernel")
def test_what_it_does_not_take() -> None:
    sizes = (5, 9), 1, 2
    queries, keys, values = given_segments(sizes, 2, 16, torch.float32)
    for given_instead in (
        (queries.half(), keys.half(), values.half()),
        (queries, keys, values.bfloat16()),
        (queries.mT.contiguous().mT, keys, values),
        (queries, keys.T.contiguous().T, values),
        (queries, nn.Parameter(keys), values),
    ):
        assert native.attend(*given_instead, *sizes) is None


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("policy", [Ragged(), Ends()])
def test_a_model_decodes_with_it(family: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def counted(*given: Any) -> Tensor | None:
        used.append(given[0].shape)
        return theirs(*given)

    theirs = native.attend
    monkeypatch.setattr(native, "attend", counted)
    model = prepare(tiny_model(family))
    ids = torch.randint(3, 250, (2, T + Q), generator=torch.Generator().manual_seed(3))
    cache = compress(model, ids[:, :T], policy, 0.5)
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    assert (masked - stepped_logits(model, cache, ids, None, [1] * Q)).abs().max() <= 1e-4
    assert len(used) >= Q, "one call for a layer and token, whatever its heads keep"
    used.clear()
    cache = compress(model, ids[:, :T], policy, 0.5)
    stepped_logits(model, cache, ids, None, [Q])
    assert not used, "several new tokens do not see each other alike"
    model(input_ids=ids[:, :1], past_key_values=cache)  # with gradients
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert not used


def broken(tmp_path: Path) -> str:
    """A compiler that leaves something which is no library."""
    path = tmp_path / "cc"
    path.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo nothing > "$2"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("why", ["off", "no compiler", "it fails", "no library", "no folder"])
def test_without_it_torch_does_the_work(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("SPARSEKV_HOME", str(home))
    if why == "off":
        monkeypatch.setenv("SPARSEKV_NATIVE", "0")
    elif why == "no folder":
        home.write_text("a file")
    else:
        compilers = {"no compiler": "/nowhere/cc", "it fails": "false", "no library": broken(tmp_path)}
        monkeypatch.setenv("CC", compilers[why])
    assert not native.is_on()
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(3))
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    assert (masked - stepped_logits(model, cache, ids, None, [1] * Q)).abs().max() <= 1e-4
    if home.is_dir():
        assert not list((home / "native").glob(".making-*")), "nothing half-made stays"


@pytest.mark.usefixtures("kernel", "unloaded")
def test_a_compiler_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSEKV_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -Dfloorf=ceilf")
    with caplog.at_level(logging.WARNING):
        assert not native.is_on()
    assert "computes something else" in caplog.text


@pytest.mark.usefixtures("kernel")
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native._compiled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(native.subprocess, "run", None)
        assert native._compiled(tmp_path) == path
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    monkeypatch.setattr(native, "_processor", lambda: "another machine that shares the folder")
    assert native._compiled(tmp_path) != path
