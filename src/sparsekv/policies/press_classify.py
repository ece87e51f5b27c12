"""Which route does a press take? Decided from the instance, by the same rules for kvpress's presses and a
user's own."""

from __future__ import annotations

from kvpress import (
    AdaKVPress,
    BasePress,
    CapPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    DMSPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    FastKVzipPress,
    FinchPress,
    KeyDiffPress,
    KnormPress,
    KVComposePress,
    KVzapPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    LUKVPress,
    MergingPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    QFilterPress,
    RandomPress,
    RestoreKVPress,
    ScorerPress,
    SnapKVPress,
    ThinKPress,
    TOVAPress,
)

from sparsekv.policies.press_copies import fresh, nested, own_ratio
from sparsekv.policies.press_model import PressModel, PressNative
from sparsekv.policies.press_routes import PressLayer, PressMasked, PressScores


def works_while_decoding(press: BasePress) -> bool:
    """True for presses that evict while decoding."""
    if isinstance(press, DMSPress):
        return bool(press.decoding)
    return isinstance(press, (DecodingPress, PrefillDecodingPress))


def is_plain_scorer(press: BasePress) -> bool:
    """True if the press is nothing but scores and kvpress's top-k of them."""
    kind = type(press)
    return isinstance(press, ScorerPress) and (
        kind.compress is ScorerPress.compress
        and kind.forward_hook is BasePress.forward_hook
        and kind.__call__ is BasePress.__call__
    )


def hides_by_mask(press: BasePress) -> bool:
    """True for presses that write `masked_key_indices` inside a layer."""
    return isinstance(press, (AdaKVPress, CriticalAdaKVPress, LUKVPress, DMSPress))


_NATIVE = (ThinKPress, MergingPress, FinchPress, RestoreKVPress)
_IN_MODEL = (KVzipPress, KVComposePress, FastKVzipPress, DuoAttentionPress)
_HOOKED_IN_LAYER = (DMSPress, PerLayerCompressionPress, ComposedPress)

_RATIO_FREE = (
    SnapKVPress,
    TOVAPress,
    KnormPress,
    KeyDiffPress,
    ExpectedAttentionPress,
    ExpectedAttentionStatsPress,
    LagKVPress,
    CURPress,
    CapPress,
    LeverageScorePress,
    NonCausalAttnPress,
    QFilterPress,
    KVzapPress,
    RandomPress,
)


def scores_ignore_ratio(press: BasePress) -> bool:
    """True if the scores are known not to depend on the compression ratio (unknown classes: False)."""
    if isinstance(press, CompactorPress):
        return type(press) is CompactorPress and press.blending is not None
    if isinstance(press, CriticalKVPress):
        return (
            type(press) is CriticalKVPress
            and press.first_stage_ratio == 0
            and scores_ignore_ratio(press.press)
        )
    return type(press) in _RATIO_FREE or getattr(press, "ratio_free", False) is True


def classify(
    press: BasePress, *, forced_scorer: bool = False
) -> type[PressScores] | type[PressLayer] | type[PressModel] | type[PressNative]:
    """The route of a press instance.

    Parameters
    ----------
    press : kvpress press
    forced_scorer : bool
        It is inside a key_rerotation, which uses only its scores.
    """
    kind = type(press)
    if forced_scorer and isinstance(press, ScorerPress):
        return PressLayer if own_ratio(press) else PressScores
    if isinstance(press, _NATIVE) or works_while_decoding(press):
        return PressNative
    if isinstance(press, _IN_MODEL):
        return PressModel
    if isinstance(press, ComposedPress):
        parts = [classify(part) for part in press.presses]
        return PressLayer if all(p in (PressScores, PressLayer) for p in parts) else PressNative
    if is_plain_scorer(press):
        return PressLayer if own_ratio(press) else PressScores
    if hides_by_mask(press):
        return PressMasked
    own_hook = kind.forward_hook is not BasePress.forward_hook and not isinstance(press, _HOOKED_IN_LAYER)
    if own_hook or kind.__call__ is not BasePress.__call__:
        return PressNative
    return PressLayer


def without_eager(press: BasePress, blockwise: type[ScorerPress]) -> BasePress:
    """The press with every ObservedAttentionPress in it replaced by one that needs no eager attention."""
    twin = fresh(press)
    for part in nested(twin):
        for name, value in list(vars(part).items()):
            if type(value) is ObservedAttentionPress:
                setattr(part, name, blockwise(value.compression_ratio))
            elif isinstance(value, list):
                vars(part)[name] = [
                    blockwise(p.compression_ratio) if type(p) is ObservedAttentionPress else p for p in value
                ]
    return blockwise(twin.compression_ratio) if type(twin) is ObservedAttentionPress else twin
