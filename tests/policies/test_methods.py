"""Methods by name: what each name makes, what mistakes say, and that listing them loads no model library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekv import policies
from sparsekv.errors import ConfigError
from sparsekv.policies import METHODS, Policy, list_methods, make_policy
from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
from sparsekv.policies.anchors import AnchorConfig, Anchors, DynamicAnchors
from sparsekv.policies.blocks import BlockDropout, VariableBlockDropout
from sparsekv.policies.defensive_kv import DefensiveKV, LayerDefensiveKV
from sparsekv.policies.dynamic_kv import DynamicKV
from sparsekv.policies.ladder import Ladder
from sparsekv.policies.positional import Full, Random, SinkRecent, SlidingWindow, UniformMiddle
from sparsekv.policies.rocket_kv import Quest, RocketKV
from sparsekv.policies.sentences import SentenceDropout
from sparsekv.policies.soft import SoftThreshold
from sparsekv.relevance import ATSKV, Relevance

OWN = {
    "full": Full,
    "random": Random,
    "sink_recent": SinkRecent,
    "uniform_middle": UniformMiddle,
    "sliding_window": SlidingWindow,
    "ladder": Ladder,
    "anchors": Anchors,
    "dynamic_anchors": DynamicAnchors,
    "block_dropout": BlockDropout,
    "variable_block_dropout": VariableBlockDropout,
    "sentence_dropout": SentenceDropout,
    "adaptive_block_dropout": AdaptiveBlockDropout,
    "soft_threshold": SoftThreshold,
    "relevance": Relevance,
    "atskv": ATSKV,
    "dynamic_kv": DynamicKV,
    "defensive_kv": DefensiveKV,
    "layer_defensive_kv": LayerDefensiveKV,
    "rocket_kv": RocketKV,
    "quest": Quest,
}
METHODS_PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.mark.parametrize("name", OWN)
def test_every_own_name_makes_its_policy(name: str) -> None:
    policy = make_policy(name)
    assert type(policy) is OWN[name] and policy.name == name
    assert policy.route == METHODS.get(name).info.route


def test_the_registry_holds_exactly_the_own_methods() -> None:
    assert METHODS.names() == list(OWN)
    assert isinstance(make_policy("no_press"), Full) and isinstance(make_policy("lacache"), Ladder)


def test_parameters_reach_the_policy() -> None:
    assert make_policy("sink_recent", n_sink=2, n_recent=7) == SinkRecent(2, 7)
    assert make_policy("ladder", span=3, overlap=1) == Ladder(3, 1)
    assert make_policy("uniform_middle", n_recent=5, block_size=16, stride=3) == UniformMiddle(4, 5, 16, 3)


@pytest.mark.parametrize(
    "args",
    [
        {"sink_size": 2, "recent_size": 9, "fill": "uniform"},
        {"n_sink": 2, "n_recent": 9, "fill": "uniform"},
        {"config": {"n_sink": 2, "recent_size": 9}, "fill": "uniform"},
        {"config": AnchorConfig(sink_size=2, recent_size=9), "fill": "uniform"},
    ],
)
def test_anchors_take_their_config_in_any_spelling(args: dict[str, Any]) -> None:
    assert make_policy("anchors", **args) == Anchors(AnchorConfig(sink_size=2, recent_size=9), "uniform")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "sink_recnt",
            {},
            r"unknown method 'sink_recnt' \(did you mean 'sink_recent'\?\); allowed: full, random",
        ),
        ("snapvk", {}, r"unknown method 'snapvk' \(did you mean 'snapkv'\?\)"),
        ("sink_recent", {"n_recnt": 4}, r"argument of sink_recent 'n_recnt' \(did you mean 'n_recent'\?\)"),
        ("full", {"n_sink": 4}, "unknown argument of full 'n_sink'; allowed: none"),
        ("anchors", {"use_punctation": True}, r"\(did you mean 'use_punctuation'\?\)"),
        ("anchors", {"config": {"sink_sise": 1}}, r"'sink_sise' \(did you mean 'sink_size'\?\)"),
        ("anchors", {"n_sink": 1, "sink_size": 2}, "sink_size is given twice"),
        ("anchors", {"config": AnchorConfig(), "sink_size": 2}, "config and sink_size are both given"),
        ("anchors", {"fill": "latest"}, "unknown fill 'latest'.*; allowed: recent, uniform, random"),
        ("sliding_window", {"window": -1}, "window must be a whole number >= 1, got -1"),
    ],
)
def test_mistakes_name_the_nearest(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_policy(name, **args)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_kvpress_methods_too() -> None:
    with pytest.raises(ConfigError) as raised:
        make_policy("zzzz")
    assert "did you mean" not in str(raised.value)
    for name in ("full", "anchors", "snapkv", "tova"):
        assert f" {name}" in str(raised.value)


def test_kvpress_names_and_wrappers_are_delegated() -> None:
    for name in ("knorm", "KnormPress", "adakv(snapkv)"):
        policy = make_policy(name)
        assert isinstance(policy, Policy) and policy.route in ("scores", "masked")


def test_every_method_is_listed_once_with_what_a_user_needs() -> None:
    infos = list_methods()
    names = [info.name for info in infos]
    assert names[: len(OWN)] == list(OWN) and "snapkv" in names
    assert len(names) == len(set(names))
    for info in infos:
        assert (
            info.route in ("tokens", "scores", "masked", "native") and info.idea and info.cost and info.when
        )


def test_every_own_method_has_its_section_in_the_docs() -> None:
    page = METHODS_PAGE.read_text(encoding="utf-8")
    for name in OWN:
        info = METHODS.get(name).info
        assert f"\n## {name}\n" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert info.paper in section
        for alias in info.aliases:
            assert f"`{alias}`" in page


def test_public_names_resolve() -> None:
    assert all(getattr(policies, name) is not None for name in policies.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SnikRecent'"):
        _ = policies.SnikRecent


def test_listing_loads_neither_torch_nor_kvpress() -> None:
    code = (
        "import sys; from sparsekv.policies import METHODS, list_methods; list_methods(); "
        "print([m for m in ('torch', 'kvpress', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_own_methods_do_not_load_kvpress() -> None:
    code = (
        "import sys; from sparsekv.policies import METHODS, make_policy; "
        "[make_policy(n) for n in METHODS]; print('kvpress' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
