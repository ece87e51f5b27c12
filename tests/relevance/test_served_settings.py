"""What predictors were trained with travels in their file, and the policy goes by it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from sparsekv import compress, prepare
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.relevance import (
    RelevancePress,
    Served,
    attach_relevance,
    has_relevance,
    load_relevance,
    relevance_modules,
    save_relevance,
    serve_as,
    served_of,
)
from toy import tiny_model

T = 40
IDS = torch.randint(3, 250, (1, T), generator=torch.Generator().manual_seed(1))


def gated(seed: int):
    """A model whose predictors keep about half."""
    model = attach_relevance(prepare(tiny_model("llama")), seed=seed)
    for module in relevance_modules(model).values():
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(module.relevance.score.weight, std=0.3, generator=generator)
        torch.nn.init.zeros_(module.relevance.score.bias)
    return model


def kept(model, **parameters):
    return compress(model, IDS, make_policy("relevance", **parameters)).selection().evicted_at[0] > T


def rewrite(path, **changes):
    """Change (None: remove) metadata of a file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    changed = {**metadata, **changes}
    save_file(tensors, path, metadata={key: value for key, value in changed.items() if value is not None})


def test_the_policy_serves_what_was_trained(tmp_path):
    served = Served(n_sink=1, n_recent=2, threshold=0.6)
    save_relevance(serve_as(gated(3), served), tmp_path)
    model = load_relevance(prepare(tiny_model("llama")), tmp_path)
    assert served_of(model) == served
    as_trained = kept(model)
    assert torch.equal(as_trained, kept(model, n_sink=1, n_recent=2, threshold=0.6))
    assert not torch.equal(as_trained, kept(model, n_sink=4, n_recent=16, threshold=0.0))
    # what is said to the policy goes before what the file says, each by itself
    assert torch.equal(kept(model, threshold=0.0), kept(model, n_sink=1, n_recent=2, threshold=0.0))
    assert kept(model, n_recent=9)[..., -9:].all() and not as_trained[..., -9:].all()
    assert served_of(copy.deepcopy(model)) == served


def test_a_file_that_says_nothing_is_served_as_before(tmp_path):
    model = serve_as(gated(3), Served(1, 2, 0.6))
    path = save_relevance(model, tmp_path)
    rewrite(path, served=None)
    load_relevance(model, path)
    assert served_of(model) == Served(4, 16, 0.0)
    assert torch.equal(kept(model), kept(model, n_sink=4, n_recent=16, threshold=0.0))


def test_without_a_threshold_everything_stays(tmp_path):
    save_relevance(serve_as(gated(3), Served(threshold=float("-inf"))), tmp_path)
    assert kept(load_relevance(prepare(tiny_model("llama")), tmp_path)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"served": '{"n_sink": -1}'},
        {"served": '{"n_snk": 1}'},
        {"served": '{"threshold": NaN}'},
        {"served": "[1]"},
        {"served": "{"},
        {"relevance": '{"width": 0, "depth": 3}'},
        {"relevance": '{"width": 0, "bias": "x"}'},
        {"model": "7"},
    ],
)
def test_metadata_that_cannot_be_read(changes, tmp_path):
    path = save_relevance(gated(3), tmp_path)
    rewrite(path, **changes)
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="its metadata cannot be read") as caught:
        load_relevance(model, tmp_path)
    assert "\n" not in str(caught.value) and not has_relevance(model)


def test_tensors_that_belong_to_no_layer_or_have_another_shape(tmp_path):
    model = gated(3)
    before = relevance_modules(model)[0].relevance.score.weight.clone()
    path = save_relevance(gated(4), tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for changed, message in (
        ({**tensors, "layers.3.score.bias": torch.zeros(2)}, r"has layers\.3\.score\.bias, which no layer"),
        ({**tensors, "extra": torch.zeros(2)}, "has extra, which no layer"),
        (
            {**tensors, "layers.2.score.weight": torch.zeros(2, 9)},
            r"does not fit layer 2: .*weight is \(2, 9\)",
        ),
    ):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(ConfigError, match=message):
            load_relevance(model, tmp_path)
    assert torch.equal(relevance_modules(model)[0].relevance.score.weight, before), "left as it was"


def test_a_press_with_a_folder_serves_that_folder_and_leaves_the_models_own(tmp_path):
    theirs, ours = serve_as(gated(3), Served(1, 2, 0.1)), serve_as(gated(9), Served(0, 3, -0.2))
    save_relevance(theirs, tmp_path)
    wanted, own = kept(theirs), kept(ours)
    assert not torch.equal(wanted, own)
    modules = [module.relevance for module in relevance_modules(ours).values()]
    state = [module.state_dict()["score.weight"].clone() for module in modules]
    press = RelevancePress.from_pretrained(tmp_path)

    def hidden(model):
        with press(model), torch.no_grad():
            model(IDS, past_key_values=DynamicCache(config=model.config))
        return [press.achieved_compression[layer] for layer in range(3)]

    by_hand = [pytest.approx(1 - float(layer.float().mean())) for layer in wanted]
    for _ in range(2):
        assert hidden(ours) == by_hand
    assert [module.relevance for module in relevance_modules(ours).values()] == modules
    assert all(torch.equal(m.state_dict()["score.weight"], s) for m, s in zip(modules, state, strict=True))
    assert torch.equal(kept(ours), own), "and what they are served with"
    bare = tiny_model("llama")
    assert hidden(bare) == by_hand and not has_relevance(bare)
    with pytest.raises(RuntimeError, match="stop"), press(ours):
        raise RuntimeError("stop")
    assert [module.relevance for module in relevance_modules(ours).values()] == modules
    # another press enters without the context manager
    press.post_init_from_model(ours)
    assert torch.equal(kept(ours), wanted)


def test_attaching_leaves_the_random_state_of_every_device(monkeypatch):
    model, seeded = tiny_model("llama"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    attach_relevance(model, seed=5)
    assert seeded == []


def test_mistakes():
    with pytest.raises(ConfigError, match="relevance: n_recent must be a whole number >= 0"):
        Served(n_recent=1.5)
    with pytest.raises(ConfigError, match="relevance: threshold must be a number, got 'x'"):
        make_policy("relevance", threshold="x")
    with pytest.raises(ConfigError, match="no relevance predictors"):
        serve_as(tiny_model("llama"), Served())
    with pytest.raises(ConfigError, match="no relevance predictors"):
        served_of(tiny_model("llama"))
