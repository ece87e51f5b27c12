"""The compiled kernel of decoding: what torch computes in float64, or nothing at all."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import subprocess
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
from sparsekv import architecture
from sparsekv.attention import prepare
from sparsekv.cache import kernel
from sparsekv.cache.attend import attend_stored
from sparsekv.generation import compress
from toy import tiny_model

T, Q = 40, 7


@pytest.fixture(scope="session")
def compiler_with_openmp(tmp_path_factory: pytest.TempPathFactory) -> bool:
    source = tmp_path_factory.mktemp("openmp") / "empty.c"
    source.write_text("#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n")
    command = [*shlex.split(os.environ.get("CC") or "cc"), "-fopenmp", "-shared", "-fPIC", str(source)]
    try:
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".so"))], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


@pytest.fixture
def compiled(compiler_with_openmp: bool) -> None:
    """Only where it is switched off, or there is no compiler, may the kernel be missing."""
    if os.environ.get("SPARSEKV_KERNEL") == "0" or not compiler_with_openmp:
        pytest.skip("no kernel wanted, or no C compiler with OpenMP")
    assert kernel.is_on(), "there is a compiler, but no kernel"


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The next one who asks looks for the kernel anew."""
    kernel._library.cache_clear()
    yield
    kernel._library.cache_clear()


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


@pytest.mark.usefixtures("compiled")
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
        patch.setattr(kernel, "_SERIAL", 0)
        found = kernel.attend(*inputs, *sizes, scaling)
    assert found is not None and found.dtype == dtype and found.shape == inputs[0].shape
    error = (found.double() - exact(*inputs, sizes, scaling)).abs().max()
    assert error <= (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 3])
def test_nan_stays_in_its_segment(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernel, "_SERIAL", 0)
    sizes = (50, 200, 3), 1, 2
    for place in (1, 2):  # keys, values
        inputs = given_segments(sizes, 2, 16, torch.float32)
        inputs[place][60, 5] = torch.nan
        found = kernel.attend(*inputs, *sizes)
        assert found is not None
        lost = found.isnan()
        assert not lost[0].any() and not lost[2].any()
        assert lost[1].all() if place == 1 else lost[1, :, 5].all()


@pytest.mark.usefixtures("compiled")
def test_logits_without_bounds() -> None:
    """What torch gives where logits are infinite, and no trace of an entry that weighs nothing."""
    sizes = (400, 399, 40), 1, 2
    inputs = given_segments(sizes, 2, 16, torch.float32)
    queries, keys, values = inputs
    queries[:] = queries.abs() + 0.1
    keys[:300] = -3e38  # more than a piece of logits overflow to -infinity, then finite ones follow
    values[:300] = 3e38
    keys[403:802] = -torch.inf  # all of a segment but one
    found = kernel.attend(*inputs, *sizes)
    assert found is not None and found.isfinite().all()
    reduced = exact(*inputs, sizes, None)
    assert (found.double() - reduced).abs().max() <= 1e-5
    keys[402] = -torch.inf  # all of it
    keys[810] = torch.inf
    found = kernel.attend(*inputs, *sizes)
    assert found is not None and (found[1] == 0).all() and found[2].isnan().all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_alone_and_beside_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SERIAL", 0)
    counts, tail, room = (5, 777, 301, 2000), 1, 4
    inputs = given_segments((counts, tail, room), 3, 64, dtype)
    found = {}
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = kernel.attend(*inputs, counts, tail, room)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[5])
    parts = [x.split([count + room for count in counts]) for x in inputs[1:]]
    for i, count in enumerate(counts):
        alone = kernel.attend(inputs[0][i : i + 1], parts[0][i], parts[1][i], (count,), tail, room)
        assert torch.equal(alone, found[1][i : i + 1])


@pytest.mark.usefixtures("compiled")
def test_lengths_that_do_not_fit_are_refused() -> None:
    sizes = (5, 9), 1, 2
    queries, keys, values = given_segments(sizes, 2, 16, torch.float32)
    for wrong in (
        ((5, 10), 1, 2),
        ((5, 9), 1, 3),
        ((5, 9), 3, 2),
        ((14,), 1, 4),
        ((5, 9), -1, 2),
        ((-1, 15), 1, 2),
    ):
        with pytest.raises(ValueError, match="don't lie in keys of"):
            kernel.attend(queries, keys, values, *wrong)
    with pytest.raises(ValueError, match="don't lie in keys of"):
        kernel.attend(queries, keys, values[:, :8].contiguous(), *sizes)
    with pytest.raises(ValueError, match="don't lie in keys of"):
        kernel.attend(queries, keys, values, (14, 0), 0, 2)


@pytest.mark.usefixtures("compiled")
def test_what_it_does_not_take() -> None:
    sizes = (5, 9), 1, 2
    queries, keys, values = given_segments(sizes, 2, 16, torch.float32)
    assert kernel.attend(queries, keys, values, *sizes) is not None
    for given_instead in (
        (queries.half(), keys.half(), values.half()),
        (queries, keys, values.bfloat16()),
        (queries.mT.contiguous().mT, keys, values),
        (queries, keys.T.contiguous().T, values),
        (queries, nn.Parameter(keys), values),
        (torch._neg_view(queries), keys, values),
        (queries.to("meta"), keys.to("meta"), values.to("meta")),
    ):
        assert kernel.attend(*given_instead, *sizes) is None


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every result of the kernel, how many segments it has."""
    theirs, results = kernel.attend, []

    def counted(*given: Any) -> Tensor | None:
        result = theirs(*given)
        if result is not None:
            results.append(len(result))
        return result

    monkeypatch.setattr(kernel, "attend", counted)
    return results


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("policy", [Ragged(), Ends()])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_decodes_with_it(family: str, policy: Any, padded: bool, used: list[int]) -> None:
    model = prepare(tiny_model(family))
    ids = torch.randint(3, 250, (2, T + Q), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0 if padded else 1
    given_mask = mask if padded else None
    cache = compress(model, ids[:, :T], policy, 0.5, attention_mask=mask[:, :T] if padded else None)
    masked = masked_logits(model, ids, given_mask, cache.selection().extend(T + Q), Q)
    stepped = stepped_logits(model, cache, ids, given_mask, [1] * Q)
    assert (masked - stepped).abs().max() <= 1e-4
    n_layers = len(architecture.compressible_layers(architecture.text_config(model)))
    assert used == [2 * cache.layers[-1].n_kv_heads] * Q * n_layers, "one call for a layer and token"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("compiled")
def test_what_torch_reads(used: list[int]) -> None:
    """Several new tokens, gradients, autocast, a trace; single tokens are the kernel's."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (2, T + Q), generator=torch.Generator().manual_seed(3))
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    stepped_logits(model, cache, ids, None, [Q])
    model(input_ids=ids[:, :1], past_key_values=cache)  # with gradients
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert not used
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
        assert used
        used.clear()
        layer = compress(model, ids[:, :T], Ragged(), 0.5).layers[0]
        query = torch.randn(2, 4, 1, 16)
        before = attend_stored(layer, query, None, None)
        assert used
        used.clear()
        traced = torch.jit.trace(lambda x: attend_stored(layer, x, None, None), query, check_trace=False)
    assert not used
    assert (traced(query) - before).abs().max() <= 1e-5


def compiler(path: Path, script: str) -> str:
    """A compiler that does something else; its last arguments are `-o <library> -lm`."""
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; {script}\n')
    path.chmod(0o755)
    return str(path)


WAYS_TO_FAIL = {
    "no library": 'echo nothing > "$2"',
    "it says what is no text": "printf '\\377' >&2; exit 1",
    "it hangs": "sleep 60",
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("why", ["off", "no compiler", "no words", "no folder", "not mine", *WAYS_TO_FAIL])
def test_without_it_torch_does_the_work(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("SPARSEKV_HOME", str(home))
    monkeypatch.setattr(kernel, "_SECONDS", 1)
    if why == "off":
        monkeypatch.setenv("SPARSEKV_KERNEL", "0")
    elif why == "no folder":
        home.write_text("a file")
    elif why == "not mine":
        (home / "kernels").mkdir(parents=True)
        (home / "kernels").chmod(0o777)
    elif why in WAYS_TO_FAIL:
        monkeypatch.setenv("CC", compiler(tmp_path / "cc", WAYS_TO_FAIL[why]))
    else:
        monkeypatch.setenv("CC", {"no compiler": "/nowhere/cc", "no words": 'cc "'}[why])
    assert not kernel.is_on()
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(3))
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    assert (masked - stepped_logits(model, cache, ids, None, [1] * Q)).abs().max() <= 1e-4
    if home.is_dir():
        assert not list((home / "kernels").glob(".making-*")), "nothing half-made stays"


@pytest.mark.usefixtures("compiled", "unloaded")
def test_a_compiler_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSEKV_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -Dfloorf=ceilf")
    with caplog.at_level(logging.WARNING):
        assert not kernel.is_on()
    assert "computes something else" in caplog.text


@pytest.mark.usefixtures("compiled")
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel._loaded(tmp_path)
    (path,) = tmp_path.glob("*.so")
    with monkeypatch.context() as patch:
        patch.setattr(kernel.subprocess, "Popen", None)
        kernel._loaded(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {path.name, path.with_suffix(".sha256").name}
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_processor", lambda: "another machine that shares the folder")
        kernel._loaded(tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("damage", ["cut short", "empty", "no digest"])
def test_a_damaged_library_is_made_anew(damage: str, tmp_path: Path) -> None:
    """Not one that is loaded already: that would be given once more, whatever the file holds."""
    made = tmp_path / "made"
    made.mkdir()
    kernel._compile(["cc"], made / "attend.so")
    whole = (made / "attend.so").read_bytes()
    assert kernel._is_whole(made / "attend.so")
    if damage == "no digest":
        (made / "attend.sha256").unlink()
    else:
        (made / "attend.so").write_bytes(whole[: 0 if damage == "empty" else 8000])
    assert not kernel._is_whole(made / "attend.so")
    kernel._compile(["cc"], made / "attend.so")
    assert (made / "attend.so").read_bytes() == whole and kernel._is_whole(made / "attend.so")
    (made / "attend.so").chmod(0o666)
    with pytest.raises(RuntimeError, match="can be written by other users"):
        kernel._is_whole(made / "attend.so")


@pytest.mark.usefixtures("compiled", "unloaded")
def test_no_mode_of_torch_disturbs_the_check() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert kernel.is_on()


def _loads_it(answer: Any) -> None:
    torch.set_num_threads(1)
    kernel._library.cache_clear()
    answer.put(kernel.is_on())


@pytest.mark.usefixtures("compiled")
def test_a_forked_process_loads_it() -> None:
    """As a DataLoader's worker does, after the parent has used its threads."""
    fork = multiprocessing.get_context("fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1 << 20).exp().sum()
        answer = fork.SimpleQueue()
        child = fork.Process(target=_loads_it, args=(answer,))
        child.start()
        child.join(60)
        alive = child.is_alive()
        child.kill()
        assert not alive and answer.get()
    finally:
        torch.set_num_threads(threads)
