"""Eviction methods by name, and how to make one.

make_policy("sink_recent", n_sink=4)
make_policy("adakv(snapkv)", window_size=32)      # a kvpress wrapper around a kvpress press

Loads no torch and no kvpress until a method is made, so the command line can list the names at once. A new
method is one file with a `TokenPolicy` or `LayerPolicy` and one row in `own_table.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsekv.errors import unknown
from sparsekv.policies.budget import Budget
from sparsekv.policies.method_info import MethodInfo
from sparsekv.policies.own_methods import OwnMethod
from sparsekv.policies.own_table import OWN
from sparsekv.registry import Registry

if TYPE_CHECKING:
    from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
    from sparsekv.policies.anchors import (
        AnchorConfig,
        Anchors,
        AnchorSelector,
        DynamicAnchors,
        build_kv_mask_from_anchors,
    )
    from sparsekv.policies.augment import EvictionAug
    from sparsekv.policies.base import LayerPolicy, ModelPolicy, NativePolicy, Policy, TokenPolicy
    from sparsekv.policies.blocks import BlockDropout, VariableBlockDropout
    from sparsekv.policies.defensive_kv import DefensiveKV, LayerDefensiveKV
    from sparsekv.policies.dynamic_kv import DynamicKV
    from sparsekv.policies.ladder import Ladder
    from sparsekv.policies.positional import Full, Random, SinkRecent, SlidingWindow, UniformMiddle
    from sparsekv.policies.rocket_kv import Quest, RocketKV
    from sparsekv.policies.sentences import SentenceDropout
    from sparsekv.policies.simple_evict import SimpleEvictConfig, build_simple_keep_token_idx
    from sparsekv.policies.soft import SoftThreshold

__all__ = [
    "METHODS",
    "AdaptiveBlockDropout",
    "AnchorConfig",
    "AnchorSelector",
    "Anchors",
    "BlockDropout",
    "Budget",
    "DefensiveKV",
    "DynamicAnchors",
    "DynamicKV",
    "EvictionAug",
    "Full",
    "Ladder",
    "LayerDefensiveKV",
    "LayerPolicy",
    "MethodInfo",
    "ModelPolicy",
    "NativePolicy",
    "Policy",
    "Quest",
    "Random",
    "RocketKV",
    "SentenceDropout",
    "SimpleEvictConfig",
    "SinkRecent",
    "SlidingWindow",
    "SoftThreshold",
    "TokenPolicy",
    "UniformMiddle",
    "VariableBlockDropout",
    "build_kv_mask_from_anchors",
    "build_simple_keep_token_idx",
    "list_methods",
    "make_policy",
]

_HOME = {
    "AdaptiveBlockDropout": "adaptive_blocks",
    "DefensiveKV": "defensive_kv",
    "LayerDefensiveKV": "defensive_kv",
    "DynamicKV": "dynamic_kv",
    "Quest": "rocket_kv",
    "RocketKV": "rocket_kv",
    "DynamicAnchors": "anchors",
    "EvictionAug": "augment",
    "BlockDropout": "blocks",
    "VariableBlockDropout": "blocks",
    "SentenceDropout": "sentences",
    "SoftThreshold": "soft",
    "AnchorConfig": "anchors",
    "AnchorSelector": "anchors",
    "Anchors": "anchors",
    "build_kv_mask_from_anchors": "anchors",
    "LayerPolicy": "base",
    "ModelPolicy": "base",
    "NativePolicy": "base",
    "Policy": "base",
    "TokenPolicy": "base",
    "Ladder": "ladder",
    "Full": "positional",
    "Random": "positional",
    "SinkRecent": "positional",
    "SlidingWindow": "positional",
    "UniformMiddle": "positional",
    "SimpleEvictConfig": "simple_evict",
    "build_simple_keep_token_idx": "simple_evict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


METHODS: Registry[OwnMethod] = Registry("method")
"""This package's own methods by name; kvpress's stand in `presses.py`. `make_policy` knows both."""

for _method in OWN:
    METHODS.register(_method.info.name, _method, aliases=_method.info.aliases)


def list_methods() -> list[MethodInfo]:
    """Every method there is: this package's, then kvpress's. Loads neither torch nor kvpress."""
    from sparsekv.policies.presses import KVPRESS_METHODS

    own = [METHODS.get(name).info for name in METHODS.names()]
    return own + [info for name, info in KVPRESS_METHODS.items() if name == info.name and name not in METHODS]


def make_policy(name: str, **args: Any) -> Policy:
    """The policy called `name`, with parameters `args`.

    Parameters
    ----------
    name : str
        A method's name or alias (`list_methods`), a kvpress class ("KnormPress"), or "wrapper(inner)" of
        kvpress methods.
    **args
        The policy's or press's parameters; for "anchors" also the fields of AnchorConfig.

    Raises
    ------
    ConfigError
        For an unknown name or parameter (with the nearest one) or a value that is not allowed.
    """
    if name in METHODS:
        return METHODS.get(name)(**args)
    from sparsekv.policies.presses import KVPRESS_METHODS, make_press_policy, parse_method

    if parse_method(name) is None:
        raise unknown("method", name, [*METHODS.names(), *KVPRESS_METHODS])
    return make_press_policy(name, **args)
