"""Every kvpress 0.5.5 method in one static table: its names, its route into sparsekv, what it costs.

Plain data: importing this module imports neither torch nor kvpress.

Routes
    scores   the press only decides which entries stay: a LayerPolicy, really compacted by our cache
    masked   the press hides entries per head (`masked_key_indices`), or runs the model itself to decide: a
             LayerPolicy or a ModelPolicy; what it hides becomes a Selection and is really freed
    native   the press changes entries, or works while decoding: kvpress's own hooks and prefill run

Names
    Outside brackets a name is that of kvpress's evaluation registry. Inside brackets, `wrapper(inner)`, it is
    a press class, because wrappers take presses. The two differ once: the registry's `expected_attention` is
    AdaKV over expected attention (epsilon 0.01). The plain scorer is `expected_attention_plain`, or
    `expected_attention` in brackets. Class names (`ExpectedAttentionPress`) always mean the class with its
    defaults. Three names of the registry are sparsekv's own methods: `no_press` = `full`,
    `observed_attention` = `h2o` (the same scores without eager attention) and `random` (the same idea, drawn
    per row; kvpress's press is `random_press`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparsekv.policies.method_info import MethodInfo

PressRoute = Literal["scores", "masked", "native"]


@dataclass(frozen=True)
class PressClass:
    """One exported kvpress class.

    Parameters
    ----------
    cls : str
        Name of the class in `kvpress`.
    name : str
        Its name inside brackets; outside too unless a row of `METHODS` has that name.
    route : "scores", "masked" or "native"
        Of the class as outermost press (key_rerotation and per_layer_compression: of what they wrap).
    idea, paper, cost, when : str
    inner : str
        The constructor argument that takes other presses; empty if none.
    scorer : bool
        True if wrappers that need a scorer take it.
    """

    cls: str
    name: str
    route: PressRoute
    idea: str
    paper: str
    cost: str
    when: str
    inner: str = ""
    scorer: bool = False


@dataclass(frozen=True)
class PressSpec:
    """A press to be built: class, arguments, inner presses."""

    cls: str
    args: Mapping[str, object] = field(default_factory=dict)
    inner: tuple[PressSpec, ...] = ()


_CHEAP = "one pass over keys or values"
_WINDOW = "attention of the last window only"
_NO_DECODE = "decoding only; kvpress's own generation loop"

CLASSES: tuple[PressClass, ...] = (
    # ---- scorers ----
    PressClass("SnapKVPress", "snapkv", "scores", "attention from the last 64 tokens, pooled",
               "arXiv 2404.14469", _WINDOW, "the question ends the context", scorer=True),
    PressClass("TOVAPress", "tova", "scores", "attention from the last token, mean of heads",
               "arXiv 2401.06104", _WINDOW, "a cheap query-aware baseline", scorer=True),
    PressClass("StreamingLLMPress", "streaming_llm", "scores", "sinks and the most recent entries",
               "arXiv 2309.17453", "none", "fluent text; forgets the middle", scorer=True),
    PressClass("KnormPress", "knorm", "scores", "small key norm = important", "arXiv 2406.11430", _CHEAP,
               "a query-free baseline", scorer=True),
    PressClass("KeyDiffPress", "keydiff", "scores", "keys unlike the mean key", "arXiv 2504.15364", _CHEAP,
               "query-free, cheap, no attention", scorer=True),
    PressClass("ExpectedAttentionPress", "expected_attention_plain", "scores",
               "attention expected from future queries (Gaussian model), times value norm",
               "arXiv 2510.00636", "queries of the context, one D x D covariance per head",
               "question unknown", scorer=True),
    PressClass("ExpectedAttentionStatsPress", "expected_attention_stats", "scores",
               "expected attention with query statistics measured beforehand", "arXiv 2510.00636",
               "keys times one vector", "question unknown", scorer=True),
    PressClass("LagKVPress", "lagkv", "scores", "spread relative to the next partition of 128 entries",
               "arXiv 2504.04704", _CHEAP, "query-free; needs more than 260 tokens", scorer=True),
    PressClass("CURPress", "cur", "scores", "leverage of keys times values in windows of 16 (CurDKV)",
               "arXiv 2509.15038", _CHEAP, "query-free", scorer=True),
    PressClass("CapPress", "cap", "scores",
               "value capacity weighted by alignment with the mean query (CapKV)", "arXiv 2604.25975",
               "one D x D solve per query head", "question unknown", scorer=True),
    PressClass("LeverageScorePress", "leverage", "scores", "statistical leverage of pre-RoPE keys, sketched",
               "arXiv 2507.08143", "one Cholesky per head; draws a sketch", "part of compactor",
               scorer=True),
    PressClass("NonCausalAttnPress", "non_causal_attn", "scores",
               "attention received within chunks of 256, both ways", "arXiv 2507.08143",
               "chunked attention once more", "part of compactor", scorer=True),
    PressClass("CompactorPress", "compactor", "scores", "leverage blended with non-causal chunk attention",
               "arXiv 2507.08143", "both of its parts", "question unknown", scorer=True),
    PressClass("QFilterPress", "qfilter", "scores", "keys against a learned filter direction per head",
               "arXiv 2503.02812", "keys times one vector", "very cheap at run time", scorer=True),
    PressClass("KVzapPress", "kvzap", "scores", "a small model predicts KVzip's scores from hidden states",
               "arXiv 2601.07891", "keys times one vector", "KVzip's quality without its passes",
               scorer=True),
    PressClass("ObservedAttentionPress", "observed_attention", "scores",
               "mean attention received so far (H2O)", "arXiv 2306.14048", "attention once more, blockwise",
               "long generations", scorer=True),
    PressClass("RandomPress", "random_press", "scores", "a random draw per head", "", "none", "the floor",
               scorer=True),
    PressClass("CriticalKVPress", "critical", "scores",
               "inner scores times the norm of W_O v, in two stages", "arXiv 2502.03805",
               "inner, plus W_O v of every entry", "improves a scorer", "press", scorer=True),
    PressClass("PyramidKVPress", "pyramidkv", "scores", "SnapKV with more entries in lower layers",
               "arXiv 2406.02069", _WINDOW, "lower layers look wide", scorer=True),
    # ---- other presses that only choose entries ----
    PressClass("BlockPress", "block", "scores", "evict block by block, as if the prompt were streamed",
               "arXiv 2504.15364", "the inner scores once per block", "as keydiff's paper does it", "press"),
    PressClass("ChunkPress", "chunk", "scores", "the same ratio in every chunk of 1024", "FINCH, TACL 2024",
               "inner", "even coverage of the context", "press"),
    PressClass("ChunkKVPress", "chunkkv", "scores", "whole chunks of 20 entries stay or go",
               "arXiv 2502.00299", "inner", "keeps phrases together", "press"),
    PressClass("EntropyGatedChunkKVPress", "entropy_gated_chunkkv", "scores",
               "chunks of 10; spiky ones keep their top entries only", "arXiv 2502.00299", "inner",
               "keeps phrases together, wastes less", "press"),
    PressClass("SimLayerKVPress", "simlayerkv", "scores",
               "lazy layers keep sinks and 1024 recent, the others all", "arXiv 2410.13846",
               "attention of the last token", "lazy_threshold decides, not a ratio"),
    PressClass("PerLayerCompressionPress", "per_layer_compression", "scores", "one ratio for each layer", "",
               "inner", "layers differ; compression_ratios decides", "press"),
    PressClass("KeyRerotationPress", "key_rerotation", "scores", "kept keys move to consecutive positions",
               "", "inner, plus one rotation of what stays", "beyond the model's window", "press"),
    PressClass("ComposedPress", "composed", "scores", "one press after the other", "", "the sum",
               "two criteria; the ratio applies to each", "presses"),
    # ---- head-wise ----
    PressClass("AdaKVPress", "adakv", "masked", "one budget per layer, shared by its heads",
               "arXiv 2407.11550", "inner", "heads need different amounts", "press"),
    PressClass("CriticalAdaKVPress", "critical_adakv", "masked",
               "AdaKV's budgets with CriticalKV's second stage", "arXiv 2502.03805",
               "inner, plus W_O v of every entry", "heads need different amounts", "press"),
    PressClass("DMSPress", "dms", "masked", "evict what scores below a threshold, outside a recent window",
               "arXiv 2506.05345", "inner", "threshold decides, not a ratio", "press"),
    PressClass("LUKVPress", "lukv", "masked", "head budgets from a curve measured beforehand",
               "arXiv 2602.08585", "inner", "a model with a published curve", "press"),
    PressClass("DuoAttentionPress", "duo_attention", "masked",
               "streaming heads keep sinks and recent, others all", "arXiv 2410.10819", "an own prefill",
               "head_compression_ratio decides"),
    PressClass("KVzipPress", "kvzip", "masked", "attention while the model repeats the context",
               "arXiv 2505.23416", "2 to 3 more prefills", "one context, many questions"),
    PressClass("KVgradPress", "kvgrad", "masked", "KVzip with input x gradient attribution",
               "openreview cg1wTCJjjk", "3 to 4 more prefills, with gradients",
               "one context, many questions"),
    PressClass("KVComposePress", "kvcompose", "masked", "attention from a second reading; layer budgets",
               "arXiv 2509.05165", "one more prefill in eager attention", "one context, many questions"),
    PressClass("FastKVzipPress", "fastkvzip", "masked", "gates trained on KVzip's scores",
               "arXiv 2601.17668", "an own prefill", "KVzip's quality without its passes"),
    # ---- native ----
    PressClass("ThinKPress", "think", "native", "zero the least important key channels", "arXiv 2407.21018",
               _WINDOW, "key_channel_compression_ratio decides; frees nothing by itself"),
    PressClass("MergingPress", "merging", "native", "evicted values are blended into their nearest survivor",
               "arXiv 2406.13035", "inner, plus all pairs of evicted and kept", "extraction tasks", "press"),
    PressClass("FinchPress", "finch", "native",
               "SnapKV with the question as window, after a delimiter token", "10.1162/tacl_a_00716",
               _WINDOW, "the prompt is marked; from_press after update_model_and_tokenizer"),
    PressClass("RestoreKVPress", "RestoreKV", "native", "KVzip plus restore tokens written by a LoRA pass",
               "arXiv 2608.01247", "KVzip", "models with a published adapter"),
    PressClass("DecodingPress", "decoding", "native", "compress to target_size every 512 steps", "",
               _NO_DECODE, "long answers", "base_press"),
    PressClass("CompressionRatioDecodingPress", "compression_ratio_decoding", "native",
               "compress to a fraction of all tokens every 512 steps", "", _NO_DECODE, "long answers",
               "base_press"),
    PressClass("CAMPress", "cam", "native", "merge evicted values into later entries while decoding (CaM)",
               "openreview LCTmppB165", _NO_DECODE, "long answers", "base_press"),
    PressClass("PrefillDecodingPress", "prefill_decoding", "native",
               "one press for the prompt, one while decoding", "", _NO_DECODE, "long prompts and answers",
               "prefilling_press,decoding_press"),
)  # fmt: skip
"""Every class that kvpress 0.5.5 exports, but for the abstract BasePress and ScorerPress."""

DOWNLOADS: dict[str, str] = {
    "QFilterPress": "Q-filters (nthngdy/<model>_qfilt on the Hub)",
    "KVzapPress": "a KVzap model (nvidia/KVzap-<type>-<model> on the Hub)",
    "FastKVzipPress": "gates (Jang-Hyun/Fast-KVzip on the Hub)",
    "RestoreKVPress": "an adapter (higokri/RestoreKV-<model> on the Hub)",
    "DuoAttentionPress": "head patterns (mit-han-lab/duo-attention on GitHub) or BookSum (on the Hub)",
    "ExpectedAttentionStatsPress": "query statistics (alessiodevoto/exp_att_stats_<model> on the Hub)",
    "LUKVPress": "a budget curve (baidu-baige/LU-KV on GitHub)",
}
"""Classes that fetch something for the model, and what: they fail with one clear line offline."""


def _p(cls: str, *inner: PressSpec, **args: object) -> PressSpec:
    return PressSpec(cls, args, inner)


_SNAP, _KNORM, _TOVA = _p("SnapKVPress"), _p("KnormPress"), _p("TOVAPress")
_EXPECTED = _p("ExpectedAttentionPress", epsilon=1e-2)
_EXPECTED_NO_V = _p("ExpectedAttentionPress", use_vnorm=False)
_STREAM, _KEYDIFF = _p("StreamingLLMPress"), _p("KeyDiffPress")
_ZAP = _p("KVzapPress", model_type="mlp")

METHODS: dict[str, PressSpec] = {
    "adakv_snapkv": _p("AdaKVPress", _SNAP),
    "block_keydiff": _p("BlockPress", _KEYDIFF, block_size=128),
    "chunkkv": _p("ChunkKVPress", _SNAP, chunk_length=20),
    "critical_adakv_expected_attention": _p("CriticalAdaKVPress", _EXPECTED_NO_V),
    "critical_adakv_snapkv": _p("CriticalAdaKVPress", _SNAP),
    "critical_expected_attention": _p("CriticalKVPress", _EXPECTED_NO_V),
    "critical_snapkv": _p("CriticalKVPress", _SNAP),
    "cur": _p("CURPress"),
    "duo_attention": _p("DuoAttentionPress"),
    "duo_attention_on_the_fly": _p("DuoAttentionPress", on_the_fly_scoring=True),
    "expected_attention": _p("AdaKVPress", _EXPECTED),
    "fastkvzip": _p("FastKVzipPress"),
    "finch": _p("FinchPress"),
    "keydiff": _KEYDIFF,
    "kvcompose": _p("KVComposePress"),
    "kvcompose_unstructured": _p("KVComposePress", structured=False),
    "kvzip": _p("KVzipPress"),
    "kvzip_plus": _p("KVzipPress", kvzip_plus_normalization=True),
    "kvzap_linear": _p("DMSPress", _p("KVzapPress", model_type="linear")),
    "kvzap_mlp": _p("DMSPress", _ZAP),
    "kvzap_mlp_head": _ZAP,
    "kvzap_mlp_layer": _p("AdaKVPress", _ZAP),
    "lagkv": _p("LagKVPress"),
    "lukv": _p("LUKVPress", _p("ExpectedAttentionPress", epsilon=2e-2), sink=4, window=1),
    "knorm": _KNORM,
    "pyramidkv": _p("PyramidKVPress"),
    "qfilter": _p("QFilterPress"),
    "RestoreKV": _p("RestoreKVPress"),
    "RestoreKV_plus": _p("RestoreKVPress", kvzip_plus_normalization=True),
    "snap_think": _p("ComposedPress", _SNAP, _p("ThinKPress")),
    "snapkv": _SNAP,
    "streaming_llm": _STREAM,
    "think": _p("ThinKPress"),
    "tova": _TOVA,
    "compactor": _p("CompactorPress"),
    "adakv_compactor": _p("AdaKVPress", _p("CompactorPress")),
    "cam_streaming_llm": _p("CAMPress", _STREAM),
    "cam_knorm": _p("CAMPress", _KNORM),
    "cam_adakv_snapkv": _p("CAMPress", _p("AdaKVPress", _SNAP)),
    "cam_tova": _p("CAMPress", _TOVA),
    "decoding_knorm": _p("DecodingPress", _KNORM),
    "decoding_streaming_llm": _p("DecodingPress", _STREAM),
    "decoding_tova": _p("DecodingPress", _TOVA),
    "decoding_qfilter": _p("DecodingPress", _p("QFilterPress")),
    "decoding_adakv_expected_attention_e2": _p("DecodingPress", _p("AdaKVPress", _EXPECTED)),
    "decoding_adakv_snapkv": _p("DecodingPress", _p("AdaKVPress", _SNAP)),
    "decoding_keydiff": _p("DecodingPress", _KEYDIFF),
    "merging_knorm": _p("MergingPress", _KNORM),
    "merging_snapkv": _p("MergingPress", _SNAP),
    "merging_expected_attention": _p("MergingPress", _EXPECTED),
    "merging_kvzap_mlp": _p("MergingPress", _ZAP),
    # not in kvpress's registry: the classes it exports that stand alone
    "expected_attention_plain": _p("ExpectedAttentionPress"),
    "expected_attention_stats": _p("ExpectedAttentionStatsPress"),
    "random_press": _p("RandomPress"),
    "cap": _p("CapPress"),
    "leverage": _p("LeverageScorePress"),
    "non_causal_attn": _p("NonCausalAttnPress"),
    "simlayerkv": _p("SimLayerKVPress"),
    "kvgrad": _p("KVgradPress"),
    "kvzap": _ZAP,
}
"""Method name -> press: kvpress's evaluation registry (main branch of 2025-2026), then what it leaves out."""

OURS: dict[str, str] = {"no_press": "full", "observed_attention": "h2o", "random": "random"}
"""Names of kvpress's registry that sparsekv implements itself, and its name for them."""

ALIASES: dict[str, str] = {
    "criticalkv": "critical",
    "critical_kv": "critical",
    "criticaladakv": "critical_adakv",
    "h2o": "observed_attention",
    "expected_attention": "expected_attention_plain",
    "random": "random_press",
    "restorekv": "RestoreKV",
    "leverage_score": "leverage",
}
"""Further spellings of class names inside brackets."""

_BY_NAME = {row.name: row for row in CLASSES}
_BY_CLASS = {row.cls: row for row in CLASSES}


def press_class(name: str) -> PressClass | None:
    """The class behind a name inside brackets, a class name, or an alias; None if there is none."""
    return _BY_CLASS.get(name) or _BY_NAME.get(ALIASES.get(name, name))


def wrapper_names() -> list[str]:
    """Names that take others in brackets."""
    return [row.name for row in CLASSES if row.inner]


def class_names() -> list[str]:
    """All names inside brackets."""
    return list(_BY_NAME)


def spec_route(spec: PressSpec) -> PressRoute:
    """The route of a press that is not yet built; `press_routes.classify` says the same of an instance."""
    inner = [spec_route(part) for part in spec.inner]
    if spec.cls in ("ComposedPress", "PerLayerCompressionPress") and "native" in inner:
        return "native"
    if spec.cls == "DMSPress" and spec.args.get("decoding"):
        return "native"
    return _BY_CLASS[spec.cls].route


def needs_hub(spec: PressSpec) -> bool:
    """True if the press or one inside it fetches something for the model."""
    return spec.cls in DOWNLOADS or any(needs_hub(part) for part in spec.inner)


def press_info() -> list[MethodInfo]:
    """One row per method for `sparsekv ls methods` and docs/methods.md."""
    from sparsekv.policies.method_info import MethodInfo

    plain: dict[str, str] = {}  # class name -> the method that is that class with its defaults
    for name, spec in METHODS.items():
        if not spec.args and not spec.inner:
            plain.setdefault(spec.cls, name)
    observed = _BY_CLASS["ObservedAttentionPress"]
    rows = [
        MethodInfo(
            "h2o",
            route="scores",
            idea=observed.idea,
            paper=observed.paper,
            cost=observed.cost,
            when=observed.when,
            aliases=("observed_attention", "ObservedAttentionPress"),
        )
    ]
    for name, spec in METHODS.items():
        outer = _BY_CLASS[spec.cls]
        inner = ", ".join(_BY_CLASS[part.cls].name.removesuffix("_plain") for part in spec.inner)
        rows.append(
            MethodInfo(
                name,
                route=spec_route(spec),
                idea=outer.idea + (f" (inner: {inner})" if inner else ""),
                paper=outer.paper,
                cost=outer.cost + (" (downloads for the model)" if needs_hub(spec) else ""),
                when=outer.when,
                aliases=(spec.cls,) if plain.get(spec.cls) == name else (),
            )
        )
    return rows
