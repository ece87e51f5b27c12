"""Eviction methods by name, and how to make one.

make_policy("sink_recent", n_sink=4)
make_policy("adakv(snapkv)", window_size=32)      # a kvpress wrapper around a kvpress press

Loads no torch and no kvpress until a method is made, so the command line can list the names at once. A new
method is one file with a `TokenPolicy` or `LayerPolicy` and one row in `_OWN`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.budget import Budget
from sparsekv.policies.method_info import MethodInfo
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
    from sparsekv.policies.ladder import Ladder
    from sparsekv.policies.positional import Full, Random, SinkRecent, SlidingWindow, UniformMiddle
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
    "DynamicAnchors",
    "EvictionAug",
    "Full",
    "Ladder",
    "LayerPolicy",
    "MethodInfo",
    "ModelPolicy",
    "NativePolicy",
    "Policy",
    "Random",
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


@dataclass(frozen=True)
class OwnMethod:
    """A factory for one of the methods of this package: call it with the policy's parameters.

    Parameters
    ----------
    info : MethodInfo
    policy : str
        "module:class" under `sparsekv.policies` (or a full name), loaded on the first call.
    nested : str
        "field=module:class" of a parameter that is itself a config; its fields may be given directly.
    spellings : tuple of (str, str)
        Other names of parameters that users know, with ours.
    """

    info: MethodInfo
    policy: str
    nested: str = ""
    spellings: tuple[tuple[str, str], ...] = ()

    def __call__(self, **args: Any) -> Policy:
        """The policy with these parameters.

        Raises
        ------
        ConfigError
            For a parameter it does not have, or a value that is not allowed.
        """
        made: Policy = _load(self.policy)(**self._checked(args))
        return made

    def _checked(self, args: dict[str, Any]) -> dict[str, Any]:
        name = self.info.name
        own = _fields(_load(self.policy))
        nested_field, _, nested_home = self.nested.partition("=")
        nested = _load(nested_home) if nested_home else None
        inner = _fields(nested) if nested else []
        spelled = dict(self.spellings)
        given: dict[str, Any] = {}
        for key, value in args.items():
            field = spelled.get(key, key)
            if field not in own and field not in inner:
                raise unknown(f"argument of {name}", key, [*own, *inner, *spelled])
            if field in given:
                raise ConfigError(f"{name}: {field} is given twice (also as {key})")
            given[field] = value
        if nested is None:
            return given
        if isinstance(given.get(nested_field), dict):
            config = given.pop(nested_field)
            return self._checked({**given, **config})
        flat = {key: given.pop(key) for key in inner if key in given}
        if flat and nested_field in given:
            raise ConfigError(f"{name}: {nested_field} and {', '.join(flat)} are both given; give one")
        return {**given, nested_field: nested(**flat)} if flat else given


def _load(home: str) -> Any:
    module, _, attribute = home.partition(":")
    # A policy may live above this package: its name is known here, its module only when it is asked for.
    place = module if module.startswith("sparsekv.") else f"{__name__}.{module}"
    return getattr(import_module(place), attribute)


def _fields(made: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(made)]


METHODS: Registry[OwnMethod] = Registry("method")
"""This package's own methods by name; kvpress's stand in `presses.py`. `make_policy` knows both."""

_PROTECTED = (("protect_start", "n_sink"), ("protect_recent", "n_recent"), ("recent", "n_recent"))
"""Spellings of the entries that always stay, as training presses take them too."""

_OWN = (
    OwnMethod(
        MethodInfo(
            "full",
            route="tokens",
            idea="Keeps everything: the uncompressed baseline.",
            cost="none",
            when="As the first row of every comparison.",
            aliases=("no_press",),
        ),
        "positional:Full",
    ),
    OwnMethod(
        MethodInfo(
            "random",
            route="tokens",
            idea="Keeps a uniformly random subset, drawn anew for every layer and kv head.",
            cost="O(layers x kv heads x tokens) random numbers, no model work",
            when="As the floor: a method that does not beat it has learned nothing.",
        ),
        "positional:Random",
    ),
    OwnMethod(
        MethodInfo(
            "sink_recent",
            route="tokens",
            idea="Keeps the first few tokens (attention sinks) and the most recent ones.",
            paper="arXiv 2309.17453",
            cost="none",
            when="Endless streams and local tasks; whatever lay in the middle is lost.",
        ),
        "positional:SinkRecent",
    ),
    OwnMethod(
        MethodInfo(
            "uniform_middle",
            route="tokens",
            idea="Keeps sinks, recent tokens, and blocks evenly spread over the middle.",
            cost="none",
            when="As the position-only baseline for tasks whose evidence may lie anywhere.",
        ),
        "positional:UniformMiddle",
    ),
    OwnMethod(
        MethodInfo(
            "sliding_window",
            route="tokens",
            idea="Every query sees only the last tokens, in the prefill too; no sinks.",
            paper="arXiv 2004.05150",
            cost="its own prefill, cheaper than a full one",
            when="To see what a model without sinks loses; memory is bounded from the first token.",
        ),
        "positional:SlidingWindow",
    ),
    OwnMethod(
        MethodInfo(
            "ladder",
            route="tokens",
            idea="Shallow layers keep earlier tokens, deep layers later ones; together they span more.",
            paper="arXiv 2507.14204",
            cost="none",
            when="Long generation under a fixed cache, where the far past should fade instead of vanish.",
            aliases=("lacache",),
        ),
        "ladder:Ladder",
    ),
    OwnMethod(
        MethodInfo(
            "anchors",
            route="tokens",
            idea="Keeps sinks, recent and special tokens and punctuation of any script, then fills up.",
            paper="arXiv 2412.12094",
            cost="a table look-up per token",
            when="Prose and dialogue: models gather what a sentence said at its end.",
        ),
        "anchors:Anchors",
        nested="config=anchors:AnchorConfig",
        spellings=(("n_sink", "sink_size"), ("n_recent", "recent_size")),
    ),
    OwnMethod(
        MethodInfo(
            "dynamic_anchors",
            route="scores",
            idea="Keeps fixed anchors (sinks, recent, text) and fills the budget with a scorer's best entries.",
            cost="the inner method's scores",
            when="A scorer's choices with a floor under them.",
        ),
        "anchors:DynamicAnchors",
        nested="config=anchors:PlaceAnchorConfig",
        spellings=(("n_sink", "sink_size"), ("n_recent", "recent_size")),
    ),
    OwnMethod(
        MethodInfo(
            "block_dropout",
            route="tokens",
            idea="Random blocks of one size leave; sinks and recent tokens stay.",
            cost="a random number per block",
            when="To train under eviction, and to see what such training gained.",
        ),
        "blocks:BlockDropout",
        spellings=_PROTECTED,
    ),
    OwnMethod(
        MethodInfo(
            "variable_block_dropout",
            route="tokens",
            idea="Random blocks of random length leave; sinks and recent tokens stay.",
            cost="a random number per block",
            when="As block_dropout, without a grid that a model could learn.",
        ),
        "blocks:VariableBlockDropout",
        spellings=_PROTECTED,
    ),
    OwnMethod(
        MethodInfo(
            "sentence_dropout",
            route="tokens",
            idea="Random whole sentences leave, in any script, code and lists.",
            cost="a table look-up per token",
            when="To train on losses that follow the text's own seams.",
        ),
        "sentences:SentenceDropout",
        spellings=_PROTECTED,
    ),
    OwnMethod(
        MethodInfo(
            "adaptive_block_dropout",
            route="scores",
            idea="Blocks leave at random, those with little attention or much of their own on the sinks more often.",
            cost="attention of the last window and of a few queries per block",
            when="To train between random dropout and a real method.",
        ),
        "adaptive_blocks:AdaptiveBlockDropout",
        spellings=_PROTECTED,
    ),
    OwnMethod(
        MethodInfo(
            "soft_threshold",
            route="scores",
            idea="Keeps what got the most attention for its place, or the most learned relevance; trained softly.",
            cost="attention of the last window only, or one small predictor",
            when="To let gradients reach the scores in training; hard at inference.",
        ),
        "soft:SoftThreshold",
        spellings=_PROTECTED,
    ),
    OwnMethod(
        MethodInfo(
            "relevance",
            route="scores",
            idea="Keeps what predictors, trained along with the model, score highest from each token's hidden state.",
            cost="one small matrix product per layer",
            when="With a model or adapter that brings relevance.safetensors; best with budget_scope model.",
        ),
        "sparsekv.relevance.policy:Relevance",
    ),
)

for _method in _OWN:
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
