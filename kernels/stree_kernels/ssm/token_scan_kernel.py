"""The scan of one token, in one Triton kernel: a decoding step without speculation.

The formulas are those of `tree_scan_ref` for one row. One program owns a tile of one head's state.
Accepted rows that are not in the state are scored as the token's ancestors; the state is advanced,
by the matrix products of `scan_parts`, only when they are too many.

Shape letters: B batch, L accepted rows that are not in the state, H heads, P head dim, N state dim.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.launch.pdl import release_next, wait_for_previous
from stree_kernels.ssm.device_functions import (
    BUFFERED,
    advance,
    keep_rows,
    load_past,
    time_steps,
    weigh,
)


@triton.jit(do_not_specialize=["past_start"])
def token_scan_kernel(
    # pointers
    state_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, out_ptr, z_ptr, sums_ptr, a_ptr, skip_ptr, dt_bias_ptr,
    past_x_ptr, past_dt_ptr, past_b_ptr, path_ptr, length_ptr, num_buffered_ptr,
    # sizes and limits
    dt_min, dt_max, past_start,
    # strides
    stride_state_b, stride_x_b, stride_dt_b, stride_b_b, stride_c_b, stride_out_b, stride_z_b,
    stride_sums_b, stride_path_b, stride_x_r, stride_dt_r, stride_b_r, stride_skip_h, stride_skip_p,
    # meta
    HEADS_PER_X: tl.constexpr, HEADS_PER_B: tl.constexpr, HEADS_PER_C: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr, BLOCK_P: tl.constexpr, COMMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Commit accepted rows and score row 0; arguments as in `tree_scan`."""
    release_next(PDL)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    x_base = head // HEADS_PER_X * HEAD_DIM
    b_base = head // HEADS_PER_B * STATE_DIM
    y_base = head * HEAD_DIM
    decay_terms = (tl.load(a_ptr + head), tl.load(dt_bias_ptr + head), dt_min, dt_max)
    skip_P = tl.load(skip_ptr + head * stride_skip_h + dims_P * stride_skip_p)
    state_ptr += sequence * stride_state_b + y_base * STATE_DIM
    state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
    state = tl.load(state_ptrs).to(tl.float32)
    counts = (tl.load(num_buffered_ptr + sequence), tl.load(length_ptr + sequence))
    past = (
        (past_x_ptr + sequence * stride_x_b + x_base, stride_x_r),
        (past_dt_ptr + sequence * stride_dt_b + head, stride_dt_r),
        (past_b_ptr + sequence * stride_b_b + b_base, stride_b_r),
        path_ptr + sequence * stride_path_b, past_start,
    )  # fmt: skip
    first_block = tl.program_id(0) == 0
    owns = (head % HEADS_PER_X == 0, first_block, first_block & (head % HEADS_PER_B == 0))
    total = counts[0] + counts[1]
    is_buffered = total <= BUFFERED
    if COMMIT and not is_buffered:
        state = advance(state, past, counts, total, decay_terms, dims_P, dims_N, owns, False)
        rounded = state.to(state_ptr.dtype.element_ty)
        tl.store(state_ptrs, rounded)
        state = rounded.to(tl.float32)
    position = tl.arange(0, BUFFERED)
    counts = (tl.where(is_buffered, counts[0], 0), tl.where(is_buffered, counts[1], 0))
    x_PL, dt_L, b_LN, in_path = load_past(position, past, counts, dims_P, dims_N)
    if COMMIT:
        keep_rows(position, past, x_PL, dt_L, b_LN, in_path, dims_P, dims_N, owns)
    d_L, after_L, decay = weigh(position, counts[0] + counts[1], dt_L, decay_terms)
    wait_for_previous(PDL)
    step = time_steps(tl.load(dt_ptr + sequence * stride_dt_b + head), decay_terms)
    x_P = tl.load(x_ptr + sequence * stride_x_b + x_base + dims_P).to(tl.float32)
    b_N = tl.load(b_ptr + sequence * stride_b_b + b_base + dims_N).to(tl.float32)
    c_base = head // HEADS_PER_C * STATE_DIM
    c_N = tl.load(c_ptr + sequence * stride_c_b + c_base + dims_N).to(tl.float32)
    weight_L = tl.sum(b_LN.to(tl.float32) * c_N[None, :], axis=1) * tl.exp(after_L) * d_L
    carried_P = tl.exp(decay) * tl.sum(state * c_N[None, :], axis=1)
    carried_P += tl.sum(x_PL.to(tl.float32) * weight_L[None, :], axis=1)
    y_P = (
        tl.exp(step * decay_terms[0]) * carried_P
        + (step * tl.sum(b_N * c_N, axis=0) + skip_P) * x_P
    )
    if z_ptr is not None:
        z_P = tl.load(z_ptr + sequence * stride_z_b + y_base + dims_P).to(tl.float32)
        y_P *= z_P / (1.0 + tl.exp(-z_P))
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        tl.store(sums_ptr + sequence * stride_sums_b + part, tl.sum(y_P * y_P, axis=0))
    tl.store(out_ptr + sequence * stride_out_b + y_base + dims_P, y_P)
