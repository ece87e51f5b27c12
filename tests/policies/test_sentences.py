"""Sentence dropout: where sentences end in several scripts, code and lists, and that whole ones leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenContext, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.sentences import SentenceDropout, sentence_starts, text_ends
from sparsekv.policies.vocabulary import vocabulary_of
from toy import toy_tokenizer

TOKENIZER = toy_tokenizer()


def ids_of(text: str, tokenizer: Any = TOKENIZER) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def row(text: str, seed: int = 0, layers: int = 1, heads: int = 1) -> TokenRow:
    ids = ids_of(text)
    mask = torch.ones_like(ids).bool()
    return TokenContext(ids, mask, layers, heads, tokenizer=TOKENIZER, seeds=(seed,)).rows()[0]


def sentences(text: str) -> list[str]:
    one = row(text)
    starts = SentenceDropout().starts(one)
    return [TOKENIZER.decode(one.ids[a:b]) for a, b in zip(starts, [*starts[1:], one.n], strict=True)]


@pytest.mark.parametrize(
    "expected",
    [
        ["It rained.", " We stayed in!", " (Did you?)", " Yes… no."],
        ['"Stop!" he said.', ' She said "Go."', " Then e.g. this, approx. that."],
        ["J. R. Smith of the U.S. paid 3.14 for v2.0 at example.com.", " Cheap?!", " No."],
        ["你好。", "“他说！”", "然后？", "3.5元!", "再见。", "【完。】", "末尾"],
        ["今日は。", "「行く？」", "はい。"],
        ["مرحبا بك؟", " نعم.", " كيف الحال؟", "جيد۔", " شكرا"],
        ["यह राम है।", " वह गया॥", " ठीक है?\n", "हाँ।"],
        ["ሰላም።", " ደህና።"],
        ["Bună ziua.", " Ce faci?\n\n", "¿Qué tal?", " Bien."],
    ],
)
def test_prose_in_several_scripts(expected: list[str]) -> None:
    assert sentences("".join(expected)) == expected


def test_code_is_cut_at_lines_and_indentation_goes_with_what_it_indents() -> None:
    lines = [
        "def f(x):\n",
        "    return x.y + 1.5  # a. b\n\n\n",
        "class A:\r\n",
        "\tpass; go(1)\n",
        "print(', '.join(s), a[0].b)",
    ]
    assert sentences("".join(lines)) == lines


def test_lists() -> None:
    items = [
        "Buy:\n",
        "- milk. Or not\n",
        "- eggs\n",
        "1. Item one\n",
        "23. Item two.\n",
        "  a. sub\n",
        "• last\n\n",
        "Done.",
    ]
    expected = [items[0], "- milk.", " Or not\n", *items[2:]]
    assert sentences("".join(items)) == expected
    assert sentences("In 1999. Then 12. May.") == ["In 1999.", " Then 12.", " May."]


def test_special_tokens_stand_apart() -> None:
    assert sentences("<|start|>user\nHi.<|end|>\nHo") == ["<|start|>", "user\n", "Hi.", "<|end|>", "\n", "Ho"]
    assert sentences("no end<|end|>Next") == ["no end", "<|end|>", "Next"]


def test_places_in_a_text_by_hand() -> None:
    assert text_ends("a b. C\n\nd") == [8]  # "b." is a single letter and a full stop
    assert text_ends("ab ab. C\n \nd ") == [6, 11]
    assert text_ends("no end") == [] and text_ends("") == [] and text_ends("end.") == []


# ---- tokens ----


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (["It", " rained", ".", " We", " left"], [0, 3]),
        (["It", " rained", ".\n", "We"], [0, 3]),
        (["Wow", '."', " He"], [0, 2]),
        (["on", ". Off", " we", " go"], [0, 2]),  # a token is never split: its end goes with what ends
        (["x", "\n    ", "y", "\n\n", "    ", "z"], [0, 2, 4]),  # white space that holds the break, too
        (["x", "\ny", "\nz"], [0, 1, 2]),
        (
            ["好", "", "", "。", "", "", "好"],
            [0, 4],
        ),  # pieces of a character are empty, the last one holds it
        (["a"], [0]),
    ],
)
def test_starts_by_hand(tokens: list[str], starts: list[int]) -> None:
    assert sentence_starts(tokens, [False] * len(tokens)) == starts


def test_texts_of_tokens_join_to_the_text() -> None:
    for text in ("Hé, 中。「ok」 ¿si?\n a", "<|start|>x<|end|>", "", "😀 e\u0301"):
        ids = ids_of(text)[0].long()
        texts = vocabulary_of(TOKENIZER).texts(ids, TOKENIZER)
        assert "".join(texts) == text and len(texts) == len(ids)
    pieces = vocabulary_of(TOKENIZER).texts(ids_of("中a")[0], TOKENIZER)
    assert pieces == ["", "", "中", "a"]
    broken = vocabulary_of(TOKENIZER).texts(ids_of("中a")[0][1:], TOKENIZER)
    assert broken == ["\ufffd", "\ufffd", "a"]


def test_spaces_that_a_decoder_strips_come_back() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁go": 1, "▁He": 2, ".": 3, "▁": 4}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # as Llama-2's does
    )
    stripping = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    ids = torch.tensor([1, 3, 2, 1, 3, 4])
    assert stripping.decode([2]) == "He"
    assert vocabulary_of(stripping).texts(ids, stripping) == [" go", ".", " He", " go", ".", " "]
    context = TokenContext(ids[None], torch.ones(1, 6).bool(), tokenizer=stripping)
    assert SentenceDropout().starts(context.rows()[0]) == [0, 2, 5]


# ---- the policy ----

STORY = "One fish. Two fish? Red fish! Blue fish. Old. New. End it."


def test_whole_sentences_leave() -> None:
    spans = [(0, 9), (9, 19), (19, 29), (29, 40), (40, 45), (45, 50), (50, 58)]
    seen = set()
    for seed in range(20):
        kept = SentenceDropout(n_sink=0, n_recent=0).keep_row(row(STORY, seed), Budget(tokens=38))[0, 0]
        assert int(kept.sum()) == 38
        cut = 0
        for first, end in spans:
            part = kept[first:end].tolist()
            cut += any(part) and not all(part)
            assert part == sorted(part, reverse=True), "of a sentence cut by the budget the beginning stays"
        assert cut <= 1
        seen.add(tuple(kept.tolist()))
    assert len(seen) > 10


def test_text_without_ends_is_cut_by_length() -> None:
    kept = SentenceDropout(n_sink=2, n_recent=0, max_tokens=10).keep_row(row("x" * 52), Budget(tokens=32))[
        0, 0
    ]
    blocks = kept[2:].view(5, 10)
    assert int(kept.sum()) == 32 and kept[:2].all()
    assert sorted(blocks.sum(1).tolist()) == [0, 0, 10, 10, 10]


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("ab.。!? \nA1।", min_size=1, max_size=80),
    ratio=st.floats(0, 0.95),
    n_sink=st.integers(0, 4),
    n_recent=st.none() | st.integers(0, 6),
    limit=st.integers(1, 20),
    share=st.sampled_from(["all", "layer", "head"]),
)
def test_counts_are_exact_and_the_ends_stay(
    text: str, ratio: float, n_sink: int, n_recent: int | None, limit: int, share: Any
) -> None:
    one = row(text, layers=2, heads=2)
    policy = SentenceDropout(n_sink, n_recent, limit, share=share)
    total = max(1, int(one.n * (1 - ratio)))
    if total < min(one.n, n_sink + (n_recent or 0)):
        with pytest.raises(ConfigError, match="is under n_sink="):
            policy.keep_row(one, Budget(ratio))
        return
    kept = policy.keep_row(one, Budget(ratio))
    assert (kept.sum(-1) == total).all()
    assert kept[..., :n_sink].all() and kept[..., one.n - (n_recent or 0) :].all()


def test_mistakes() -> None:
    ids = torch.ones(1, 9, dtype=torch.long)
    bare = TokenContext(ids, torch.ones(1, 9).bool()).rows()[0]
    with pytest.raises(ConfigError, match=r"sentence_dropout needs a tokenizer to find sentences"):
        SentenceDropout(0, 0).keep_row(bare, Budget(0.5))
    with pytest.raises(ConfigError, match="max_tokens must be a whole number >= 1, got 0"):
        SentenceDropout(max_tokens=0)
    assert SentenceDropout().reads_text
