"""The tokenizer of a GGUF file, built from the file's own metadata.

transformers' GGUF tokenizer is not used: for a byte-level BPE model in a llama GGUF it builds a
SentencePiece-style tokenizer that adds tokens to the vocabulary, prepends one to every text and does not
round-trip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsekv.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp's LLAMA_TOKEN_TYPE_CONTROL: tokens that mark structure, such as <|im_start|>
_CONTROL = 3
# pre-tokenizers by llama.cpp's name: split every digit off, then GPT-2's byte-level split
_DIGITS_THEN_BYTE_LEVEL = ("smollm",)


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A transformers tokenizer from the `tokenizer.*` metadata of a GGUF file.

    Args:
        metadata: key to value, as `sparsekv.models.gguf.read_metadata` returns it.

    Returns:
        A tokenizer with exactly the file's vocabulary, that adds no token of its own, splits digits,
        round-trips text, and carries the chat template, the special tokens (all control tokens) and the
        context length.

    Raises:
        ConfigError: another kind of tokenizer than byte-level BPE with digit split.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in _DIGITS_THEN_BYTE_LEVEL:
        raise ConfigError(
            f"GGUF tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} cannot be converted; "
            f"supported: 'gpt2' with {', '.join(map(repr, _DIGITS_THEN_BYTE_LEVEL))}"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    control = [
        token
        for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if token_type == _CONTROL
    ]

    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def token_of(role: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token_of("bos"),
        eos_token=token_of("eos"),
        pad_token=token_of("padding"),
        unk_token=token_of("unknown"),
        extra_special_tokens=control,
        model_max_length=int(metadata[f"{metadata['general.architecture']}.context_length"]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer
