"""The second tier of a setting: what its method evicts is kept in slower memory, and may come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsekv.cache.pages import PAGE_SIZE
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.cache.tiers import DISK
from sparsekv.config import MethodConfig


@dataclass(frozen=True)
class Tier:
    """A passive tier beside the active cache; the latter is as large as the setting's budget.

    Parameters
    ----------
    passive : "cpu" or "disk"
    recall_tokens, page_size : see `TieredCache`
    folder : of a disk tier. Only scratch, so it does not define a cell.
    """

    passive: str
    recall_tokens: int | None = None
    page_size: int = PAGE_SIZE
    folder: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, method: MethodConfig) -> Tier | None:
        """What a config asks for; None: one tier."""
        if method.passive is None:
            return None
        kind, _, folder = method.passive.partition(":")
        return cls(kind, method.recall_tokens, method.page_size or PAGE_SIZE, folder or None)

    @classmethod
    def from_definition(cls, definition: dict[str, Any] | None) -> Tier | None:
        """The inverse of `definition`."""
        return None if definition is None else cls(**definition)

    @property
    def in_memory(self) -> bool:
        """Rather than in files."""
        return self.passive != DISK.removesuffix(":")

    def definition(self) -> dict[str, Any]:
        """All that defines it, as JSON."""
        return {"passive": self.passive, "recall_tokens": self.recall_tokens, "page_size": self.page_size}

    def empty_cache(self, model: Any, active: int) -> TieredCache:
        """A cache whose active tier holds `active` >= 1 entries per kv head, on average; `close` it after use.

        Raises
        ------
        ConfigError
            If the folder can't be used.
        """
        place = self.passive if self.folder is None else f"{DISK}{self.folder}"
        return TieredCache(model, active, place, recall_tokens=self.recall_tokens, page_size=self.page_size)


def tier_options(passive: str | None, recall_tokens: int | None, page_size: int | None) -> dict[str, Any]:
    """What a reader must be told of a second tier: nothing of defaults, and nothing where there is none."""
    shown = {
        "passive": passive,
        "recall_tokens": recall_tokens,
        "page_size": None if page_size == PAGE_SIZE else page_size,
    }
    return {key: value for key, value in shown.items() if value is not None}


def passive_bytes(cache: SparseCache) -> int:
    """Bytes of a cache's passive tier, page summaries included; 0 where there is none."""
    return cache.passive_nbytes if isinstance(cache, TieredCache) else 0
