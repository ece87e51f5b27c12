"""Moved to sparsekv.architecture (import from there; this file is about to go)."""

from sparsekv.architecture import *  # noqa: F403
