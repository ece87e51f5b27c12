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
        1 - stored / full entries over compressible layers (stored in the active tier), once the context was compacted
        (at the end of the answer for methods that evict while decoding).
    cache_bytes, full_cache_bytes : int
        At the same moment: what is allocated (all layers, both tiers, metadata included), and what a plain cache
        would take.
    perplexity : float, optional
        Of the reference, in perplexity.
    attended_fraction : float
        Stored entries, of both tiers, that the answer's last decoding step attended to, as a fraction; 1.0 unless
        steps choose.
    passive_bytes : int
        The part of `cache_bytes` that lies in a second tier.
    """

    prediction: str
    finish_reason: str
    achieved_compression: float
    cache_bytes: int
    full_cache_bytes: int
    perplexity: float | None = None
    attended_fraction: float = 1.0
    passive_bytes: int = 0
