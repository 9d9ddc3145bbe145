"""The angles per position of rotary embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stree_core.model_shape import AttentionShape, Llama3Scaling


def inv_freq(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of rotated dims, in fp32 at least.

    Without rotary positions all angles are 0: a rotation by 0 changes nothing, and is exact.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if shape.rope is None:
        return torch.zeros(shape.head_dim // 2, dtype=wide, device=device)
    rope = shape.rope
    exponent = torch.arange(0, rope.dim, 2, dtype=wide, device=device) / rope.dim
    plain = 1.0 / rope.theta**exponent
    return plain if rope.scaling is None else _stretched(plain, rope.scaling)


def _stretched(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide slow angles by the factor, keep fast ones, and blend those between.

    Source: the reference code of Llama 3.1, as in transformers' rope type `llama3`.
    """
    turns = scaling.original_positions * plain / (2 * math.pi)
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / spread).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)
