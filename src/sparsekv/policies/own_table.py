"""Every method of this package: its name, what a user is told of it, where its policy is. Plain data, no torch."""

from __future__ import annotations

from sparsekv.policies.method_info import MethodInfo
from sparsekv.policies.own_methods import OwnMethod
from sparsekv.policies.spellings import OF_ANCHORS, PROTECTED

_PROTECTED = tuple(PROTECTED.items())

OWN: tuple[OwnMethod, ...] = (
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
        spellings=tuple(OF_ANCHORS.items()),
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
        spellings=tuple(OF_ANCHORS.items()),
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
    OwnMethod(
        MethodInfo(
            "atskv",
            route="scores",
            idea="Keeps what is more relevant than one threshold of the whole model, which follows target and memory.",
            cost="one small matrix product per layer, one quantile of the whole model",
            when="With relevance.safetensors; while decoding too, where the model's memory must stay bounded.",
        ),
        "sparsekv.relevance.atskv:ATSKV",
    ),
    OwnMethod(
        MethodInfo(
            "dynamic_kv",
            route="scores",
            idea="Layers keep more the more of the last window's attention they get; the total is exact.",
            paper="arXiv 2412.14838",
            cost="attention of the last window, and a sort of all layers' scores every few layers",
            when="Layers differ in what they need; heads of a layer keep the same number.",
        ),
        "dynamic_kv:DynamicKV",
        spellings=(("window_size", "window"),),
    ),
    OwnMethod(
        MethodInfo(
            "defensive_kv",
            route="scores",
            idea="Keeps what some query of the last window needed most (the worst case, not the mean), per layer.",
            paper="arXiv 2510.13334",
            cost="attention of the last window, and W_O v of every entry",
            when="What matters shifts between queries; heads of a layer share its budget.",
        ),
        "defensive_kv:DefensiveKV",
        spellings=(("window_size", "window"),),
    ),
    OwnMethod(
        MethodInfo(
            "layer_defensive_kv",
            route="scores",
            idea="As defensive_kv, with one budget for the whole model.",
            paper="arXiv 2510.13334",
            cost="as defensive_kv; the whole context is held until the last layer has been read",
            when="As defensive_kv, where layers differ too.",
        ),
        "defensive_kv:LayerDefensiveKV",
        spellings=(("window_size", "window"),),
    ),
    OwnMethod(
        MethodInfo(
            "rocket_kv",
            route="scores",
            idea="Evicts coarsely once, keeping more than the budget; each decoding step reads its best part.",
            paper="arXiv 2502.14051",
            cost="attention of the last window; per step bounds of keys, in a part of the channels",
            when="Decoding is bound by memory traffic; memory falls less than the budget says.",
        ),
        "rocket_kv:RocketKV",
        spellings=(("window_size", "window"),),
    ),
    OwnMethod(
        MethodInfo(
            "quest",
            route="tokens",
            idea="Evicts nothing; each decoding step reads the pages that may hold its largest logits.",
            paper="arXiv 2406.10774",
            cost="per step the least and greatest key of every page",
            when="Memory suffices and traffic doesn't; the ablation of rocket_kv's eviction.",
        ),
        "rocket_kv:Quest",
    ),
)
