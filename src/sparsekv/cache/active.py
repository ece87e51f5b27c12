"""How much the active tier may hold: tokens per kv head, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsekv.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ALLOWED = 'a whole number >= 1 (tokens per kv head) or a size like "64MiB"'
_COLUMN_BYTES = 4


@dataclass(frozen=True)
class ActiveSize:
    """The size of the active tier; one of the two is given.

    Parameters
    ----------
    tokens : int >= 1, optional
        Entries per kv head and row: a mean over the layers and heads of a row, which may differ.
    n_bytes : int >= 1, optional
        For keys, values and columns of all compressible layers, heads and rows together.
    """

    tokens: int | None = None
    n_bytes: int | None = None

    @classmethod
    def parse(cls, active: int | str) -> ActiveSize:
        """From what people write: 512, "512", "64MiB", "1.5 GB".

        Raises
        ------
        ConfigError
            For anything else, and for zero.
        """
        if isinstance(active, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", active)
            units = {name.lower(): size for name, size in _UNITS.items()}
            if match and match[2] and match[2].lower() in units:
                n_bytes = int(float(match[1]) * units[match[2].lower()])
                if n_bytes >= 1:
                    return cls(n_bytes=n_bytes)
            elif match and not match[2] and match[1].isdigit():
                return cls.parse(int(match[1]))
            raise ConfigError(f"active must be {_ALLOWED} (units: {', '.join(_UNITS)}), got {active!r}")
        if isinstance(active, bool) or not isinstance(active, int) or active < 1:
            raise ConfigError(f"active must be {_ALLOWED}, got {active!r}")
        return cls(tokens=active)

    def tokens_for(self, *, rows: int, layers: int, heads: int, width: int, item: int) -> int:
        """Entries per kv head, for a cache of that shape; `width` is the head size, `item` bytes per number.

        Raises
        ------
        ConfigError
            If the bytes do not suffice for one entry per head.
        """
        if self.tokens is not None:
            return self.tokens
        each = rows * layers * heads * (2 * width * item + _COLUMN_BYTES)
        n_bytes = self.n_bytes or 0
        if n_bytes < each:
            raise ConfigError(
                f"active={n_bytes} bytes holds not one token: {rows} rows, {layers} layers and {heads} kv heads "
                f"need {each} bytes a token"
            )
        return n_bytes // each

    def written(self) -> int | str:
        """What `parse` reads back."""
        return self.tokens if self.tokens is not None else f"{self.n_bytes}B"
