"""Steps that read a part of what is stored: against the formulas written out slowly, in every state of a layer."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.attention import prepare
from sparsekv.cache.attend import attend_stored
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.steps import StepReader
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.policies.step_rules import (
    HybridRule,
    Pages,
    QuestRule,
    StepRule,
    StepSizes,
    best_entries,
    page_bounds,
)
from toy import tiny_model

B, H, G, D = 2, 2, 3, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(n: int, rows: int = B, seed: int = 0) -> SparseLayer:
    layer = SparseLayer()
    layer.update(draw(rows, H, n, D, seed=seed), draw(rows, H, n, D, seed=seed + 1))
    return layer


def append(layer: SparseLayer, n: int, seed: int) -> None:
    layer.update(draw(layer.batch, H, n, D, seed=seed), draw(layer.batch, H, n, D, seed=seed + 1))


def entries(layer: SparseLayer) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) [n, D] of every segment."""
    return [(k, v) for group in layer.groups() for k, v in zip(group.keys, group.values, strict=True)]


def attend_to(query: Tensor, keys: Tensor, values: Tensor, chosen: list[int], scaling: float) -> Tensor:
    weights = (query @ keys[chosen].T * scaling).softmax(-1)
    return weights @ values[chosen]


def quest_by_hand(query: Tensor, keys: Tensor, rule: QuestRule) -> list[int]:
    """Slots that a step reads: query [G, D], keys [n, D]."""
    n = len(keys)
    bounds = []
    for start in range(0, n, rule.page_size):
        page = keys[start : start + rule.page_size]
        low, high = page.min(0).values, page.max(0).values
        of_heads = [
            sum(max(float(q * a), float(q * b)) for q, a, b in zip(head, low, high, strict=True))
            for head in query
        ]
        bounds.append((max(of_heads), list(range(start, min(start + rule.page_size, n)))))
    bounds.sort(key=lambda pair: -pair[0])
    return [slot for _, page in bounds for slot in page][: rule.budget.n_kept(n)]


def hybrid_by_hand(query: Tensor, keys: Tensor, sizes: StepSizes, scaling: float) -> list[int]:
    """RocketKV's second stage, token by token: query [G, D], keys [n, D]."""
    n = len(keys)
    channels = query.abs().sum(0).argsort(descending=True)[: sizes.n_dims].tolist()
    weight = torch.zeros(n)
    for head in query:
        logits = torch.zeros(n)
        for t in range(n):
            start = t // sizes.page_size * sizes.page_size
            page = keys[start : start + sizes.page_size]
            for d in channels:
                bound = page[:, d].max() if float(query[:, d].sum()) > 0 else page[:, d].min()
                logits[t] += head[d] * bound
        share = float(head[channels].abs().sum() / head.abs().sum())
        weight += (logits * scaling / math.sqrt(share)).softmax(-1) / len(query)
    return sorted(range(n), key=lambda t: (-float(weight[t]), t))[: sizes.n_attended]


RULES = [
    QuestRule(Budget(tokens=9), 4),
    QuestRule(Budget(compression_ratio=0.7), 5),
    HybridRule(compression=5.0),
    HybridRule(tokens=6),
    HybridRule(compression=1.4),
]


def expected(rule: StepRule, query: Tensor, layer: SparseLayer, scaling: float) -> Tensor:
    """[B, 1, Hq, D]: one step of every segment on its own."""
    rows = []
    folded = query.reshape(layer.batch * H, G, D)
    for segment, (keys, values) in enumerate(entries(layer)):
        of_segment, n = folded[segment], len(keys)
        sizes = rule.sizes(n, D)
        chosen = list(range(n))
        if sizes is not None and isinstance(rule, QuestRule):
            chosen = quest_by_hand(of_segment, keys, rule)
        elif sizes is not None:
            chosen = hybrid_by_hand(of_segment, keys, sizes, scaling)
        rows.append(attend_to(of_segment, keys, values, chosen, scaling))
    return torch.stack(rows).view(layer.batch, H * G, 1, D).transpose(1, 2)


def ragged(n: int = 41) -> SparseLayer:
    layer = filled(n)
    kept = torch.rand(B, H, n, generator=torch.Generator().manual_seed(3)) < torch.tensor(
        [[[0.9], [0.3]], [[0.6], [0.6]]]
    )
    kept[..., 0] = True
    layer.keep(kept)
    append(layer, 3, seed=5)
    return layer


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(
    "make", [lambda: filled(37), ragged, lambda: filled(1)], ids=["dense", "ragged", "one"]
)
def test_a_step_equals_the_formula(rule: StepRule, make: object) -> None:
    layer, reader = make(), StepReader(rule)  # type: ignore[operator]
    for step in range(3):
        query = draw(B, H * G, 1, D, seed=20 + step)
        out = reader.attend(layer, query, None, 0.3)
        torch.testing.assert_close(out, expected(rule, query, layer, 0.3), atol=1e-5, rtol=1e-5)
        append(layer, 1, seed=30 + step)


def test_sizes_are_the_papers() -> None:
    """Numbers by hand: c = 9 gives pages of 3 and 64 * 3 / 9 = 21 channels; half of 900 / 9 entries are read."""
    assert HybridRule(compression=9.0).sizes(900, 64) == StepSizes(3, 50, 21)
    assert HybridRule(tokens=100).sizes(900, 64) == StepSizes(3, 50, 21)
    assert HybridRule(compression=1.5).sizes(300, 64) == StepSizes(1, 100, 43)  # no page: floor(1.5) = 1
    assert HybridRule(compression=2.0).sizes(300, 64) == StepSizes(2, 75, 64)
    assert HybridRule(tokens=300).sizes(300, 64) is None and HybridRule(tokens=301).sizes(300, 64) is None
    assert HybridRule(compression=1000.0).sizes(20, 64) == StepSizes(32, 1, 2)
    assert QuestRule(Budget(tokens=40), 16).sizes(41, 64) == StepSizes(16, 40, 64)
    assert QuestRule(Budget(tokens=40), 16).sizes(40, 64) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 999))
def test_no_key_of_a_page_exceeds_its_bound(page_size: int, n_pages: int, seed: int) -> None:
    keys, query = draw(1, page_size * n_pages, D, seed=seed), draw(1, G, D, seed=seed + 1)
    low, high = torch.aminmax(keys.unflatten(1, (n_pages, page_size)), dim=2)
    bounds = page_bounds(query, low, high)
    logits = (query @ keys.transpose(1, 2)).unflatten(2, (n_pages, page_size))
    assert bool((logits.amax(-1) <= bounds + 1e-4).all())
    if page_size == 1:
        torch.testing.assert_close(bounds, logits[..., 0])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_best_entries_are_distinct_and_page_by_page(n: int, page_size: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, n))
    scores = draw(3, -(-n // page_size), seed=n)
    chosen = best_entries(scores, n, StepSizes(page_size, wanted, D))
    assert chosen.shape == (3, wanted) and int(chosen.max()) < n
    for row, of_row in zip(chosen.tolist(), scores, strict=True):
        pages = [slot // page_size for slot in row]
        in_order = of_row.argsort(descending=True).tolist()
        slots = [s for page in in_order for s in range(page * page_size, min((page + 1) * page_size, n))]
        assert row == slots[:wanted] and pages == sorted(pages, key=in_order.index)


@dataclass(frozen=True)
class EverythingByPages(StepRule):
    """Goes the whole way, and chooses all there is."""

    page_size: int = 4

    def sizes(self, n_stored: int, width: int) -> StepSizes:
        return StepSizes(self.page_size, n_stored, width)

    def page_scores(self, query: Tensor, pages: Pages, sizes: StepSizes, scaling: float) -> Tensor:
        return page_bounds(query, pages.lowest, pages.highest).sum(1)


@pytest.mark.parametrize("make", [lambda: filled(37), ragged], ids=["dense", "ragged"])
def test_choosing_everything_is_full_attention(make: object) -> None:
    layer = make()  # type: ignore[operator]
    query = draw(B, H * G, 1, D, seed=7)
    full = attend_stored(layer, query, None, 0.3)
    for rule in (
        EverythingByPages(),
        EverythingByPages(1),
        HybridRule(tokens=999),
        QuestRule(Budget(tokens=99), 4),
    ):
        reader = StepReader(rule)
        torch.testing.assert_close(reader.attend(layer, query, None, 0.3), full, atol=1e-5, rtol=0)
        assert reader.attended_fraction == 1.0
    part = StepReader(HybridRule(compression=4.0)).attend(layer, query, None, 0.3)
    assert (part - full).abs().max() > 1e-2  # the negative control: reading less is something else


def test_several_queries_read_everything() -> None:
    layer, reader = ragged(), StepReader(HybridRule(compression=4.0))
    reader.attend(layer, draw(B, H * G, 1, D), None, 0.3)
    assert reader.attended_fraction < 1
    query = draw(B, H * G, 3, D, seed=9)
    assert torch.equal(reader.attend(layer, query, None, 0.3), attend_stored(layer, query, None, 0.3))
    assert reader.attended_fraction == 1.0 and reader.last_step() is None


@pytest.mark.parametrize("rule", [RULES[0], RULES[2]], ids=["quest", "hybrid"])
def test_bounds_follow_whatever_happens_to_the_layer(rule: StepRule) -> None:
    layer, reader = filled(30), StepReader(rule)

    def check(seed: int) -> None:
        query = draw(layer.batch, H * G, 1, D, seed=seed)
        out = reader.attend(layer, query, None, 0.3)
        torch.testing.assert_close(out, expected(rule, query, layer, 0.3), atol=1e-5, rtol=1e-5)

    check(40)
    saved = layer.snapshot()
    for step in range(70):  # beyond the spare room of the buffer and of the bounds
        append(layer, 1, seed=100 + step)
        if step % 9 == 0:
            check(41 + step)
    layer.crop(50)
    append(layer, 2, seed=300)  # written over slots that were summarised before the crop
    check(43)
    layer.restore(saved)
    append(layer, 1, seed=301)
    check(44)
    layer.reorder_cache(torch.tensor([1, 0]))
    check(45)
    kept = torch.rand(2, H, layer.get_seq_length(), generator=torch.Generator().manual_seed(1)) < 0.7
    layer.keep(kept)
    check(46)
    append(layer, 9, seed=302)
    check(47)
    layer.batch_select_indices(torch.tensor([1]))
    check(48)
    layer.batch_repeat_interleave(2)
    check(49)
    twin = copy.deepcopy(layer)
    append(twin, 4, seed=303)
    check(50)
    layer = twin
    check(51)


def test_the_bounds_are_only_made_for_new_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = torch.aminmax

    def watched(keys: Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(keys.numel() // (B * H * D))
        return real(keys, *args, **kwargs)

    layer, reader = filled(40), StepReader(QuestRule(Budget(tokens=8), 4))
    monkeypatch.setattr(torch, "aminmax", watched)
    for step in range(6):
        reader.attend(layer, draw(B, H * G, 1, D, seed=step), None, 0.3)
        append(layer, 1, seed=step)
    assert sizes == [40, 1, 2, 3, 4, 1]
    assert reader.nbytes == 2 * B * H * (10 + 32) * D * 4


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=["quest", "hybrid"])
def test_padding_is_neither_chosen_nor_counted(rule: StepRule) -> None:
    """Row 1 has five pads: its step is that of the row alone."""
    n, pad = 30, 5
    layer, reader = filled(n), StepReader(rule)
    mask = torch.ones(B, 1, 1, n, dtype=torch.bool)
    mask[1, ..., :pad] = False
    query = draw(B, H * G, 1, D, seed=2)
    out = reader.attend(layer, query, mask, 0.3)
    for row, start in enumerate((0, pad)):
        alone = SparseLayer()
        keys, values = layer.dense()
        alone.update(keys[row : row + 1, :, start:].clone(), values[row : row + 1, :, start:].clone())
        own = StepReader(rule)
        wanted = own.attend(alone, query[row : row + 1], None, 0.3)
        torch.testing.assert_close(out[row : row + 1], wanted, atol=1e-6, rtol=0)
    made = reader.last_step()
    assert made is not None
    selection, stored = made
    assert stored.sum(-1).flatten().tolist() == [n, n, n - pad, n - pad]
    assert not bool(selection.attended[1, :, :, :pad].any())
    assert selection.attended_fraction(stored) == pytest.approx(reader.attended_fraction)


def test_the_record_of_a_step_names_what_was_read() -> None:
    layer, rule = ragged(), QuestRule(Budget(compression_ratio=0.7), 5)
    reader = StepReader(rule)
    query = draw(B, H * G, 1, D, seed=2)
    assert reader.attended_fraction == 1.0
    reader.attend(layer, query, None, 0.3)
    made = reader.last_step()
    assert made is not None
    selection, stored = made
    counts = layer.stored()
    assert torch.equal(stored.sum(-1)[:, 0], counts)
    wanted = [[rule.budget.n_kept(int(n)) for n in row] for row in counts]
    assert selection.attended.sum(-1)[:, 0].tolist() == wanted
    for segment, (keys, _) in enumerate(entries(layer)):
        chosen = quest_by_hand(query.reshape(B * H, G, D)[segment], keys, rule)
        assert selection.attended.view(B * H, -1)[segment].nonzero().flatten().tolist() == sorted(chosen)
    assert reader.attended_fraction == pytest.approx(sum(map(sum, wanted)) / int(counts.sum()))
    assert selection.attended_fraction(stored) == pytest.approx(reader.attended_fraction)


def test_a_query_of_zeros_and_16_bit_keys_give_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = SparseLayer()
        layer.update(draw(1, H, 20, D).to(dtype), draw(1, H, 20, D, seed=1).to(dtype))
        for rule in (RULES[0], RULES[2]):
            for query in (torch.zeros(1, H * G, 1, D), draw(1, H * G, 1, D)):
                out = StepReader(rule).attend(layer, query.to(dtype), None, None)
                assert out.dtype == dtype and bool(out.isfinite().all())


def test_copies_of_a_cache_are_read_as_it_is_read():
    model = prepare(tiny_model("llama"))
    tokens = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(3))
    cache = compress(model, tokens[:, :59], make_policy("quest", page_size=4), 8)
    twin = cache.fork([cache.selection(), cache.selection()])
    read = 0
    for (_, layer), (_, copied) in zip(cache.sparse_layers(), twin.sparse_layers(), strict=True):
        assert type(copied.reader) is type(layer.reader)
        if isinstance(layer.reader, StepReader):
            assert copied.reader is not layer.reader and copied.reader.rule == layer.reader.rule
            read += 1
    assert read
    whole = compress(model, tokens[:, :59], "full")
    wanted = (cache, twin, whole)
    alone, both, full = (
        model(tokens[:, 59:].expand(each.batch, -1), past_key_values=each).logits for each in wanted
    )
    torch.testing.assert_close(both, alone.expand(2, -1, -1))
    assert not torch.allclose(both[:1], full, atol=1e-3)
