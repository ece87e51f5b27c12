"""Contexts with no more tokens than a method needs: training leaves them whole, inference says so."""

from __future__ import annotations

import pytest
import torch

from sparsekv import Budget, compress, prepare
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.training.dropping import DroppingConfig, make_plan
from toy import tiny_model

LEAST = {
    "streaming_llm": 4,
    "expected_attention": 4,
    "critical_adakv_expected_attention": 4,
    "cap": 4,
    "tova": 1,
    "compactor": 12,
    "adakv_compactor": 12,
    "snapkv": 64,
    "knorm": 0,
    "lagkv": 0,
}
"""The longest context that a method can't choose from."""


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama", num_hidden_layers=2)
    prepare(made)
    return made.eval()


@pytest.mark.parametrize(("method", "least"), LEAST.items())
def test_training_leaves_what_is_too_short_whole(model, method, least):
    policy = make_policy(method)
    assert policy.too_short == least
    ids = torch.arange(5, 85).repeat(3, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    boundaries = [1, max(least, 1), least + 2]
    plan = make_plan(
        model,
        batch,
        policy,
        Budget(compression_ratio=0.5),
        DroppingConfig(),
        boundaries=boundaries,
        seeds=[1, 2, 3],
    )
    model(ids, selection=plan)
    for at in plan.selected.values():
        hidden = (at < ids.shape[1]).any(1).sum(1).tolist()
        assert hidden[2] > 0, "one more token, and one to drop"
        assert hidden[:2] == [0, 0]


@pytest.mark.parametrize("method", [name for name, least in LEAST.items() if least > 1])
def test_compressing_what_is_too_short_is_refused_in_words(model, method):
    least = LEAST[method]
    for n in (2, least):
        with pytest.raises(ConfigError, match=f"context has {n} tokens, .* needs more than .*{least}"):
            compress(model, torch.arange(n)[None], method, Budget(compression_ratio=0.5))
    compress(model, torch.arange(least + 2)[None], method, Budget(compression_ratio=0.5))


def test_a_presss_own_sizes_count():
    assert make_policy("streaming_llm", n_sink=7).too_short == 7
    assert make_policy("compactor", sink_size_start=2, sink_size_end=1).too_short == 3
