"""Dropping changes training: losses and gradients under every press against a reference that gathers what is left."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import sparsekv
from sparsekv import architecture, prepare
from sparsekv.observers import AttentionSparsity
from sparsekv.policies.budget import Budget
from sparsekv.relevance.predictor import attach_relevance
from sparsekv.training.collate import Collator
from sparsekv.training.dropping import DroppingConfig, make_plan, resolve_boundaries, row_seeds
from sparsekv.training.objective import Output
from sparsekv.training.objectives import SparseLMObjective, StandardLMObjective
from sparsekv.training.relaxation import Relaxation
from sparsekv.training.setup import policy_of
from sparsekv.training.student import forward_inputs, head_of, student_output
from toy import tiny_model, toy_tokenizer
from training.reference_attention import gathering

PRESSES = {
    "block_dropout": lambda: sparsekv.BlockDropoutPress(block_size=4, n_sink=1, n_recent=3),
    "variable_block_dropout": lambda: sparsekv.VariableBlockDropoutPress(
        min_block=2, max_block=6, n_sink=1, n_recent=3
    ),
    "sentence_dropout": lambda: sparsekv.SentenceDropoutPress(
        n_sink=1, n_recent=3, tokenizer=toy_tokenizer()
    ),
    "adaptive_block_dropout": lambda: sparsekv.AdaptiveBlockDropoutPress(block_size=4, n_sink=1, n_recent=3),
    "soft_threshold": lambda: sparsekv.SoftThresholdPress(n_sink=1, n_recent=3),
    "eviction_aug": lambda: sparsekv.EvictionAugPress(presses=["knorm", "h2o"]),
    "random": lambda: sparsekv.RandomPositionsPress(),
}
TEXT = ("Call me. Long ago. Yes.", "One. Two three! Four, five.")


def batch_of(texts=TEXT):
    tokenizer = toy_tokenizer()
    samples = [
        {"input_ids": (ids := tokenizer(text)["input_ids"]), "labels": ids, "boundary": 0, "sample_index": i}
        for i, text in enumerate(texts)
    ]
    batch = Collator(tokenizer)(samples)
    seeds = row_seeds(0, 0, batch.pop("sample_index"))
    boundaries = resolve_boundaries(batch.pop("boundary"), batch["attention_mask"], seeds, "end")
    return batch, boundaries, seeds


def model_for(family):
    return prepare(tiny_model(family, num_hidden_layers=2))


def policy_for(name, model):
    if name == "relevance":
        attach_relevance(model)
        for index, module in enumerate(architecture.attention_modules(model)):
            torch.nn.init.normal_(module.relevance.score.weight, std=1.0)
            torch.nn.init.constant_(module.relevance.score.bias, 0.1 * index)
        return Relaxation(n_sink=1, n_recent=3).policy(0.5)
    policy = policy_of(PRESSES[name]())
    draw = getattr(policy, "draw", None)
    return draw(1) if callable(draw) else policy


def losses_of(model, policy, ratio, how, texts=TEXT):
    """(loss, gradients, plan) of one forward under the policy."""
    batch, boundaries, seeds = batch_of(texts)
    plan = make_plan(
        model,
        batch,
        policy,
        Budget(compression_ratio=ratio),
        how,
        boundaries=boundaries,
        seeds=seeds,
        tokenizer=toy_tokenizer(),
    )
    model.zero_grad()
    output = student_output(model, model, batch, plan)
    loss = StandardLMObjective()(output, None, batch, plan, 10.0).total
    loss.backward()
    return loss.detach(), gradients(model), plan


def gradients(model):
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None])


def gradients_of_the_model(model):
    """Without those of predictors."""
    named = [(name, p) for name, p in model.named_parameters() if ".relevance." not in name]
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])


def reference(model, plan, weights, texts=TEXT):
    batch, *_ = batch_of(texts)
    layers = architecture.compressible_layers(model)
    evicted = {i: (plan.selected[i], weights.get(i)) for i in layers}
    model.zero_grad()
    with gathering(model):
        states = architecture.text_model(model)(**forward_inputs(batch), evicted=evicted).last_hidden_state
        loss = StandardLMObjective()(Output(states, head_of(model)), None, batch, None, 10.0).total
        loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", ["prefill", "streaming"])
@pytest.mark.parametrize("name", [*PRESSES, "relevance"])
def test_loss_and_gradients_are_those_of_what_is_left(name, way, family, monkeypatch):
    model = model_for(family)
    policy = policy_for(name, model)
    how = DroppingConfig(way=way, window=5)
    weights = {}
    if getattr(policy, "soft", False):  # record the log weights, with their graph, for the reference
        weigh = type(policy).weigh_layer

        def recording(self, ctx, budget):
            made = weigh(self, ctx, budget)
            rows = weights.setdefault(ctx.layer_idx, [])
            rows.append(made.detach()[0])
            return made.detach()

        monkeypatch.setattr(type(policy), "weigh_layer", recording)
    loss, grad, plan = losses_of(model, policy, 0.5, how)
    plain, plain_grad, _ = losses_of(model, policy_of(sparsekv.FullPress()), 0.0, how)
    assert abs(loss - plain) > 1e-4 * abs(plain), "dropping must change the loss"
    if len(grad) == len(plain_grad):
        assert (grad - plain_grad).norm() > 1e-3 * plain_grad.norm()
    padded = {}
    for layer, rows in weights.items():
        total = plan.selected[layer].shape[-1]
        spans = [plan.span(row, total) for row in range(len(rows[:2]))]
        padded[layer] = torch.stack(
            [
                torch.nn.functional.pad(rows[row], (start, total - end))
                for row, (start, end) in enumerate(spans)
            ]
        )
    wanted, wanted_grad = reference(model, plan, padded)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert (grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm()


@pytest.mark.parametrize("name", [*PRESSES, "relevance"])
def test_ratio_0_is_plain_training(name):
    """Soft weights of 1 hide nothing either: a ratio of 0, and for relaxed relevance a threshold under every score."""
    model = model_for("llama")
    policy = policy_for(name, model)
    if name == "relevance":
        policy = replace(policy, threshold=-math.inf)
    loss, _, plan = losses_of(model, policy, 0.0, DroppingConfig())
    grad = gradients_of_the_model(model)
    is_soft = name in ("soft_threshold", "relevance")
    assert bool(plan.soft_kept) == is_soft, "the soft route must run, or it is not tested"
    batch, *_ = batch_of()
    model.zero_grad()
    labels = batch["labels"]
    logits = model(**forward_inputs(batch)).logits
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
    )
    (plain / 10).backward()
    within = 1e-5 if is_soft else 1e-6
    torch.testing.assert_close(loss, (plain / 10).detach(), rtol=within, atol=within)
    assert (grad - gradients_of_the_model(model)).norm() <= within * grad.norm()


def test_gates_get_gradients_and_their_noise_is_the_rows_own():
    model = model_for("llama")
    policy = policy_for("relevance", model)
    losses_of(model, policy, 0.5, DroppingConfig())
    for module in architecture.attention_modules(model):
        assert module.relevance.score.weight.grad.abs().sum() > 0
    together, _, plan = losses_of(model, policy, 0.5, DroppingConfig())
    again, _, _ = losses_of(model, policy, 0.5, DroppingConfig())
    assert together == again, "the same seeds draw the same noise"
    assert set(plan.soft_kept) == set(architecture.compressible_layers(model))


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_sampled_sparsity_is_unbiased(kind):
    """The mean over many draws of 4 queries against every query."""
    model = model_for("llama")
    batch, boundaries, seeds = batch_of()
    values = []
    for n_queries, n_seeds in ((None, 1), (4, 300)):
        observers = tuple(
            AttentionSparsity(kind=kind, n_queries=n_queries, seeds=(seed, seed + 7), name=f"s{seed}")
            for seed in range(n_seeds)
        )
        plan = make_plan(
            model,
            batch,
            policy_of(sparsekv.RandomPositionsPress()),
            Budget(compression_ratio=0.5),
            DroppingConfig(),
            boundaries=boundaries,
            seeds=seeds,
            observers=observers,
        )
        with torch.no_grad():
            student_output(model, model, batch, plan)
        draws = torch.tensor([[float(v) for v in layer.values()] for layer in plan.collected.values()])
        values.append((draws.mean(0), draws.std(0) / n_seeds**0.5 if n_seeds > 1 else 0.0))
    (exact, _), (estimate, error) = values
    assert ((estimate - exact).abs() < 4 * error).all()
    assert (error < 0.05 * exact).all(), "the test must be sharp enough to see a bias"


def test_a_sparsity_loss_reaches_queries_and_keys():
    model = model_for("llama")
    batch, boundaries, seeds = batch_of()
    plan = make_plan(
        model,
        batch,
        policy_of(sparsekv.RandomPositionsPress()),
        Budget(compression_ratio=0.5),
        DroppingConfig(),
        boundaries=boundaries,
        seeds=seeds,
        observers=(AttentionSparsity(n_queries=None),),
    )
    output = student_output(model, model, batch, plan)
    plain = StandardLMObjective()(output, None, batch, plan, 10.0).total
    both = SparseLMObjective(sparsity_weight=2.0)(output, None, batch, plan, 10.0)
    share = float((batch["labels"][:, 1:] != -100).sum()) / 10
    mean = torch.stack(list(plan.collected["sparsity"].values())).mean()
    torch.testing.assert_close(both.total, plain + 2.0 * share * mean)
    mean.backward()
    grads = [m.q_proj.weight.grad.abs().sum() + m.k_proj.weight.grad.abs().sum() for m in layers_of(model)]
    assert all(g > 0 for g in grads) and torch.isfinite(torch.stack(grads)).all()


def layers_of(model):
    return architecture.attention_modules(model)
