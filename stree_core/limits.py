"""Bounds of what files and flags may say; importing them costs nothing."""

from __future__ import annotations

MAX_BATCH_SIZE = 1 << 16
MAX_CONTEXT = 1 << 26
MAX_SEED = (1 << 63) - 1
