"""Selection as literal 0/1 matrices, its algebra under hypothesis, and traces that survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.selection import NEVER, Selection, SelectionTrace, StepSelection, stack


def at(*rows: list[int]) -> Selection:
    """B rows, one layer, one head."""
    return Selection(torch.tensor(rows, dtype=torch.int32)[:, None, None, :])


def matrix(selection: Selection, queries: int) -> list[list[int]]:
    return selection.visible(0, torch.arange(queries))[0, 0].int().tolist()


# ---- literal matrices ----


def test_the_drawing_of_the_module() -> None:
    selection = at([NEVER, NEVER, 4, 4, NEVER, NEVER])
    assert matrix(selection, 6) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert selection.slots(0, 4)[0][0].tolist() == [0, 1]
    assert selection.slots(0, 3)[0][0].tolist() == [0, 1, 2]  # before the eviction
    assert selection.slots(0, 6)[0][0].tolist() == [0, 1, 4, 5]


def test_eviction_one_by_one_with_padding() -> None:
    # column 0 is padding, 1 a sink, then a window of 2
    assert matrix(at([0, NEVER, 4, 5, 6]), 5) == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]


def test_from_kept() -> None:
    kept = torch.tensor([[[[False, True, False, True]]]])
    assert Selection.from_kept(kept).evicted_at[0, 0, 0].tolist() == [4, NEVER, 4, NEVER]
    pad = torch.tensor([[True, False, False, False]])
    assert Selection.from_kept(kept, pad=pad).evicted_at[0, 0, 0].tolist() == [0, NEVER, 4, NEVER]
    early = torch.tensor([[[[False, True, True, True]]]])
    assert Selection.from_kept(early, context_len=2).evicted_at[0, 0, 0].tolist() == [2, NEVER, NEVER, NEVER]
    with pytest.raises(ConfigError, match="own column"):
        Selection.from_kept(kept, context_len=2)  # column 2 would leave before it was read


def test_full_hides_padding_only() -> None:
    selection = Selection.full(torch.tensor([[0, 1, 1]]))
    assert selection.evicted_at[0, 0, 0].tolist() == [0, NEVER, NEVER]
    assert not selection.evicts()


def test_kept_at() -> None:
    selection = at([3, NEVER, 5, NEVER])
    assert selection.kept_at(2)[0, 0, 0].tolist() == [True, True, False, False]
    assert selection.kept_at(3)[0, 0, 0].tolist() == [False, True, True, False]
    assert selection.kept_at(5)[0, 0, 0].tolist() == [False, True, False, True]


def test_evicts() -> None:
    assert at([4, NEVER, NEVER, NEVER]).evicts()
    assert not at([0, NEVER]).evicts()


def test_boundaries_are_those_of_rows_that_evict_once() -> None:
    assert at([3, NEVER, 3, NEVER, NEVER]).boundaries == [(0, 3)]
    assert at([0, 0, 4, NEVER, NEVER]).boundaries == [(2, 4)], "padding on the left"
    assert at([NEVER, NEVER]).boundaries == [(0, 2)], "nothing leaves"
    assert at([3, 4, NEVER, NEVER]).boundaries is None, "a window leaves column by column"
    assert at([NEVER, 0, NEVER]).boundaries is None, "padding inside"
    assert at([NEVER, NEVER, 9]).boundaries is None, "leaves after the last column"


def test_layers_and_heads_may_be_shared() -> None:
    two = Selection(torch.tensor([[[[2, NEVER]], [[NEVER, 2]]]], dtype=torch.int32))
    assert two.shape == (1, 2, 1, 2)
    assert two.layer(1).tolist() == [[[NEVER, 2]]]
    assert at([2, NEVER]).layer(7).tolist() == [[[2, NEVER]]]
    weighted = Selection(two.evicted_at, torch.tensor([[[[-1.0, 0.0]]]]))
    assert weighted.layer_log_weight(1) is not None and two.layer_log_weight(0) is None
    assert weighted.layer_log_weight(5).tolist() == [[[-1.0, 0.0]]]  # type: ignore[union-attr]


# ---- refused ----


def test_a_token_sees_itself() -> None:
    with pytest.raises(ConfigError, match="own column"):
        at([NEVER, 1])
    with pytest.raises(ConfigError, match="own column"):
        at([NEVER, -1])
    assert matrix(at([1, 2]), 2) == [[1, 0], [0, 1]]  # the shortest life there is


def test_shapes_and_types_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"int32 \[B, L, H, T\].*int64"):
        Selection(torch.ones(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"\(1, 1, 4\)"):
        Selection(torch.full((1, 1, 4), NEVER, dtype=torch.int32))
    with pytest.raises(ConfigError, match="log_weight"):
        Selection(at([NEVER]).evicted_at, torch.zeros(1))
    with pytest.raises(ConfigError, match="extend to 1 columns"):
        at([NEVER, NEVER]).extend(1)


# ---- algebra ----


@st.composite
def selections(draw: st.DrawFn, n: int, *, pad: int = 0, heads: int = 1) -> Selection:
    rows = []
    for _ in range(heads):
        leave = [draw(st.one_of(st.just(NEVER), st.integers(k + 1, n + 5))) for k in range(pad, n)]
        rows.append([0] * pad + leave)
    return Selection(torch.tensor(rows, dtype=torch.int32)[None, None])


def dense(selection: Selection, queries: int) -> list[list[list[bool]]]:
    """visible(q, k) = k <= q < evicted_at[k], one comparison at a time."""
    heads = selection.evicted_at[0, 0].tolist()
    return [[[k <= q < leave for k, leave in enumerate(head)] for q in range(queries)] for head in heads]


@settings(max_examples=60, deadline=None)
@given(selection=st.integers(1, 12).flatmap(lambda n: selections(n, heads=2)))
def test_every_reader_agrees_with_the_one_rule(selection: Selection) -> None:
    n = selection.shape[-1]
    truth = dense(selection, n + 6)
    assert selection.visible(0, torch.arange(n + 6))[0].tolist() == truth
    for step in range(n + 6):
        for head in range(2):
            earlier = [k for k, seen in enumerate(truth[head][step]) if seen and k < step]
            assert selection.slots(0, step)[0][head].tolist() == earlier
            assert selection.kept_at(step)[0, 0, head].nonzero().flatten().tolist() == earlier
    assert selection.evicts() == bool((selection.evicted_at < NEVER).any())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 10), more=st.integers(0, 5), pad=st.integers(0, 3))
def test_merge_sees_what_both_see(data: st.DataObject, n: int, more: int, pad: int) -> None:
    pad = min(pad, n - 1)
    a, b = data.draw(selections(n, pad=pad)), data.draw(selections(n + more, pad=pad, heads=2))
    merged = a.merge(b)
    queries = torch.arange(n + more + 6)
    both = a.extend(n + more).visible(0, queries) & b.visible(0, queries)
    assert torch.equal(merged.visible(0, queries), both)
    assert torch.equal(merged.evicted_at, b.merge(a).evicted_at)
    assert torch.equal(merged.merge(a).evicted_at, merged.evicted_at)
    assert torch.equal(a.merge(a).evicted_at, a.evicted_at)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 10), more=st.integers(0, 5))
def test_extend_changes_no_old_entry_and_keeps_new_ones(data: st.DataObject, n: int, more: int) -> None:
    selection = data.draw(selections(n))
    longer = selection.extend(n + more)
    assert torch.equal(longer.evicted_at[..., :n], selection.evicted_at)
    assert longer.evicted_at[..., n:].flatten().tolist() == [NEVER] * more


def test_extend_keeps_the_soft_weight_of_new_entries_neutral() -> None:
    soft = Selection(at([2, NEVER]).evicted_at, torch.tensor([[[[-3.0, 0.0]]]]))
    assert soft.extend(4).log_weight.flatten().tolist() == [-3.0, 0.0, 0.0, 0.0]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="hard selections"):
        soft.merge(at([2, NEVER]))


def test_row_and_stack_undo_each_other() -> None:
    batch = at([3, NEVER, NEVER], [0, NEVER, 3])
    assert torch.equal(stack([batch.row(0), batch.row(1)]).evicted_at, batch.evicted_at)
    many = Selection(torch.full((1, 2, 3, 3), NEVER, dtype=torch.int32))
    mixed = stack([batch.row(0), many])
    assert mixed.shape == (2, 2, 3, 3)
    assert mixed.evicted_at[0].tolist() == [[[3, NEVER, NEVER]] * 3] * 2


def test_to_moves_both_tensors() -> None:
    soft = Selection(at([2, NEVER]).evicted_at, torch.zeros(1, 1, 1, 2))
    moved = soft.to("cpu")
    assert moved.log_weight is not None and torch.equal(moved.evicted_at, soft.evicted_at)


# ---- step selections and traces ----


def test_attended_fraction_counts_stored_entries_only() -> None:
    attended = torch.tensor([[[[1, 1, 0, 0], [1, 0, 1, 0]]]]).bool()
    stored = torch.tensor([[[[1, 0, 1, 0], [1, 1, 1, 0]]]]).bool()
    # head 0: 1 of 2, head 1: 2 of 3
    assert StepSelection(attended).attended_fraction(stored) == pytest.approx(3 / 5)
    shared = torch.tensor([[[[1, 1, 1, 0]]]]).bool()
    assert StepSelection(attended).attended_fraction(shared) == pytest.approx(4 / 6)
    assert StepSelection(attended).attended_fraction(torch.zeros_like(stored)) == 1.0


def ragged() -> Selection:
    leaves = [
        [[0, 4, NEVER, 6, NEVER, NEVER], [0, 6, 6, 6, 6, 6]],
        [[0, NEVER, 3, 4, 5, 6], [0] + [NEVER] * 5],
    ]
    return Selection(torch.tensor([leaves], dtype=torch.int32))


def test_trace_counts_without_padding() -> None:
    trace = SelectionTrace.from_selection(ragged(), [4, 6], pad=1)
    assert trace.steps == [3, 5] and trace.length == 5
    assert [[h.tolist() for h in layer] for layer in trace.kept[0]] == [[[1, 2], [0, 1, 2]], [[0], [0, 1, 2]]]
    assert [[h.tolist() for h in layer] for layer in trace.kept[1]] == [
        [[1, 3, 4], []],
        [[0], [0, 1, 2, 3, 4]],
    ]


@pytest.mark.parametrize("steps", [[], [6], [1, 4, 6]])
def test_trace_survives_a_round_trip(tmp_path: Path, steps: list[int]) -> None:
    trace = SelectionTrace.from_selection(ragged(), steps, pad=1)
    trace.save(tmp_path / "one.safetensors")
    back = SelectionTrace.load(tmp_path / "one.safetensors")
    assert back.steps == trace.steps and back.length == trace.length
    plain = [[[[h.tolist() for h in layer] for layer in step] for step in one.kept] for one in (trace, back)]
    assert plain[0] == plain[1]
    assert all(h.dtype == torch.int32 for step in back.kept for layer in step for h in layer)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]  # no temporary left


def test_trace_of_one_row_of_a_batch() -> None:
    batch = at([NEVER, 3, 3], [0, NEVER, 3])
    trace = SelectionTrace.from_selection(batch, [3], row=1, pad=1)
    assert trace.kept[0][0][0].tolist() == [0] and trace.steps == [2]
