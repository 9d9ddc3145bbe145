"""Convolve packed prompts along their own tokens, in plain torch.

The conv is that of `tree_conv_ref` for chains: depthwise, causal, then SiLU. It is the CPU's path
and what the Triton kernels are compared with.

Shape letters: M packed tokens, S sequences, B slots, C conv channels, W conv width, K = W - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.packing import Packing


def prompt_conv(
    state_BCK: Tensor,
    inputs_MC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    packing: Packing,
    *,
    out_MC: Tensor,
) -> None:
    """Write silu(conv) of every token, and leave in its slot each sequence's last K inputs.

    `state_BCK` holds the last K inputs of every slot, oldest first. Computes in fp32 at least.
    """
    dtype = torch.promote_types(inputs_MC.dtype, torch.float32)
    offsets, slots, starts = (table.tolist() for table in packing)
    num_columns = state_BCK.shape[2]
    weight_C1W = weight_CW.to(dtype)[:, None]
    for sequence, slot in enumerate(slots):
        here = slice(offsets[sequence], offsets[sequence + 1])
        if here.start == here.stop:
            continue
        before_CK = state_BCK[slot] if starts[sequence] else torch.zeros_like(state_BCK[slot])
        history_CV = torch.cat((before_CK, inputs_MC[here].T), dim=1)
        state_BCK[slot] = history_CV[:, history_CV.shape[1] - num_columns :]
        conv_CT = functional.conv1d(
            history_CV.to(dtype), weight_C1W, bias_C.to(dtype), groups=len(weight_CW)
        )
        out_MC[here] = functional.silu(conv_CT.T)
