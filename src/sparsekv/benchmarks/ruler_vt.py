"""Variable tracking: RULER's vt task (arXiv 2404.06654, section 3.2;
scripts/data/synthetic/variable_tracking.py).

As in RULER, one worked example (shorter names, up to 500 tokens) stands before the question proper. Below
1000 tokens of context it takes at most half of them, where RULER would find no fit at all.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from sparsekv.benchmarks.base import row_rng
from sparsekv.benchmarks.fit import Draft, Prompt, Spans, TooShort, largest_fit, weave
from sparsekv.benchmarks.haystack import NOISE
from sparsekv.benchmarks.ruler_task import Row, Sources

INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above. "
ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{n} variables are assigned the value {value}, they are: "
)
SHOT_TOKENS = 500
"""RULER's max_seq_length of the worked example."""


@dataclass(frozen=True)
class VariableTracking:
    """One chain of `n_hops` copies of a variable, hidden in noise.

    Attributes:
        n_hops: copies; the answer is n_hops + 1 names.
    """

    n_hops: int = 4
    max_new_tokens: int = 30
    metric: str = "string_match_all"

    def draft(self, row: Row) -> Draft:
        """A unit of filler is one unit of noise."""
        rng = row.rng("names")
        taken: set[str] = {"VAR"}
        shot_names = _names(self.n_hops + 1, 3, rng, taken)
        shot_value = str(rng.randint(10000, 99998))
        names = _names(self.n_hops + 1, 5, rng, taken)
        value = str(rng.randint(10000, 99998))
        sources = row.sources
        cap = min(SHOT_TOKENS, row.context_length // 2)
        n_shot = sources.memo(("vt", cap), lambda: _shot_units(sources, cap, self.n_hops))
        # The example's lines lie in the same places in every row; only names and value change, as in RULER.
        shot = _prompt("", shot_names, shot_value, n_shot, row_rng(sources.seed, "vt", "shot layout"))
        lead = f"{shot.context}{shot.question}{shot.answer_prefix} {' '.join(shot_names)}\n\n"

        def build(n: int) -> Prompt:
            return _prompt(lead, names, value, n, row.rng("layout"))

        return Draft(build, least=1, tokens_per_unit=25.0)


def _shot_units(sources: Sources, cap: int, n_hops: int) -> int:
    """Units of noise in the worked example: as many as fit into `cap` tokens, at least one."""
    names = _names(n_hops + 1, 3, row_rng(sources.seed, "vt", "shot names"), {"VAR"})

    def build(n: int) -> Prompt:
        return _prompt("", names, "12345", n, row_rng(sources.seed, "vt", "shot layout"))

    try:
        return largest_fit(Draft(build, least=1, tokens_per_unit=25.0), sources.count, cap)[0]
    except TooShort:
        return 1


def _names(n: int, length: int, rng: random.Random, taken: set[str]) -> list[str]:
    """`n` new names of `length` capital letters."""
    names: list[str] = []
    while len(names) < n:
        name = "".join(rng.choices(string.ascii_uppercase, k=length))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _prompt(lead: str, names: list[str], value: str, n: int, layout: random.Random) -> Prompt:
    """`n` units of noise with the chain's lines between them, in order."""
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
    # RULER draws distinct places and cannot do with less noise than lines; very short prompts share places.
    draw = layout.sample if n >= len(chain) else layout.choices
    positions = sorted(draw(range(n), k=len(chain)))
    pieces = [(NOISE, False) for _ in range(n)]
    for line, position in reversed(list(zip(chain, positions, strict=True))):
        pieces.insert(position, (line, True))
    start = len(lead) + len(INTRO)
    text, spans = weave(pieces, "\n", start)
    evidence: Spans = tuple((a, b - (text[b - start - 1] == " ")) for a, b in spans)
    context = f"{lead}{INTRO}{text}\n"
    question, answer = QUESTION.format(value=value), ANSWER.format(n=len(names), value=value)
    return Prompt(context, question, answer, tuple(names), evidence)
