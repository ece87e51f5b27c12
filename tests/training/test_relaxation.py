"""Soft evictions of learned relevance: weights, noise, budget, quantiles, and their course over training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparsekv
from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget
from sparsekv.relevance.predictor import RelevanceConfig, RelevancePredictor
from sparsekv.training.relaxation import Relaxation, RelaxedRelevance, ScoreQuantiles
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples

H, T, C = 2, 24, 8


def context(seed=0, layer=1):
    torch.manual_seed(4)
    module = nn.Module()
    module.relevance = RelevancePredictor(C, H, RelevanceConfig(bias=0.3))
    nn.init.normal_(module.relevance.score.weight, std=2.0)
    keys = torch.zeros(1, H, T, 4)
    return LayerContext(
        module=module,
        layer_idx=layer,
        hidden_states=torch.randn(1, T, C),
        keys=keys,
        values=keys,
        position_embeddings=(torch.zeros(1, T, 4), torch.zeros(1, T, 4)),
        cache_position=torch.arange(T),
        seed=seed,
    )


def test_weights_without_noise_are_a_sigmoid_of_the_scores():
    ctx = context()
    g = ctx.module.relevance(ctx.hidden_states)[0].T
    policy = RelaxedRelevance(n_sink=2, n_recent=3, threshold=0.4, temperature=0.5, noise=0.0)
    weights = policy.weigh_layer(ctx, Budget())[0].exp()
    torch.testing.assert_close(weights[:, 2:-3], torch.sigmoid((g - 0.4) / 0.5)[:, 2:-3])
    assert (weights[:, :2] == 1).all() and (weights[:, -3:] == 1).all()
    # the served decision is the same sigmoid's at one half
    kept = policy.keep_layer(ctx, Budget())[0]
    assert torch.equal(kept[:, 2:-3], weights[:, 2:-3] > 0.5) and 0 < kept[:, 2:-3].float().mean() < 1


def test_noise_is_logistic_and_belongs_to_row_and_layer():
    policy = RelaxedRelevance(n_sink=0, n_recent=0, noise=0.7)
    quiet = RelaxedRelevance(n_sink=0, n_recent=0, noise=0.0)

    def draw(seed, layer=1):
        ctx = context(seed, layer)
        noisy, plain = (one.weigh_layer(ctx, Budget()).exp() for one in (policy, quiet))
        return (torch.logit(noisy.double()) - torch.logit(plain.double())).flatten().detach() / 0.7

    assert torch.equal(draw(5), draw(5))
    assert not torch.allclose(draw(5), draw(6)) and not torch.allclose(draw(5, 1), draw(5, 2))
    every = torch.cat([draw(seed) for seed in range(150)])
    assert abs(every.mean()) < 4 * math.pi / 3**0.5 / len(every) ** 0.5
    assert every.std() == pytest.approx(math.pi / 3**0.5, rel=0.03), "the logistic distribution's"


def test_the_penalty_is_each_rows_own():
    """50 relu(mean soft weight - kept fraction)², weighted by the row's share of the step's labels."""
    soft_kept = {0: torch.tensor([0.9, 0.2, 0.6]), 2: torch.tensor([0.5, 0.4, 0.8])}
    shares = torch.tensor([0.25, 0.5, 0.125])
    long = torch.tensor([9000, 9000, 9000])
    penalty = Relaxation(budget_weight=50.0).penalty(soft_kept, 0.6, shares, long)
    wanted = 50 * (0.25 * (0.7 - 0.4) ** 2 + 0.5 * 0 + 0.125 * (0.7 - 0.4) ** 2)
    assert float(penalty) == pytest.approx(wanted)
    split = sum(
        Relaxation().penalty(
            {k: v[i : i + 1] for k, v in soft_kept.items()}, 0.6, shares[i : i + 1], long[:1]
        )
        for i in range(3)
    )
    assert float(split) == pytest.approx(wanted), "in any batching"
    assert Relaxation(threshold="quantile").penalty(soft_kept, 0.6, shares, long) is None
    assert Relaxation().penalty({}, 0.6, shares, long) is None
    short = torch.tensor([32, 10, 9000])  # 20 entries always stay: 0.625 of the first, all of the second
    wanted = 50 * (0.25 * (0.7 - 0.625) ** 2 + 0.125 * (0.7 - 0.4) ** 2)
    assert float(Relaxation().penalty(soft_kept, 0.6, shares, short)) == pytest.approx(wanted)


def test_a_row_without_a_context_has_no_penalty_and_spoils_no_gradient():
    kept = torch.tensor(0.9, requires_grad=True)
    soft_kept = {0: torch.stack([kept, torch.tensor(math.nan)])}
    penalty = Relaxation().penalty(soft_kept, 0.5, torch.tensor([0.5, 0.5]), torch.tensor([9000, 0]))
    penalty.backward()
    assert penalty.item() == pytest.approx(50 * 0.5 * 0.16)
    assert float(kept.grad) == pytest.approx(50 * 0.5 * 2 * 0.4)


def test_temperature_falls_and_the_threshold_is_the_quantiles():
    relaxation = Relaxation(temperature_start=1.0, temperature_end=0.4, n_sink=1, n_recent=2)
    temperatures = [relaxation.policy(p, 0.7).temperature for p in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert temperatures == pytest.approx([1.0, 1.0, 0.7, 0.4, 0.4])
    quantiles = ScoreQuantiles()
    quantiles.observe(torch.arange(101.0))
    assert relaxation.policy(0.5, 0.7, quantiles).threshold == 0.0
    soft = Relaxation(threshold="quantile").policy(0.5, 0.7, quantiles)
    kept = ((torch.arange(101.0) - soft.threshold) / soft.temperature).sigmoid().mean()
    assert float(kept) == pytest.approx(0.3, abs=1e-4), "soft steps keep what they should"
    assert Relaxation(threshold="quantile").policy(0.5, 0.0, quantiles).threshold == -math.inf
    assert (relaxation.policy(0.0).n_sink, relaxation.policy(0.0).n_recent) == (1, 2)
    assert relaxation.without_noise().policy(0.0).noise == 0.0


def test_quantiles_of_known_scores():
    scores = [torch.arange(0, 50.0), torch.arange(50.0, 101.0)]
    quantiles = ScoreQuantiles(momentum=0.75)
    assert quantiles.threshold(0.3, 0.01) == -math.inf, "nothing is evicted before anything was seen"
    found = ScoreQuantiles.of(scores)
    assert found.tolist() == list(range(101))
    quantiles.observe(found)
    hard = [quantiles.threshold(r, 0.01) for r in (0.3, 0.7, 0.99)]
    assert hard == pytest.approx([30, 70.5, 99.5], abs=0.5)
    quantiles.observe(found + 8)
    assert quantiles.threshold(0.3, 0.01) == pytest.approx(hard[0] + 0.25 * 8, abs=1e-3)
    again = ScoreQuantiles(momentum=0.75)
    again.load_state_dict(quantiles.state_dict())
    assert again.threshold(0.123, 0.5) == quantiles.threshold(0.123, 0.5)
    share = float((torch.cat(scores) < ScoreQuantiles.of(scores)[40]).float().mean())
    assert share == pytest.approx(0.4, abs=0.01)


def test_what_always_stays_has_its_place_in_the_quantiles():
    """80 scores and 20 entries that always stay: a budget of half keeps 30 of the former."""
    scores = [torch.arange(80.0), torch.full((20,), torch.inf)]
    quantiles = ScoreQuantiles()
    quantiles.observe(ScoreQuantiles.of(scores))
    assert 49 <= quantiles.threshold(0.5, 0.01) <= 51
    assert ScoreQuantiles.of([torch.full((3,), torch.inf)]) is None, "nothing to be heard"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": "quantiles"}, "did you mean 'quantile'"),
        ({"temperature_end": 0.0}, "temperature_end must be above 0"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"budget_weight": float("nan")}, "budget_weight must be at least 0"),
    ],
)
def test_mistakes_are_told(given, message):
    with pytest.raises(ConfigError, match=message):
        Relaxation(**given)


def test_the_trainer_hardens_soft_thresholds_over_the_run(tmp_path):
    from transformers import TrainingArguments

    from sparsekv.training import SparseKVTrainer

    trainer = SparseKVTrainer(
        tiny_model("llama", num_hidden_layers=1),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        press=sparsekv.SoftThresholdPress(temperature=2.0, compression_ratio=0.5),
        train_dataset=samples(2),
        tokenizer=toy_tokenizer(),
    )
    found = [trainer.policy_at(step, step / 10, 0.5).temperature for step in (0, 5, 10)]
    assert found == pytest.approx([2.0, 1.1, 0.2])
    assert trainer.press.temperature == 2.0
