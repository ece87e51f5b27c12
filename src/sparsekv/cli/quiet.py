"""Keep other libraries' progress bars and notices out of our output."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Silence transformers, datasets, the Hub client and kvpress, unless SPARSEKV_DEBUG is set."""
    if os.environ.get("SPARSEKV_DEBUG"):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("kvpress", "datasets", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
