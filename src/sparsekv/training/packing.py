"""Documents cut into sequences of a length, none of which holds parts of two documents.

A document longer than a sequence becomes several. The last of them would be short, so it starts earlier and
ends with the document: it overlaps the one before, and what both hold is only context there, without labels.
So every sequence of a long document is full, and every token is predicted exactly once.

    document  a b c d e f g h i j      seq_len 4
    sequences a b c d   d e f g   g h i j        labelled: (b c d) (e f g) (h i j)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Columns [start, stop) of a document; labels from column `labelled` on (0 is never predicted)."""

    start: int
    stop: int
    labelled: int


def pieces(n_tokens: int, seq_len: int) -> list[Piece]:
    """How a document of `n_tokens` is cut.

    Neighbouring sequences share at least one token, so that the first labelled token of each has something
    to be predicted from.

    Parameters
    ----------
    n_tokens : tokens of the document
    seq_len : most tokens of a sequence, at least 2

    Returns
    -------
    list of Piece, in order; empty for documents of fewer than 2 tokens.
    """
    if n_tokens < 2:
        return []
    found = [Piece(0, min(seq_len, n_tokens), 1)]
    while found[-1].stop < n_tokens:
        done = found[-1].stop
        stop = min(done - 1 + seq_len, n_tokens)
        found.append(Piece(stop - seq_len, stop, done))
    return found
