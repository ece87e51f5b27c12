"""Relevance predictors: their arithmetic, where they start, and that they belong to the model."""

from __future__ import annotations

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.policies.learned_scores import finite_scores
from sparsekv.relevance import (
    RelevanceConfig,
    RelevancePredictor,
    attach_relevance,
    detach_relevance,
    has_relevance,
    relevance_modules,
)
from sparsekv.relevance.predictor import config_of, relevance_of
from toy import tiny_model

C, H = 12, 3


def test_a_linear_predictor_by_hand():
    torch.manual_seed(0)
    predictor = RelevancePredictor(C, H, RelevanceConfig(bias=0.25))
    states = torch.randn(2, 5, C)
    normed = states / states.square().mean(-1, keepdim=True).sqrt()
    wanted = normed @ predictor.score.weight.T + 0.25
    torch.testing.assert_close(predictor(states), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictor(1000 * states), predictor(states), rtol=1e-4, atol=1e-5)
    assert predictor(states).shape == (2, 5, H)


def test_a_two_layer_predictor_by_hand():
    torch.manual_seed(0)
    predictor = RelevancePredictor(C, H, RelevanceConfig(width=7, bias=-1.0))
    states = torch.randn(1, 4, C)
    normed = states / states.square().mean(-1, keepdim=True).sqrt()
    inner = torch.nn.functional.silu(normed @ predictor.hidden.weight.T + predictor.hidden.bias)
    wanted = inner @ predictor.score.weight.T - 1.0
    torch.testing.assert_close(predictor(states), wanted, rtol=1e-5, atol=1e-5)


def test_arithmetic_is_fp32_whatever_the_model_computes_in():
    predictor = RelevancePredictor(C, H)
    states = torch.randn(1, 4, C).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predictor(states)
    assert found.dtype == torch.float32 and torch.equal(found, predictor(states.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_states_are_scored_in_parts_as_in_one(n, dtype):
    predictor = RelevancePredictor(576, 3)
    states = torch.randn(2, n, 576).to(dtype).requires_grad_()
    found = predictor.hidden_part(states)
    wanted = predictor.score(predictor.score_inputs(states))
    assert found.shape == (2, n, 3)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(found)
    of_parts, of_one = (torch.autograd.grad((g * weight).sum(), states)[0] for g in (found, wanted))
    torch.testing.assert_close(of_parts, of_one, atol=1e-6, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_training_starts_with_nearly_everything_kept():
    predictor = RelevancePredictor(512, H)
    torch.manual_seed(1)
    r = torch.sigmoid(predictor(torch.randn(1, 300, 512))).detach()
    assert r.mean() == pytest.approx(0.9526, abs=0.003) and r.min() > 0.9
    assert r.std() > 1e-3, "not all the same"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_compressible_layer_has_one_and_no_random_state_is_touched(family):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = attach_relevance(tiny_model(family), RelevanceConfig(width=4), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    layers = [0, 2] if family == "gemma3" else [0, 1, 2]  # Gemma-3's middle layer has a sliding window
    assert list(relevance_modules(model)) == layers
    again = attach_relevance(tiny_model(family), RelevanceConfig(width=4), seed=3)
    other = attach_relevance(tiny_model(family), RelevanceConfig(width=4), seed=4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        if key.endswith("relevance.score.weight"):
            assert not torch.equal(value, other.state_dict()[key])
    names = {name for name, _ in model.named_parameters() if "relevance" in name}
    assert len(names) == 4 * len(layers) and "model.layers.0.self_attn.relevance.score.weight" in names
    assert config_of(model) == {"width": 4, "bias": 3.0, "features": ("hidden",)}
    layer_0 = relevance_modules(model)[0].relevance
    attach_relevance(model)
    assert relevance_modules(model)[0].relevance is not layer_0, "a fresh one replaces it"
    assert not has_relevance(detach_relevance(model))
    assert not any("relevance" in name for name, _ in model.named_parameters())


def test_mistakes_are_told():
    for width in (-1, 2.5, True):
        with pytest.raises(ConfigError, match="width must be a whole number >= 0"):
            RelevanceConfig(width=width)
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="has no relevance predictors"):
        relevance_of(model.model.layers[0].self_attn, torch.zeros(1, 2, 64))
    with pytest.raises(ConfigError, match="has no relevance predictors"):
        config_of(model)


def test_scores_that_only_add_up_to_infinity_are_scores():
    large = torch.full((1, 1, 4), 3e38)
    assert torch.equal(finite_scores(large, "relevance", 0), large)
    with pytest.raises(ConfigError, match="1 of 4 relevance scores in layer 7 are NaN or infinite"):
        finite_scores(large.index_fill(-1, torch.tensor([2]), torch.nan), "relevance", 7)
