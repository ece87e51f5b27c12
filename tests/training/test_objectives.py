"""Losses against hand-written cross-entropy and KL, and what objectives make of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import log_softmax

from sparsekv.errors import ConfigError
from sparsekv.training.linear_loss import Head
from sparsekv.training.objective import REPEATED, Output
from sparsekv.training.objectives import (
    OBJECTIVES,
    EITObjective,
    MixedObjective,
    ReconstructionObjective,
    SparseLMObjective,
    StandardLMObjective,
    make_objective,
)

B, T, C, V = 2, 9, 6, 11
ITEMS = 20.0


def output(seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(B, T, C, generator=generator).requires_grad_()
    return Output(states, Head(torch.randn(V, C, generator=generator)))


def batch():
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :2] = -100
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def ready(boundaries, seeds):
    return batch() | {"boundary": torch.tensor(boundaries), "seeds": torch.tensor(seeds)}


def by_hand(student, teacher, batch, temperature=1.0):
    """(CE, KL) fp32 [B, T] at the label's column; 0 where there is no label."""
    ce, kl = torch.zeros(B, T), torch.zeros(B, T)
    for row in range(B):
        for column in range(1, T):
            if batch["labels"][row, column] == -100:
                continue
            logits = student.head.weight @ student.states[row, column - 1]
            ce[row, column] = -log_softmax(logits, -1)[batch["labels"][row, column]]
            if teacher is not None:
                theirs = log_softmax(teacher.head.weight @ teacher.states[row, column - 1] / temperature, -1)
                ours = log_softmax(logits / temperature, -1)
                kl[row, column] = (theirs.exp() * (theirs - ours)).sum() * temperature**2
    return ce, kl


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_eit_is_cross_entropy_plus_kl_per_label(temperature):
    student, teacher, made = output(0), output(1), batch()
    ce, kl = by_hand(student, teacher, made, temperature)
    objective = EITObjective(lambda_kl=0.7, temperature=temperature, lambda_ce=0.3)
    losses = objective(student, teacher, made, None, ITEMS)
    wanted = (0.3 * ce.sum() + 0.7 * kl.sum()) / ITEMS
    torch.testing.assert_close(losses.total, wanted)
    torch.testing.assert_close(losses.parts["ce"], ce.sum().detach())
    torch.testing.assert_close(losses.parts["kl"], kl.sum().detach())
    assert losses.counts == {"ce": 5 + 7, "kl": 12}
    (grad,) = torch.autograd.grad(losses.total, student.states)
    (wanted_grad,) = torch.autograd.grad(wanted, student.states)
    torch.testing.assert_close(grad, wanted_grad)
    assert grad[0, :3].abs().max() == 0, "what predicts no label has no gradient"


def test_standard_lm_is_the_models_own_loss():
    student, made = output(0), batch()
    losses = StandardLMObjective()(student, None, made, None, ITEMS)
    logits = student.states @ student.head.weight.T
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), made["labels"][:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(losses.total, wanted / ITEMS)
    with pytest.raises(ConfigError, match="needs a teacher"):
        EITObjective()(student, None, made, None, ITEMS)


def test_a_teacher_that_is_the_student_leaves_cross_entropy_alone():
    student, made = output(0), batch()
    alone = StandardLMObjective()(student, None, made, None, ITEMS)
    both = EITObjective(lambda_kl=3.0)(student, student, made, None, ITEMS)
    torch.testing.assert_close(both.total, alone.total)
    assert abs(float(both.parts["kl"])) < 1e-5


def test_context_tokens_are_held_at_the_teacher():
    """Drawn tokens before the boundary, none with a label, none after padding; their mean KL times the labels."""
    student, teacher = output(0), output(1)
    made = batch() | {"boundary": torch.tensor([6, 7]), "seeds": torch.tensor([5, 6])}
    made["labels"][:, :6] = -100
    unlabelled = made | {"labels": made["input_ids"]}
    _, kl_everywhere = by_hand(student, teacher, unlabelled)
    ce, kl = by_hand(student, teacher, made)
    plain = EITObjective(lambda_kl=0.7)(student, teacher, made, None, ITEMS)
    # more tokens than there are: row 0 has columns 1..5, row 1 (two of padding) 3..5; column 6 has a label
    every = EITObjective(lambda_kl=0.7, lambda_context=2.0, context_tokens=50)
    losses = every(student, teacher, made, None, ITEMS)
    context = 3 * kl_everywhere[0, 1:6].mean() + 3 * kl_everywhere[1, 3:6].mean()
    wanted = (ce.sum() + 0.7 * kl.sum() + 2.0 * context) / ITEMS
    torch.testing.assert_close(losses.total, wanted)
    assert float(losses.total.detach()) > float(plain.total.detach()) + 0.1
    assert losses.counts == {"ce": 6, "kl": 6, "kl_context": 8}
    torch.testing.assert_close(losses.parts["kl"], plain.parts["kl"])
    (grad,) = torch.autograd.grad(losses.total, student.states)
    (wanted_grad,) = torch.autograd.grad(wanted, student.states)
    torch.testing.assert_close(grad, wanted_grad)

    drawn = EITObjective(lambda_context=1.0, context_tokens=2)
    weights = drawn.terms(made).kl_context
    assert (weights > 0).sum(1).tolist() == [2, 2]
    torch.testing.assert_close(weights.sum(1), torch.tensor([3.0, 3.0]))
    assert weights[:, 6:].max() == 0 and weights[0, 0] == 0 and weights[1, :3].max() == 0
    again = drawn.terms(made | {"seeds": torch.tensor([5, 7])}).kl_context
    torch.testing.assert_close(again[0], weights[0])
    mixed = MixedObjective(objectives=((drawn, 0.5),))
    torch.testing.assert_close(mixed.terms(made).kl_context, 0.5 * weights)


def test_reconstruction_appends_a_span_of_the_context():
    objective = ReconstructionObjective(weight=0.5, span=4, cue=1)
    made = objective.prepare(ready([6, 7], [11, 12]))
    assert made["input_ids"].shape == made["labels"].shape == made["attention_mask"].shape == (B, T + 4)
    assert made["attention_mask"][:, T:].all()
    for row, (start, boundary) in enumerate([(0, 6), (2, 7)]):
        ids, tail = made["input_ids"][row], made["input_ids"][row, T:]
        places = [i for i in range(start, boundary - 4 + 1) if torch.equal(ids[i : i + 4], tail)]
        assert places, "the span lies in the row's own context"
        assert made["labels"][row, T:].tolist() == [-100, *tail[1:].tolist()]
        assert made[REPEATED][row].tolist() == [False] * (T + 1) + [True] * 3
    again = objective.prepare(ready([6, 7], [11, 12]))
    assert torch.equal(again["input_ids"], made["input_ids"])
    spans = {
        tuple(objective.prepare(ready([6, 7], [seed, seed]))["input_ids"][0, T:].tolist())
        for seed in range(20)
    }
    assert len(spans) == 3, "every place is drawn"
    short = objective.prepare(ready([3, 5], [11, 12]))
    assert not short[REPEATED].any() and (short["labels"][:, T:] == -100).all()

    generator = torch.Generator().manual_seed(9)
    states = torch.randn(B, T + 4, C, generator=generator)
    student = Output(states, Head(torch.randn(V, C, generator=generator)))
    losses = objective(student, None, made, None, ITEMS)
    logp = log_softmax(states @ student.head.weight.T, -1)[:, :-1]
    chosen = made["labels"][:, 1:].clamp_min(0)
    ce = -logp.gather(-1, chosen[..., None])[..., 0] * (made["labels"][:, 1:] != -100)
    repeated = made[REPEATED][:, 1:]
    torch.testing.assert_close(losses.total, (ce[~repeated].sum() + 0.5 * ce[repeated].sum()) / ITEMS)
    assert losses.counts == {"ce": 12, "reconstruction": 6}
    torch.testing.assert_close(losses.parts["reconstruction"], ce[repeated].sum())


def test_the_span_that_loses_most_of_what_is_scored_is_repeated():
    """Of a span's four tokens the first is its cue: what is lost of it does not count."""
    objective = ReconstructionObjective(span=4, cue=1)
    evicted = torch.zeros(B, T)
    evicted[0, 3:5] = 1.0  # spans at 1 and 2 score both, that at 0 scores one
    evicted[1, 2] = 1.0  # the cue of the only span that sees it, so all lose nothing
    places = set()
    for seed in range(20):
        made = objective.prepare(ready([6, 7], [seed, seed]), evicted)
        ids = made["input_ids"]
        places.add(next(i for i in range(3) if torch.equal(ids[0, i : i + 4], ids[0, T:])))
    assert places == {1, 2}
    spans = {
        tuple(objective.prepare(ready([6, 7], [s, s]), evicted)["input_ids"][1, T:].tolist())
        for s in range(20)
    }
    assert len(spans) == 2, "nothing is lost: all are drawn"


def test_mixed_is_the_weighted_sum():
    student, teacher, made = output(0), output(1), batch()
    ce, kl = by_hand(student, teacher, made)
    mixed = MixedObjective([(StandardLMObjective(), 2.0), (EITObjective(lambda_kl=0.5), 3.0)])
    losses = mixed(student, teacher, made, None, ITEMS)
    torch.testing.assert_close(losses.total, ((2.0 + 3.0) * ce.sum() + 3.0 * 0.5 * kl.sum()) / ITEMS)
    whole = MixedObjective(
        [(StandardLMObjective(), 2.0), (ReconstructionObjective(weight=0.5, span=4, cue=1), 4.0)]
    )
    prepared = whole.prepare(ready([6, 7], [11, 12]))
    terms = whole.terms(prepared)
    assert terms.ce[prepared[REPEATED]].unique().tolist() == [4.0 * 0.5], (
        "the standard part leaves them alone"
    )
    assert terms.ce[~prepared[REPEATED]].unique().tolist() == [6.0]
    assert not whole.needs_teacher and mixed.needs_teacher


def test_a_mixture_may_be_part_of_a_mixture():
    """Only a part that repeats something counts as a reconstruction, and its tokens count for it alone."""
    eit, again = EITObjective(lambda_kl=0.5), ReconstructionObjective(weight=3.0, span=4, cue=1)
    flat = MixedObjective([(eit, 0.6), (again, 2.0)])
    batch = {
        "input_ids": torch.arange(24).reshape(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "labels": torch.arange(24).reshape(2, 12),
    }
    batch = flat.prepare(batch | {"boundary": torch.tensor([8, 9]), "seeds": torch.tensor([1, 2])})
    wanted = flat.terms(batch)
    for parts in (
        [(MixedObjective([(eit, 0.3)]), 2.0), (again, 2.0)],
        [(eit, 0.6), (MixedObjective([(again, 4.0)]), 0.5)],
        [(MixedObjective([(eit, 0.3), (again, 1.0)]), 2.0)],
    ):
        nested = MixedObjective(parts)
        found = nested.terms(batch)
        assert nested.changes_batch and nested.needs_teacher
        assert torch.allclose(found.ce, wanted.ce) and torch.allclose(found.kl, wanted.kl)
    assert not MixedObjective([(eit, 1.0)]).changes_batch
    with pytest.raises(ConfigError, match="only one of its parts may be a reconstruction"):
        MixedObjective([(flat, 1.0), (again, 1.0)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_objective("eti"), "unknown objective 'eti' .did you mean 'eit'"),
        (lambda: make_objective("eit", lamda_kl=1), "unknown argument of objective eit 'lamda_kl'"),
        (lambda: make_objective("eit", needs_teacher=False), "unknown argument of objective eit"),
        (lambda: EITObjective(lambda_kl=-1.0), "lambda_kl must be a number >= 0, got -1.0"),
        (lambda: EITObjective(temperature=0.0), "temperature must be above 0"),
        (lambda: SparseLMObjective(sparsity_weight=True), "sparsity_weight must be a number"),
        (lambda: SparseLMObjective(sparsity_kind="l3"), "unknown sparsity_kind 'l3'"),
        (lambda: ReconstructionObjective(span=4, cue=4), "1 <= cue < span"),
        (lambda: ReconstructionObjective(weight=float("nan")), "weight must be a number >= 0"),
        (lambda: MixedObjective([]), "at least one"),
        (lambda: MixedObjective([(EITObjective(), -1.0)]), "weight of eit"),
        (
            lambda: MixedObjective([(EITObjective(temperature=2.0), 1.0), (EITObjective(), 1.0)]),
            "agree on temperature",
        ),
        (lambda: MixedObjective([(ReconstructionObjective(), 1.0)] * 2), "only one of its parts"),
        (
            lambda: make_objective("mixed", objectives=[{"name": "eit", "lamda_kl": 1}]),
            "argument of objective eit",
        ),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_objective_can_be_made_by_name():
    assert set(OBJECTIVES.names()) == {"standard_lm", "sparse_lm", "eit", "reconstruction", "mixed"}
    for name in OBJECTIVES.names():
        parts = {"objectives": [{"name": "eit", "weight": 0.5}]} if name == "mixed" else {}
        made = make_objective(name, **parts)
        assert made.name == name
    assert made.objectives == ((EITObjective(), 0.5),)
