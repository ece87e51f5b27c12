"""Self-supervised samples from any text: a context, a question eviction knew nothing of, and its answer.

No model and no labelled data is needed, and no benchmark's wording, keys or values occur. Sample i depends on
the seed, i and the texts alone. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsekv.benchmarks.base import row_rng
from sparsekv.errors import ConfigError
from sparsekv.training.data_layout import Layout, Sample
from sparsekv.training.data_spec import FAMILIES, LEAST_CONTEXT, DataConfig
from sparsekv.training.selfsup_chains import chain
from sparsekv.training.selfsup_details import detail
from sparsekv.training.selfsup_draw import Draw, Made
from sparsekv.training.selfsup_facts import recall, several, values
from sparsekv.training.selfsup_lists import common, duplicates, records
from sparsekv.training.selfsup_passages import cloze, continue_passage, name, onward, repeat_span
from sparsekv.training.selfsup_text import Corpus

Family = Callable[[Draw], Made | None]
"""Makes a context and its questions; None if the room or the text does not allow it."""

MAKERS: dict[str, Family] = {
    "onward": onward,
    "continue": continue_passage,
    "repeat": repeat_span,
    "recall": recall,
    "several": several,
    "values": values,
    "chain": chain,
    "records": records,
    "common": common,
    "duplicates": duplicates,
    "cloze": cloze,
    "name": name,
    "detail": detail,
}
"""The families that `data_spec.FAMILIES` weighs."""

_TRIES = 40


class SelfSupervision:
    """Samples by number: a context with questions, or a text that goes on.

    Parameters
    ----------
    corpus : the texts, tokenised
    layout : how samples are tokenised
    context_tokens, min_context_tokens : tokens of a context, about, the template's included; drawn evenly
        from the range
    families : weights by name
    questions : questions per context
    seed : of everything that is drawn
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: Layout,
        context_tokens: int,
        *,
        min_context_tokens: int | None = None,
        families: Mapping[str, float] = FAMILIES,
        questions: int = 1,
        seed: int = 0,
    ) -> None:
        self.corpus, self.layout, self.seed = corpus, layout, seed
        self.questions = questions
        head = len(layout.ids(layout.head))
        least = context_tokens if min_context_tokens is None else min_context_tokens
        if least - head < LEAST_CONTEXT // 2:
            raise ConfigError(
                f"context_tokens: {least} are too few: the chat template alone takes {head}, and the text "
                f"needs at least {LEAST_CONTEXT // 2}"
            )
        self._rooms = least - head, context_tokens - head
        self._names = list(families)
        self._weights = list(families.values())

    def made(self, index: int) -> tuple[str, Made]:
        """The family of sample `index` and what it made, before it is laid out.

        Raises
        ------
        ConfigError
            If no family can make anything of the texts in the room there is.
        """
        rng = row_rng(self.seed, "selfsup", index)
        room = rng.randint(*self._rooms)
        for _ in range(_TRIES):
            family = rng.choices(self._names, weights=self._weights)[0]
            made = MAKERS[family](Draw(rng, self.corpus, self.layout, room, self.questions))
            if made is not None:
                return family, made
        raise ConfigError(
            f"context_tokens: a context with room for {room} tokens of this text allows no question of the "
            f"families {', '.join(self._names)}; give more tokens or other families"
        )

    def sample(self, index: int) -> Sample:
        """Sample `index`, any number from 0."""
        _, made = self.made(index)
        if made.onward is not None:
            (ids,) = made.pieces
            return self.layout.text_sample(list(ids), made.onward, index)  # type: ignore[arg-type]
        return self.layout.sample(self.layout.context(made.pieces), made.turns, index)


def from_config(texts: Sequence[str], layout: Layout, config: DataConfig, seed: int) -> SelfSupervision:
    """The generator that a configuration of kind "selfsup" describes, over these texts."""
    return SelfSupervision(
        Corpus(texts, layout.tokenizer),
        layout,
        config.context_tokens,
        min_context_tokens=config.min_context_tokens,
        families=config.family_weights(),
        questions=config.questions,
        seed=seed,
    )
