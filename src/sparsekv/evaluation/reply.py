"""What one method gave for one example: the answer, why it ended, and what its cache held."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """One method's answer to one prompt.

    Parameters
    ----------
    prediction : str
        "" in perplexity.
    finish_reason : "eos", "length", or "scored" (perplexity: nothing is generated)
    achieved_compression : float
        1 - stored / full entries over compressible layers, once the context was compacted (at the end of the
        answer for methods that evict while decoding).
    cache_bytes, full_cache_bytes : int
        At the same moment: what is allocated (all layers, metadata included), and what a plain cache would
        take.
    perplexity : float, optional
        Of the reference, in perplexity.
    attended_fraction : float
        Stored entries that the answer's last decoding step attended to, as a fraction; 1.0 unless steps choose.
    """

    prediction: str
    finish_reason: str
    achieved_compression: float
    cache_bytes: int
    full_cache_bytes: int
    perplexity: float | None = None
    attended_fraction: float = 1.0
