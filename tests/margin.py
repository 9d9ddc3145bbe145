"""How close a decision was where two texts part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from chain_prefill import read_prompt

from stree_core.models.model import Model


@torch.inference_mode()
def logit_margin(
    target: Model, prompt: Sequence[int], expected: Sequence[int], actual: Sequence[int]
) -> float:
    """Return the gap between the logits of two continuations' tokens at their first difference.

    The logits are those of a fresh prefill up to there. The texts have one length and differ.
    """
    part = next(i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
    prefix = [*prompt, *expected[:part]]
    logits = target.logits(read_prompt(target, prefix)[None])[0, 0]
    return abs(float(logits[expected[part]] - logits[actual[part]]))
