"""Multiply an attention's output by the sigmoid of its gate, in plain torch.

It is the CPU's path and what the Triton kernel is compared with.
Source: Qwen3-Next's attention; Gated Attention (arXiv:2505.06708).

Shape letters: M rows, X columns of all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_output(gate_MX: Tensor, out_MX: Tensor) -> None:
    """Multiply `out_MX` by sigmoid(`gate_MX`), in place. Computes in fp32 at least."""
    wide = torch.promote_types(out_MX.dtype, torch.float32)
    out_MX.copy_(out_MX.to(wide) * gate_MX.to(wide).sigmoid())
