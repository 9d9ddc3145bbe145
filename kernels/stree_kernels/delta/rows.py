"""What the ops of a gated delta layer exchange: rows of a block, accepted rows, constants.

Shape letters: B batch, R rows of a buffer, T rows scored, H value heads, P value head dim,
N key head dim, G key heads. G divides H: neighbouring value heads share q and k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.rows import (
    FLOATS,
    MAX_BUFFERED,
    Gate,
    Pending,
    require_dtypes,
    require_mask,
    require_one_buffer,
    require_packed,
    require_row_offsets,
)

NORM_EPS = 1e-6
"""What the l2 norm of q and k adds to a sum of squares."""


class DeltaHeads(NamedTuple):
    """A layer's constants, fp32: A = -exp(A_log) < 0 and the bias of the raw decay."""

    a_H: Tensor
    bias_H: Tensor


class DeltaRows(NamedTuple):
    """What a later pass may replay: u, which a scan solves for, k of unit norm, the log decay.

    Views into larger buffers: any strides over B and R, the dimensions after them contiguous.
    `u_BRHP` and `g_BRH` are fp32. The torch reference takes g [B, R, H, N] as well: a decay for
    each channel of k.
    """

    u_BRHP: Tensor
    k_BRGN: Tensor
    g_BRH: Tensor


class DeltaTokens(NamedTuple):
    """What else a scan reads of the rows it scores: q of unit norm, v, and beta in fp32."""

    q_BTGN: Tensor
    v_BTHP: Tensor
    beta_BTH: Tensor


class DeltaPast(NamedTuple):
    """Where a scan finds the accepted tokens that are not in the state; as `rows.Past`."""

    rows: DeltaRows
    start: int
    pending: Pending
    commit: bool


def check_delta(
    state: Tensor, rows: DeltaRows, tokens: DeltaTokens, mask: Tensor, out: Tensor,
    gate: Gate | None, past: DeltaPast,
) -> None:  # fmt: skip
    """Raise ValueError unless a scan's tensors have the dtypes and strides a kernel relies on."""
    check_decay(rows.g_BRH, 3)
    check_heads(state, rows.k_BRGN, tokens.q_BTGN)
    blocks = [rows.k_BRGN, past.rows.k_BRGN, tokens.q_BTGN, tokens.v_BTHP, out]
    sums = [] if gate is None else [gate.square_sums_BTQ]
    if gate is not None:
        blocks.append(gate.z_BTHP)
    solved = (rows.u_BRHP, past.rows.u_BRHP)
    vectors = (rows.g_BRH, past.rows.g_BRH, tokens.beta_BTH, *sums)
    require_dtypes("q, k, v, z and the output", blocks, FLOATS)
    require_dtypes("the state", (state,), FLOATS)
    require_dtypes("u, the decay, beta and sums", (*solved, *vectors), (torch.float32,))
    require_dtypes("the mask", (mask,), (torch.bool,))
    require_dtypes("the path and its lengths", past.pending, (torch.int32,))
    require_mask(mask)
    require_packed("the state", (state,), 3)
    require_packed("a row of q, k, v, u, z or the output", (*blocks, *solved), 2)
    require_packed("a row of the decay, beta, sums, mask or path", (*vectors, mask), 1)
    require_packed("the path", past.pending, 1)
    require_one_buffer(rows, past.rows)
    require_row_offsets(past.rows)
    if past.rows.u_BRHP.shape[1] < MAX_BUFFERED:
        raise ValueError(
            f"past rows begin with {MAX_BUFFERED} buffered rows, got {past.rows.u_BRHP.shape[1]}; "
            "pass the whole buffer"
        )


def check_decay(g: Tensor, num_dims: int) -> None:
    """Raise ValueError for a decay per channel, as Kimi Delta Attention has it."""
    if g.ndim != num_dims:
        raise ValueError(
            "the delta kernels take one decay for a value head, got one for each channel of k "
            f"({tuple(g.shape)}), as in Kimi Delta Attention (KDA): its score of two rows is no "
            "product of q and k times one number; use the torch backend"
        )


def check_heads(state: Tensor, k: Tensor, q: Tensor) -> None:
    """Raise ValueError unless key heads divide value heads, and q and k are alike."""
    if state.shape[1] % k.shape[-2] or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            "q and k have equally many heads, which divide those of v, got "
            f"{q.shape[-2]}, {k.shape[-2]} and {state.shape[1]}; check the model"
        )
