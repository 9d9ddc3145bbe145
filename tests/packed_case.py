"""Packed prompts for tests: slots out of order, some prompts going on, tokens of nobody behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stree_kernels.launch.packing import Packing

SPARE_TOKENS = 3
"""Tokens of nobody behind the last prompt."""


def make_packing(
    lengths: Sequence[int], starts: Sequence[int] | None = None, device: str = "cpu"
) -> Packing:
    """Return tables for prompts of these lengths, in the slots S - 1, ..., 1, 0."""
    count = len(lengths)
    tables = (np.cumsum([0, *lengths]), range(count)[::-1], starts or [0] * count)
    return Packing(*(torch.tensor(list(t), dtype=torch.int32, device=device) for t in tables))
