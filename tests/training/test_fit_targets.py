"""Targets against whole attention matrices of eager attention: grouped heads, several futures, model families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.training.data_layout import Layout
from sparsekv.training.fit_futures import Observation, observation_of, reconstructions
from sparsekv.training.fit_targets import log_targets, observe, scored_slice
from toy import FAMILIES, tiny_model

CONTEXT = [(7 * i) % 250 + 3 for i in range(30)]
FUTURES = [[(11 * i) % 250 + 3 for i in range(9)], [(5 * i) % 250 + 3 for i in range(13)]]


def eager_maxima(
    model: Any, context: list[int], futures: list[list[int]]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (what each context entry gets at most [H, T], what entered the layer [T, C]), the plain way.

    Every future is read in one forward together with its context.
    """
    model.set_attn_implementation("eager")
    n, heads = len(context), architecture.num_kv_heads(model)
    most: dict[int, torch.Tensor] = {}
    entering: dict[int, torch.Tensor] = {}
    modules = architecture.attention_modules(model)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: entering.__setitem__(
                int(module.layer_idx), kwargs["hidden_states"][0, :n]
            ),
            with_kwargs=True,
        )
        for module in modules
    ]
    for future in futures:
        with torch.no_grad():
            attentions = model(torch.tensor([context + future]), output_attentions=True).attentions
        for layer, weights in enumerate(attentions):  # [1, Hq, n + Q, n + Q]
            later = weights[0, :, n:, :n]
            grouped = later.reshape(heads, -1, later.shape[1], n)
            found = grouped.amax(dim=(1, 2))
            most[layer] = torch.maximum(most[layer], found) if layer in most else found
    for handle in handles:
        handle.remove()
    return {layer: (most[layer], entering[layer]) for layer in most}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_maxima_of_eager_attention(family: str) -> None:
    expected = eager_maxima(tiny_model(family), CONTEXT, FUTURES)
    model = tiny_model(family)
    found = observe(model, Observation(CONTEXT, FUTURES, 0), block_size=4)
    assert list(found) == architecture.compressible_layers(model)
    for layer, entries in found.items():
        most, entering = expected[layer]
        assert entries.received.shape == (1, 2, 30)
        torch.testing.assert_close(entries.received[0], most, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(entries.hidden[0], entering, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(entries.received[0, 0], entries.received[0, 1], atol=1e-3)


def test_heads_without_groups_and_one_group_for_all() -> None:
    for kv_heads in (1, 4):
        expected = eager_maxima(tiny_model(num_key_value_heads=kv_heads), CONTEXT, FUTURES)
        found = observe(tiny_model(num_key_value_heads=kv_heads), Observation(CONTEXT, FUTURES, 0))
        for layer, entries in found.items():
            torch.testing.assert_close(entries.received[0], expected[layer][0], atol=1e-5, rtol=1e-4)


def test_the_size_of_a_block_changes_nothing() -> None:
    model = tiny_model()
    whole = observe(model, Observation(CONTEXT, FUTURES, 0), block_size=512)
    for size in (1, 5):
        blocks = observe(model, Observation(CONTEXT, FUTURES, 0), block_size=size)
        for layer, entries in whole.items():
            torch.testing.assert_close(blocks[layer].received, entries.received)


def test_futures_do_not_see_each_other() -> None:
    """The joint target is the larger of the futures' own, and their order does not matter."""
    model = tiny_model("gemma3")  # its middle layer's window has moved on when the second future comes
    alone = [observe(model, Observation(CONTEXT, [future], 0)) for future in FUTURES]
    both = observe(model, Observation(CONTEXT, FUTURES, 0))
    swapped = observe(model, Observation(CONTEXT, FUTURES[::-1], 0))
    for layer, entries in both.items():
        larger = torch.maximum(alone[0][layer].received, alone[1][layer].received)
        torch.testing.assert_close(entries.received, larger)
        torch.testing.assert_close(entries.received, swapped[layer].received)
        assert bool((alone[0][layer].received > alone[1][layer].received).any())
        assert bool((alone[1][layer].received > alone[0][layer].received).any())


def test_no_matrix_of_queries_by_entries_outlives_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekv.training import fit_targets

    sizes: list[tuple[int, ...]] = []
    plain = fit_targets.attention_weights

    def watched(*args: Any) -> torch.Tensor:
        weights = plain(*args)
        sizes.append(tuple(weights.shape))
        return weights

    monkeypatch.setattr(fit_targets, "attention_weights", watched)
    observe(tiny_model(), Observation(CONTEXT, FUTURES, 0), block_size=5)
    assert {size[3] for size in sizes} == {
        5,
        4,
        3,
    }  # 9 = 5 + 4 and 13 = 5 + 5 + 3; never a context's 30 queries
    assert len(sizes) == 3 * (2 + 3)


def test_log_targets_and_the_columns_that_are_fitted() -> None:
    entries = observe(tiny_model(), Observation(CONTEXT, FUTURES, 0))
    columns = scored_slice(30, 4, 16)
    assert columns == slice(4, 14)
    targets = log_targets(entries, columns, 1e-6)
    assert targets.shape == (3, 2, 10)
    torch.testing.assert_close(targets[1].exp(), entries[1].received[0, :, 4:14])
    assert float(log_targets(entries, columns, 0.5).min()) == pytest.approx(-0.6931, abs=1e-4)
    assert scored_slice(12, 4, 16) == slice(4, 4) and scored_slice(3, 4, 16) == slice(3, 3)


def test_what_is_missing_is_said() -> None:
    model = tiny_model()
    for context, futures in ((CONTEXT, []), (CONTEXT, [[]]), ([], FUTURES)):
        with pytest.raises(ConfigError, match="at least one future"):
            observe(model, Observation(context, futures, 0))


# ---- from samples to futures -------------------------------------------------------------------------------------


@pytest.fixture
def layout(toy_tokenizer: Any) -> Layout:
    return Layout(toy_tokenizer)


def sample(n: int, boundary: int) -> dict[str, Any]:
    return {"input_ids": [3 + i % 250 for i in range(n)], "boundary": boundary, "sample_index": 5}


def test_a_continuation_is_what_follows_the_boundary(layout: Layout) -> None:
    seen = observation_of(sample(50, 40), layout, ["continuation"], 100, seed=0, epoch=0)
    assert (seen.context, seen.futures) == (list(range(3, 43)), [list(range(43, 53))])


def test_plain_text_is_cut_by_the_samples_own_seed(layout: Layout) -> None:
    def cut(seed: int, epoch: int) -> int:
        seen = observation_of(sample(200, 0), layout, ["continuation"], 100, seed=seed, epoch=epoch)
        assert seen.context + seen.futures[0] == sample(200, 0)["input_ids"]
        return len(seen.context)

    assert cut(0, 0) == cut(0, 0)
    cuts = {cut(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(cuts) > 8 and min(cuts) >= 50 and max(cuts) <= 150
    alone = observation_of(sample(200, 0), layout, ["reconstruction"], 300, seed=0, epoch=0)
    assert len(alone.context) == 200, "nothing need be left over to reconstruct a text"


def test_a_context_is_reconstructed_in_pieces_without_the_templates_start(layout: Layout) -> None:
    head, end = layout.ids(layout.head), layout.ids(layout.suffix)
    body = [100 + i for i in range(25)]
    futures = reconstructions(head + body, layout, 10)
    assert [
        future[-len(piece) :]
        for future, piece in zip(futures, (body[:10], body[10:20], body[20:]), strict=True)
    ] == [
        body[:10],
        body[10:20],
        body[20:],
    ]
    for number, future in enumerate(futures):
        before = body[10 * number - 8 : 10 * number] if number else []
        asked = future[: len(future) - len(body[10 * number : 10 * number + 10])]
        assert asked[-len(end) :] == end
        assert asked[len(asked) - len(end) - len(before) : len(asked) - len(end)] == before
    assert reconstructions(body, layout, 100)[0][-25:] == body, "a text without a template is repeated whole"


def test_a_reconstruction_looks_at_what_it_repeats(toy_tokenizer: Any) -> None:
    """Both kinds together: one future for what follows, one per piece."""
    both = observation_of(
        sample(50, 40), Layout(toy_tokenizer), ["continuation", "reconstruction"], 16, seed=0, epoch=0
    )
    assert len(both.futures) == 1 + 3
    nothing = sample(40, 40)
    assert observation_of(nothing, Layout(toy_tokenizer), ["continuation"], 16, seed=0, epoch=0) is None
