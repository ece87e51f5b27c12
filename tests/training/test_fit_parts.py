"""The parts of a fit: steps, least squares, losses and rank correlations against references and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from sparsekv.models import load_model
from sparsekv.relevance.features import GROUPS
from sparsekv.relevance.predictor import NAME, RelevanceConfig, attach_relevance, relevance_modules
from sparsekv.training.config_parts import FEATURES
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_least_squares import LeastSquares, Sums
from sparsekv.training.fit_losses import membership_loss, pair_loss, top_entries
from sparsekv.training.fit_metrics import agreement, mean_agreement, rank_correlation, ranks
from sparsekv.training.fit_regression import SampleReader
from sparsekv.training.fit_solvers import Descent, scores_of, share_of_lr
from sparsekv.training.fit_targets import log_targets

Make = Callable[..., FitConfig]


def test_a_step_of_two_samples_is_the_mean_of_its_samples(fit_run: Make, fit_model: Path) -> None:
    """Nothing is padded, so lengths do not matter: the gradients of a batch are the mean of its samples' own."""

    loaded, tokenizer = load_model(str(fit_model), dtype="float32", device="cpu")
    attach_relevance(loaded, RelevanceConfig())
    reader = SampleReader(loaded, tokenizer, fit_run(), RelevanceConfig())
    samples = [
        {"input_ids": [3 + i % 97 for i in range(n)], "boundary": n - 10, "sample_index": n} for n in (40, 25)
    ]
    weight = getattr(relevance_modules(loaded)[0], NAME).score.weight
    gradients = []
    for chosen in (samples, samples[:1], samples[1:]):
        solver = Descent(loaded, fit_run(lr=1e-12))
        solver.starts_fresh = False
        solver.step(0, reader.read_all((sample, 0) for sample in chosen))
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2)
    assert not torch.allclose(gradients[1], gradients[2], rtol=0.1)


def test_samples_that_say_nothing_are_left_out_and_counted(fit_run: Make, fit_model: Path) -> None:
    """One without anything after its context, one whose context always stays: neither ends the run."""
    loaded, tokenizer = load_model(str(fit_model), dtype="float32", device="cpu")
    attach_relevance(loaded, RelevanceConfig())
    options = fit_run(futures={"kinds": ["continuation"]})
    reader = SampleReader(loaded, tokenizer, options, RelevanceConfig())
    samples = [
        {"input_ids": [3 + i % 97 for i in range(40)], "boundary": boundary, "sample_index": boundary}
        for boundary in (40, 4, 30)
    ]
    assert len(list(reader.read_all((sample, 0) for sample in samples))) == 1
    assert (reader.n_read, reader.n_left_out) == (3, 2)


def test_least_squares_is_the_minimum_over_all_samples(fit_run: Make, fit_model: Path) -> None:
    loaded, tokenizer = load_model(str(fit_model), dtype="float32", device="cpu")
    attach_relevance(loaded, RelevanceConfig())
    options = fit_run(regression={"solver": "least_squares", "ridge": 1e-9})
    reader = SampleReader(loaded, tokenizer, options, RelevanceConfig())
    samples = [
        {"input_ids": [3 + (i * i + k) % 97 for i in range(60)], "boundary": 50, "sample_index": k}
        for k in range(4)
    ]
    solver = LeastSquares(loaded, options)
    inputs, wanted = [], []
    for sample in samples:
        read = reader.read(sample)
        assert read is not None
        solver.step(0, [read])
        states = read[0][1].hidden[0, read[1]]
        inputs.append(states / states.square().mean(-1, keepdim=True).add(1e-6).sqrt())
        wanted.append(log_targets(read[0], read[1], 1e-6)[1].T)
    solver.settle()
    x = torch.cat(inputs).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(x, torch.cat(wanted).double(), driver="gelsd").solution
    score = getattr(relevance_modules(loaded)[1], NAME).score
    predicted = x[:, :-1].float() @ score.weight.T + score.bias
    torch.testing.assert_close(predicted, (x @ expected).float(), atol=2e-3, rtol=1e-3)
    read = reader.read(samples[0])
    assert read is not None
    torch.testing.assert_close(
        scores_of(read[0], read[1])[1].T, predicted[: len(inputs[0])], atol=1e-4, rtol=1e-4
    )


def test_least_squares_of_features_is_the_minimum_too() -> None:
    generator = torch.Generator().manual_seed(1)
    h, e = torch.randn(3, 50, 6, generator=generator), torch.randn(3, 2, 50, 4, generator=generator)
    y = torch.randn(3, 2, 50, generator=generator)
    sums = Sums.of(h[0], e[0], y[0])
    for i in (1, 2):
        sums.add(Sums.of(h[i], e[i], y[i]))
    weights, bias, of_features = sums.solve(1e-12)
    for head in range(2):
        x = torch.cat([h.reshape(150, 6), torch.ones(150, 1), e[:, head].reshape(150, 4)], dim=1).double()
        expected = torch.linalg.lstsq(x, y[:, head].reshape(150, 1).double()).solution[:, 0]
        found = torch.cat([weights[head], bias[head : head + 1], of_features[head]])
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    shrunk = sums.solve(100.0)
    assert shrunk[0].abs().max() < 0.05 and shrunk[2].abs().max() < 0.05
    # the bias alone goes free: it takes over the mean
    torch.testing.assert_close(shrunk[1], y.mean((0, 2)).double(), atol=0.02, rtol=0)


def test_the_groups_a_config_may_name_are_those_there_are() -> None:
    assert FEATURES == GROUPS


def test_rank_correlation_is_pandas_spearman() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (3, 40), generator=generator).float()  # many ties
    b = a + 2 * torch.randn(3, 40, generator=generator).round()
    for x, y, found in zip(a, b, rank_correlation(a, b).tolist(), strict=True):
        assert ranks(x).tolist() == pd.Series(x.tolist()).rank().tolist()
        expected = pd.Series(x.tolist()).rank().corr(pd.Series(y.tolist()).rank())
        assert found == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 9, 100])).item() == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([7.0, 7, 7])).isnan()


def test_agreement_by_hand() -> None:
    targets = torch.tensor([[[1.0, 2, 3, 4, 5]], [[10.0, 9, 8, 7, 6]]])
    backwards = targets.clone()
    backwards[0, 0] = backwards[0, 0].flip(0)
    found = agreement(backwards, targets)
    assert found["layers"] == pytest.approx([-1.0, 1.0])
    assert found["model"] == pytest.approx(1 - 6 * 40 / (10 * 99))  # squared rank differences 16+4+0+4+16
    assert found["kept"] == {"0.5": 1.0, "0.7": 1.0, "0.8": 1.0, "0.9": 1.0}
    assert agreement(-targets, targets)["kept"]["0.7"] == 0.0
    mean = mean_agreement([found, agreement(targets, targets)])
    assert mean["layers"] == pytest.approx([0.0, 1.0])
    constant = agreement(targets, torch.stack([targets[0], torch.ones(1, 5)]))
    assert mean_agreement([constant])["layers"][1] is None


def test_losses_by_hand() -> None:
    targets = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert top_entries(targets, 0.5).tolist() == [False, True, False, True]
    assert top_entries(torch.zeros(4), 0.7).tolist() == [True, False, False, False]
    scores = torch.tensor([0.0, 0.0, 0.0, 0.0])
    assert membership_loss(scores, targets, 0.5).item() == pytest.approx(0.6931, abs=1e-4)
    right = pair_loss(10 * targets, targets, 400, seed=1)
    wrong = pair_loss(-10 * targets, targets, 400, seed=1)
    assert right.item() < 1e-3 and wrong.item() > 5
    assert pair_loss(10 * targets, torch.zeros(4), 400, seed=1).item() == 0, "equal targets have no order"


def test_the_learning_rate(fit_run: Make) -> None:
    plan = fit_run(steps=100, warmup=4)
    assert [round(share_of_lr(step, plan), 2) for step in (0, 3, 4, 52, 99)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    flat = fit_run(steps=100, warmup=0.1, schedule="constant")
    assert share_of_lr(9, flat) < 1 and share_of_lr(10, flat) == share_of_lr(99, flat) == 1
