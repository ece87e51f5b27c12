"""What can be trained under: one answer for every method, wherever it is asked."""

from __future__ import annotations

from typing import Any

import kvpress
import pytest

from sparsekv.errors import ConfigError
from sparsekv.policies import METHODS, make_policy
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.budget import Budget
from sparsekv.policies.trainable import trainable, why_untrainable
from sparsekv.policies.training_presses import EvictionAugPress
from sparsekv.training.setup import policy_of

REFUSED = {
    "dynamic_kv": "needs every layer's scores first",
    "layer_defensive_kv": "needs every layer's scores first",
    "atskv": "needs every layer's scores first",
    "quest": "chooses at every decoding step",
    "rocket_kv": "chooses at every decoding step",
    "kvzip": "needs a prefill of its own",
    "think": "needs a prefill of its own",
    "key_rerotation(knorm)": "re-rotates the keys that stay",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_trained_under_says_why(name: str) -> None:
    policy, message = make_policy(name), f"method {name}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ConfigError, match=f"{message} {REFUSED[name]}.*; it can't be trained under"
    ) as caught:
        policy_of(policy)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=REFUSED[name]):
        trainable(policy)
    with pytest.raises(ConfigError, match=REFUSED[name]):
        EvictionAug((policy,))


def test_all_other_methods_can_be() -> None:
    for name in [*METHODS, "snapkv", "adakv(snapkv)", "tova"]:
        assert (why_untrainable(make_policy(name)) is None) == (name not in REFUSED), name
    assert policy_of(kvpress.KnormPress()).name == "KnormPress"
    with pytest.raises(ConfigError, match="needs a prefill of its own"):
        policy_of(kvpress.ThinKPress())


@pytest.mark.parametrize(
    "press",
    [
        lambda scope: PolicyPress(make_policy("knorm"), 0.5, scope=scope),
        lambda scope: EvictionAugPress(["random", "h2o"], scope=scope),
    ],
)
def test_a_budget_of_the_whole_model_is_refused_where_layers_choose(press: Any) -> None:
    assert policy_of(press("layer"))
    with pytest.raises(ConfigError, match="give scope 'head' or 'layer'; it can't be trained under"):
        policy_of(press("model"))
    assert policy_of(PolicyPress(make_policy("random"), 0.5, scope="model")), "it chooses before the forward"


def test_the_decision_is_the_layers_own() -> None:
    """`trainable` promises what a plan needs: a choice before the forward, or inside a layer."""
    for name in METHODS:
        policy = make_policy(name)
        if name not in REFUSED:
            assert trainable(policy) is policy
            assert not getattr(policy, "spans_layers", lambda budget: False)(Budget(compression_ratio=0.3))
