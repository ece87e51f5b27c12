"""Where a prompt's context ends and its question begins, exactly as kvpress's pipeline splits it.

The chat template is rendered around the context with a separator after it and split there: what stands
before belongs to the context, what stands after follows the question. Both parts are tokenised separately,
because the context is read before anyone knows the question. Evaluation and training share this, so that
what is trained is what is served. Knows no model and no torch.
"""

from __future__ import annotations

from typing import Any

from sparsekv.errors import ConfigError


def split_template(tokenizer: Any, content: str) -> tuple[str, str]:
    """The text before and after the end of a user message with `content`: (template + content, rest of the
    template).

    Without a chat template: the bos token and the content, and a line break (kvpress's rule). Thinking is
    off in templates that know it.

    Raises
    ------
    ConfigError
        If the template leaves the user's message out.
    """
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + content, "\n"
    separator = "#" * (len(content) + 10)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content + separator}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    before, found, after = text.partition(separator)
    if not found:
        raise ConfigError("the tokenizer's chat template does not contain the user's message")
    return before, after


def next_turn(tokenizer: Any) -> str:
    """The text between the end of an answer and the user's next message, as the chat template writes it.

    Without a chat template: two line breaks.
    """
    if tokenizer.chat_template is None:
        return "\n\n"
    answer, question = "#" * 12, "~" * 12  # letters might be part of a template
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    between = text.rpartition(answer)[2].partition(question)[0]
    return str(between)
