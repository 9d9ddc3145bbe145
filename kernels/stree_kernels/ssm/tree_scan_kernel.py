"""The scan of a token tree, in one Triton kernel.

One program owns a tile of one head's state: it loads the tile once, advances it in registers by the
accepted rows that are not in it, and scores all rows against that. The state is stored only when
too many such rows have gathered. Rows lie in columns ([P, rows]): the state is then the first
operand of every product it enters. All that the previous kernels cannot have written comes before
the wait for them.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: T rows scored by this pass, J their ancestors, P head dim, N state dim.
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
    dot_rounded,
    load_columns,
    load_rows,
    load_vector,
    time_steps,
)


@triton.jit
def load_mask(mask, rows_J, rows_T, num_rows):
    """M transposed [J, T]: True where row J is row T or its ancestor. M has columns for a tile."""
    offsets = rows_T[None, :] * mask[1] + rows_J[:, None]
    return tl.load(mask[0] + offsets, mask=rows_T[None, :] < num_rows, other=0) != 0


@triton.jit
def _path_sum(rows_T, stop, dt, mask, num_rows, decay_terms, BLOCK_T: tl.constexpr):
    """The part of c that comes from ancestors in rows 0..stop - 1; `stop` is a tile's end."""
    total_T = tl.full(rows_T.shape, 0.0, tl.float32)
    for start in range(0, stop, BLOCK_T):
        rows_J = start + tl.arange(0, BLOCK_T)
        log_decay_J = (
            time_steps(load_vector(dt, rows_J, rows_J < num_rows), decay_terms) * decay_terms[0]
        )
        mask_JT = load_mask(mask, rows_J, rows_T, num_rows)
        total_T += tl.sum(tl.where(mask_JT, log_decay_J[:, None], 0.0), axis=0)
    return total_T


@triton.jit
def _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT):
    """y + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j for one tile of ancestors."""
    score_JT = tl.dot(b_JN, c_NT, input_precision="ieee")
    # Outside the mask the exponent may be positive and overflow, so the mask comes before exp.
    exponent_JT = tl.where(mask_JT, path_T[None, :] - path_J[:, None], float("-inf"))
    weight_JT = score_JT * tl.exp(exponent_JT) * d_J[:, None]
    return dot_rounded(x_PJ, weight_JT, y_PT, x_PJ.dtype)


@triton.jit
def _load_tile(rows, c, mask, start, first, num_rows, dims_P, dims_N, BLOCK_T: tl.constexpr):
    """What rows start..start + BLOCK_T - 1 take from memory: (raw dt, mask, x, b, C)."""
    x, dt, b = rows
    rows_T = start + tl.arange(0, BLOCK_T)
    within = rows_T < num_rows
    dt_T = load_vector(dt, rows_T, within)
    mask_TT = load_mask(mask, rows_T, rows_T, num_rows)
    x_PT = load_columns(x, rows_T, within, dims_P)
    b_TN = load_rows(b, rows_T, within, dims_N)
    # The source `c` begins at row `first`.
    c_NT = load_columns(c, rows_T - first, within & (rows_T >= first), dims_N)
    return dt_T, mask_TT, x_PT, b_TN, c_NT


@triton.jit
def _load_gate(z, start, first, num_rows, dims_P, BLOCK_T: tl.constexpr):
    """z [P, T] of the scored ones of these rows. No load moves past a barrier by itself."""
    row = start + tl.arange(0, BLOCK_T) - first
    return load_columns(z, row, (row >= 0) & (row < num_rows - first), dims_P)


@triton.jit
def _attend(
    tile, rows, mask, start, num_rows, decay_terms, skip_P, dims_P, dims_N, ONE_TILE:
    tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What rows start..start + BLOCK_T - 1 owe to rows, not to the state; c of these rows."""
    x, dt, b = rows
    dt_T, mask_TT, x_PT, b_TN, c_NT = tile
    d_T = time_steps(dt_T, decay_terms)
    path_T = tl.sum(tl.where(mask_TT, (d_T * decay_terms[0])[:, None], 0.0), axis=0)
    if not ONE_TILE:
        rows_T = start + tl.arange(0, BLOCK_T)
        path_T += _path_sum(rows_T, start, dt, mask, num_rows, decay_terms, BLOCK_T)
    y_PT = skip_P[:, None] * x_PT.to(tl.float32)
    y_PT = _add_ancestors(y_PT, x_PT, b_TN, c_NT, d_T, path_T, path_T, mask_TT)
    if not ONE_TILE:
        for earlier in range(0, start, BLOCK_T):
            rows_J = earlier + tl.arange(0, BLOCK_T)
            within_J = rows_J < num_rows
            path_J = _path_sum(rows_J, earlier + BLOCK_T, dt, mask, num_rows, decay_terms, BLOCK_T)
            d_J = time_steps(load_vector(dt, rows_J, within_J), decay_terms)
            x_PJ = load_columns(x, rows_J, within_J, dims_P)
            b_JN = load_rows(b, rows_J, within_J, dims_N)
            mask_JT = load_mask(mask, rows_J, rows_T, num_rows)
            y_PT = _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT)
    return y_PT, path_T


@triton.jit
def _add_state(y_PT, state, c_NT, path_T):
    """y + exp(c) S C. With 16-bit rows S is rounded for this product alone."""
    carried_PT = dot_rounded(state, c_NT, None, c_NT.dtype)
    return y_PT + carried_PT * tl.exp(path_T)[None, :]


@triton.jit
def _store(y_PT, out, z_PT, sums, row, scored, dims_P):
    """Store y, times silu(z) with z, and then its sums of squares."""
    if z_PT is not None:
        z_PT = z_PT.to(tl.float32)
        y_PT *= z_PT / (1.0 + tl.exp(-z_PT))
        tl.store(sums[0] + row * sums[1], tl.sum(y_PT * y_PT, axis=0), mask=scored)
    out_ptrs = out[0] + row[None, :] * out[1] + dims_P[:, None]
    tl.store(out_ptrs, y_PT, mask=scored[None, :])


@triton.jit(do_not_specialize=["first", "num_rows", "past_start"])
def tree_scan_kernel(
    # pointers
    state_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, out_ptr, z_ptr, sums_ptr, a_ptr, skip_ptr, dt_bias_ptr,
    past_x_ptr, past_dt_ptr, past_b_ptr, path_ptr, length_ptr, num_buffered_ptr, mask_ptr,
    # sizes and limits
    dt_min, dt_max, past_start, first, num_rows,
    # strides
    stride_state_b, stride_x_b, stride_dt_b, stride_b_b, stride_c_b, stride_out_b, stride_z_b,
    stride_sums_b, stride_path_b, stride_x_r, stride_dt_r, stride_b_r, stride_skip_h, stride_skip_p,
    stride_c_t, stride_out_t, stride_z_t, stride_sums_t, stride_mask_r,
    # meta
    HEADS_PER_X: tl.constexpr, HEADS_PER_B: tl.constexpr, HEADS_PER_C: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr, BLOCK_P: tl.constexpr, COMMIT: tl.constexpr,
    PDL: tl.constexpr, BLOCK_T: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Commit accepted rows and score rows from `first` on; arguments as in `tree_scan`."""
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
    if COMMIT:
        state = advance(state, past, counts, total, decay_terms, dims_P, dims_N, owns, is_buffered)
        rounded = state.to(state_ptr.dtype.element_ty)
        if not is_buffered:
            tl.store(state_ptrs, rounded)
    else:
        # More rows than may be kept are in the state since this step's first pass.
        total = tl.where(is_buffered, total, 0)
        state = advance(state, past, counts, total, decay_terms, dims_P, dims_N, owns, False)
    x = (x_ptr + sequence * stride_x_b + x_base, stride_x_r)
    dt = (dt_ptr + sequence * stride_dt_b + head, stride_dt_r)
    b = (b_ptr + sequence * stride_b_b + b_base, stride_b_r)
    c = (c_ptr + sequence * stride_c_b + head // HEADS_PER_C * STATE_DIM, stride_c_t)
    out = (out_ptr + sequence * stride_out_b + y_base, stride_out_t)
    z = None
    sums = None
    if z_ptr is not None:
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        z = (z_ptr + sequence * stride_z_b + y_base, stride_z_t)
        sums = (sums_ptr + sequence * stride_sums_b + part, stride_sums_t)
    mask = (mask_ptr, stride_mask_r)
    wait_for_previous(PDL)
    if ONE_TILE:
        tile = _load_tile((x, dt, b), c, mask, 0, first, num_rows, dims_P, dims_N, BLOCK_T)
        z_PT = None
        if z_ptr is not None:
            z_PT = _load_gate(z, 0, first, num_rows, dims_P, BLOCK_T)
        y_PT, path_T = _attend(
            tile, (x, dt, b), mask, 0, num_rows, decay_terms, skip_P, dims_P, dims_N, True, BLOCK_T
        )
        y_PT = _add_state(y_PT, state, tile[4], path_T)
        row = tl.arange(0, BLOCK_T) - first
        _store(y_PT, out, z_PT, sums, row, (row >= 0) & (row < num_rows - first), dims_P)
    else:
        for start in range(first // BLOCK_T * BLOCK_T, num_rows, BLOCK_T):
            tile = _load_tile((x, dt, b), c, mask, start, first, num_rows, dims_P, dims_N, BLOCK_T)
            y_PT, path_T = _attend(
                tile, (x, dt, b), mask, start, num_rows, decay_terms, skip_P, dims_P, dims_N,
                False, BLOCK_T,
            )  # fmt: skip
            y_PT = _add_state(y_PT, state, tile[4], path_T)
            z_PT = None
            if z_ptr is not None:
                z_PT = _load_gate(z, start, first, num_rows, dims_P, BLOCK_T)
            row = start + tl.arange(0, BLOCK_T) - first
            _store(y_PT, out, z_PT, sums, row, (row >= 0) & (row < num_rows - first), dims_P)
