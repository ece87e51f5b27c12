"""Anchors in several scripts and two kinds of tokenizer, and the order in which a budget cuts them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.anchors import AnchorConfig, Anchors, AnchorSelector, build_kv_mask_from_anchors
from sparsekv.policies.base import TokenContext, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.vocabulary import is_punctuation, vocabulary_of
from toy import toy_tokenizer

TEXT_ONLY = AnchorConfig(use_sink=False, use_recent=False)
PUNCTUATION_ONLY = AnchorConfig(use_special=False, use_sink=False, use_recent=False)


def ids_of(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def anchored(tokenizer: Any, text: str, config: AnchorConfig = TEXT_ONLY) -> str:
    ids = ids_of(tokenizer, text)
    mask = build_kv_mask_from_anchors(ids, tokenizer, config)
    return tokenizer.decode(ids[0][mask[0]])


def word_tokenizer() -> Any:
    """Whole words and marks: "▁" for a leading space, bytes in the form <0x0A> for what is missing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "b", ",", ".", "▁,", "▁...", "##", "+"]
    vocab = {w: i for i, w in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", ",")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken("<|turn|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


# ---- what punctuation is ----


@pytest.mark.parametrize(
    "text", [".", " ,", "...", "。", "、", "！", "？", "「", "」", "؟", "।", "¿", "—", '"', "\n.\n", "_"]
)
def test_punctuation_in_any_script(text: str) -> None:
    assert is_punctuation(text)


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "a.", "+", "$", "<", "1", "·a", "😀", "\u0301"])
def test_not_punctuation(text: str) -> None:
    assert not is_punctuation(text)


def test_extra_strings() -> None:
    assert is_punctuation("\n", ("\n",)) and is_punctuation("\n\n", ("\n",)) and is_punctuation("+.", ("+",))
    assert is_punctuation(" and", ("and",))
    assert not is_punctuation("band", ("and",)) and not is_punctuation("\t", ("\n",))


# ---- tokenizers ----


def test_marks_split_into_bytes_are_found_whole() -> None:
    tokenizer = toy_tokenizer()  # one token per byte: 。 is three of them, ¿ two
    assert anchored(tokenizer, "Hé, 中。「ok」 ¿si? ।a+b\n") == ",。「」¿?।"
    ids = ids_of(tokenizer, "中。a")
    mask = build_kv_mask_from_anchors(ids, tokenizer, TEXT_ONLY)
    assert mask[0].tolist() == [False] * 3 + [True] * 3 + [False]


def test_broken_bytes_are_no_punctuation() -> None:
    tokenizer = toy_tokenizer()
    ids = ids_of(tokenizer, "。.。")[:, 1:-1]  # 80 82 . E3 80: no whole character but the full stop
    mask = build_kv_mask_from_anchors(ids, tokenizer, TEXT_ONLY)
    assert mask[0].tolist() == [False, False, True, False, False]


def test_a_split_mark_after_broken_bytes_is_still_found() -> None:
    tokenizer = toy_tokenizer()
    ids = torch.cat([ids_of(tokenizer, "中")[:, :2], ids_of(tokenizer, "。")], dim=1)
    mask = build_kv_mask_from_anchors(ids, tokenizer, TEXT_ONLY)
    assert mask[0].tolist() == [False, False, True, True, True]


def test_byte_fallback_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = ids_of(tokenizer, "a , b。+.")
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    assert tokens == ["a", "▁,", "▁", "b", "<0xE3>", "<0x80>", "<0x82>", "+", "."]
    mask = build_kv_mask_from_anchors(ids, tokenizer, TEXT_ONLY)
    assert mask[0].tolist() == [False, True, False, False, True, True, True, False, True]
    plus = AnchorConfig(use_sink=False, use_recent=False, extra_punctuation=("+",))
    assert build_kv_mask_from_anchors(ids, tokenizer, plus)[0].tolist()[7]


def test_special_tokens_are_their_own_kind() -> None:
    tokenizer = toy_tokenizer()
    ids = ids_of(tokenizer, "<|start|>a.<|end|>")
    assert ids[0].tolist()[0] == 1 and ids[0].tolist()[-1] == 0
    assert AnchorSelector(TEXT_ONLY, tokenizer).select(ids)[0].tolist() == [True, False, True, True]
    assert AnchorSelector(PUNCTUATION_ONLY, tokenizer).select(ids)[0].tolist() == [False, False, True, False]
    added = word_tokenizer()  # special without being bos, eos or pad
    assert build_kv_mask_from_anchors(ids_of(added, "a<|turn|>b"), added, TEXT_ONLY)[0].tolist() == [
        False,
        True,
        False,
    ]


def test_newlines_only_if_asked() -> None:
    tokenizer = toy_tokenizer()
    assert anchored(tokenizer, "a.\nb\n") == "."
    with_newlines = AnchorConfig(use_sink=False, use_recent=False, extra_punctuation=("\n",))
    assert anchored(tokenizer, "a.\nb\n", with_newlines) == ".\n\n"


def test_ids_beyond_the_vocabulary() -> None:
    ids = torch.tensor([[300, 3, 303]])  # the model's embedding is padded; such ids spell nothing
    assert AnchorSelector(PUNCTUATION_ONLY, toy_tokenizer()).select(ids)[0].tolist() == [
        False,
        True,
        False,
    ]  # 3 is "!"


def test_the_table_is_made_once_and_dies_with_the_tokenizer() -> None:
    tokenizer = toy_tokenizer()
    table = vocabulary_of(tokenizer)
    assert vocabulary_of(tokenizer) is table
    assert vocabulary_of(tokenizer, ("+",)) is not table
    assert vocabulary_of(toy_tokenizer()) is not table
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    new = ids_of(tokenizer, "<|new|>")
    assert new.shape == (1, 1) and bool(AnchorSelector(TEXT_ONLY, tokenizer).select(new)[0, 0])
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


# ---- select ----


def test_sinks_and_recent_count_without_padding() -> None:
    config = AnchorConfig(use_special=False, use_punctuation=False, sink_size=2, recent_size=1)
    ids, mask = torch.full((2, 6), 70), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    kept = AnchorSelector(config).select(ids, mask)
    assert kept.int().tolist() == [[0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0]]
    assert AnchorSelector(config).select(ids).int().tolist() == [[1, 1, 0, 0, 0, 1]] * 2


def test_switched_off_sizes_do_not_count() -> None:
    config = AnchorConfig(use_special=False, use_punctuation=False, use_sink=False, use_recent=False)
    assert not bool(AnchorSelector(config).select(torch.full((1, 9), 70)).any())


# ---- the policy under a budget ----

TEXT = "<|start|>ab.cd,<|end|>ef!gh"  # columns:  S a b . c d , E e f ! g h


def row(text: str = TEXT, tokenizer: Any = None, seed: int = 0) -> TokenRow:
    tokenizer = tokenizer or toy_tokenizer()
    ids = ids_of(tokenizer, text)
    return TokenContext(ids, torch.ones_like(ids).bool(), tokenizer=tokenizer, seeds=(seed,)).rows()[0]


def kept(policy: Anchors, budget: Budget | None = None, **kwargs: Any) -> list[int]:
    return policy.keep_row(row(**kwargs), budget or Budget())[0, 0].nonzero().flatten().tolist()


SMALL = AnchorConfig(sink_size=2, recent_size=1)


def test_without_a_budget_the_anchors_and_nothing_else() -> None:
    assert kept(Anchors(SMALL)) == [0, 1, 3, 6, 7, 10, 12]


def test_anchors_over_budget_go_in_their_order() -> None:
    # sinks 0 1; recent 12; special 7 (0 is a sink already); punctuation 10, 6, 3, the latest first
    by_budget = {n: kept(Anchors(SMALL), Budget(tokens=n)) for n in range(2, 8)}
    assert by_budget == {
        2: [0, 1],
        3: [0, 1, 12],
        4: [0, 1, 7, 12],
        5: [0, 1, 7, 10, 12],
        6: [0, 1, 6, 7, 10, 12],
        7: [0, 1, 3, 6, 7, 10, 12],
    }
    wide = AnchorConfig(sink_size=1, recent_size=6)
    assert kept(Anchors(wide), Budget(tokens=4)) == [0, 10, 11, 12]


def test_the_rest_is_filled_in_the_named_order() -> None:
    # no anchors: 2 4 5 8 9 11
    assert kept(Anchors(SMALL, "recent"), Budget(tokens=9)) == [0, 1, 3, 6, 7, 9, 10, 11, 12]
    assert kept(Anchors(SMALL, "uniform"), Budget(tokens=9)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    random = kept(Anchors(SMALL, "random"), Budget(tokens=9))
    assert len(random) == 9 and set(random) > {0, 1, 3, 6, 7, 10, 12}
    assert random == kept(Anchors(SMALL, "random"), Budget(tokens=9))
    draws = {tuple(kept(Anchors(SMALL, "random", seed=s), Budget(tokens=9))) for s in range(12)}
    draws |= {tuple(kept(Anchors(SMALL, "random"), Budget(tokens=9), seed=s)) for s in range(12)}
    assert len(draws) > 6  # of the 15 pairs


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab.,。 é", min_size=1, max_size=60),
    ratio=st.floats(0, 0.95),
    fill=st.sampled_from(["recent", "uniform", "random"]),
    special=st.booleans(),
)
def test_budget_exact_and_anchors_first(text: str, ratio: float, fill: Any, special: bool) -> None:
    policy = Anchors(AnchorConfig(use_special=special, sink_size=1, recent_size=3), fill)
    tokenizer = toy_tokenizer()
    one = row(text, tokenizer)
    total = max(1, int(one.n * (1 - ratio)))
    chosen = policy.keep_row(one, Budget(compression_ratio=ratio))[0, 0]
    anchors = policy.keep_row(one, Budget())[0, 0]
    assert int(chosen.sum()) == total and bool(chosen[0])
    if int(anchors.sum()) <= total:
        assert bool(chosen[anchors].all())
    else:
        assert bool(anchors[chosen].all())


def test_mistakes() -> None:
    bare = TokenContext(torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9).bool()).rows()[0]
    with pytest.raises(ConfigError, match=r"pass tokenizer=.*use_special=False and use_punctuation=False"):
        Anchors().keep_row(bare, Budget(tokens=5))
    with pytest.raises(ConfigError, match=r"budget of 3 entries .* is under sink_size=4"):
        Anchors().keep_row(row(), Budget(tokens=3))
    with pytest.raises(ConfigError, match=r"unknown fill 'recnt' .did you mean 'recent'"):
        Anchors(fill="recnt")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recent_size must be a whole number >= 0, got -3"):
        AnchorConfig(recent_size=-3)
    for switch in ("use_special", "use_punctuation", "use_sink", "use_recent"):
        with pytest.raises(ConfigError, match=f"anchors: {switch} must be true or false, got 'no'"):
            AnchorConfig(**{switch: "no"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use_sink must be true or false, got 0"):
        make_policy("dynamic_anchors", use_sink=0)
    with pytest.raises(ConfigError, match=r"extra_punctuation must be a list of non-empty strings, got '.!'"):
        AnchorConfig(extra_punctuation=".!")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"attention_mask must have the shape of input_ids \(1, 4\), got \(1, 3\)"
    ):
        AnchorSelector(SMALL, toy_tokenizer()).select(torch.ones(1, 4).long(), torch.ones(1, 3))
    with pytest.raises(ConfigError, match=r"\[batch, tokens\]"):
        AnchorSelector(SMALL, toy_tokenizer()).select(torch.ones(4).long())
    assert AnchorConfig(extra_punctuation=["+"]).extra_punctuation == ("+",)  # type: ignore[arg-type]
