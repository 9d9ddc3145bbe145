"""Replay an accepted path and score a token tree with a Mamba2 layer's scan, in one Triton kernel.

    c_i = sum_j M_ij d_j A
    y_i = exp(c_i) C_i S^T + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j + D x_i
    S  <- exp(sum_m d_m A) S + sum_m exp(sum_{l>m} d_l A) d_m x_m B_m^T        (m, l on the path)

with d = softplus(dt + dt_bias) clamped to `dt_limit`. One program owns a tile of one head's state: it
loads the tile once, replays the path, stores it once and scores all rows against its registers, so
the state moves as often as in one autoregressive step. Everything is held transposed ([P, rows]): the
state is then the first operand of every product it enters and never leaves registers.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: B batch, R rows of a block buffer, T rows scored by this pass, J their ancestors,
L path capacity, H heads, P head dim, N state dim, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.rows import Pending, ScanHeads, ScanRows, is_packed

MAX_ROWS = 256
HEAD_DIMS = (32, 64, 128)
STATE_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class ScanConfig:
    """How one launch is cut: rows per tile, state values per program, warps of 32 threads."""

    block_rows: int
    state_values: int
    num_warps: int

    def block_head_dim(self, head_dim: int, state_dim: int) -> int:
        """Return how many of a head's dims one program owns."""
        return min(head_dim, 64, max(16, self.state_values // state_dim))


# Fixed, never autotuned: the kernel updates the state in place, and one choice per size keeps decoding
# reproducible. A path is replayed in tiles of 16, the least that a tensor core multiplies.
CONFIGS = (
    ScanConfig(block_rows=16, state_values=8192, num_warps=4),
    ScanConfig(block_rows=32, state_values=8192, num_warps=4),
    ScanConfig(block_rows=64, state_values=8192, num_warps=4),
)
TOKEN_CONFIG = ScanConfig(block_rows=1, state_values=4096, num_warps=4)
BLOCK_PATH = 16


def pick_config(num_rows: int) -> ScanConfig:
    """Return the config whose tile holds `num_rows` rows, or the largest."""
    return next((config for config in CONFIGS if num_rows <= config.block_rows), CONFIGS[-1])


@triton.jit
def _softplus(value):
    """log(1 + exp(value)) by the series of 2 atanh(u / (2 + u)): accurate where log(1 + u) is not."""
    u = tl.exp(-tl.abs(value))
    z = u / (2.0 + u)
    square = z * z
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return tl.maximum(value, 0.0) + 2.0 * z * (1.0 + square * series)


@triton.jit
def _time_steps(dt_ptr, valid, dt_bias, dt_min, dt_max):
    """d of the rows that `dt_ptr` points to."""
    dt = tl.load(dt_ptr, mask=valid, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(_softplus(dt + dt_bias), dt_min), dt_max)


@triton.jit
def _dot(left, right, total):
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _dot_wide(wide, right, total):
    """total + wide @ right for an fp32 `wide`: with bf16 on the right, as two bf16 parts."""
    if right.dtype == tl.float32:
        return _dot(wide, right, total)
    high = wide.to(right.dtype)
    low = (wide - high.to(tl.float32)).to(right.dtype)
    return _dot(low, right, _dot(high, right, total))


@triton.jit
def _replay_tile(
    state, x_ptr, dt_ptr, b_ptr, path_ptr, length, start, capacity,
    stride_x_r, stride_dt_r, stride_b_r, a, dt_bias, dt_min, dt_max,
    dims_P, dims_N, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The state tile [P, N] after entries start..start + BLOCK_L - 1 of the pending path."""
    position = start + tl.arange(0, BLOCK_L)
    listed = position < capacity
    row = tl.load(path_ptr + position, mask=listed, other=0).to(tl.int64)
    # Rows past the path are loaded too, so that no load waits for `length`; any bits may be there.
    used = position < length
    d = _time_steps(dt_ptr + row * stride_dt_r, listed, dt_bias, dt_min, dt_max)
    d = tl.where(used, d, 0.0)
    x_offsets = row[None, :] * stride_x_r + dims_P[:, None]
    x = tl.load(x_ptr + x_offsets, mask=listed[None, :], other=0.0).to(tl.float32)
    b_offsets = row[:, None] * stride_b_r + dims_N[None, :]
    b = tl.load(b_ptr + b_offsets, mask=listed[:, None], other=0.0)
    b = tl.where(used[:, None], b, 0.0).to(b.dtype)

    log_decay = d * a
    later = position[:, None] > position[None, :]
    # A suffix sum, not a difference of prefix sums, which loses digits on long paths.
    after = tl.sum(tl.where(later, log_decay[:, None], 0.0), axis=0)
    weighted = tl.where(used[None, :], x * (tl.exp(after) * d)[None, :], 0.0)
    return _dot_wide(weighted, b, state * tl.exp(tl.sum(log_decay, axis=0)))


@triton.jit
def _mask_tile(mask_ptr, rows_J, rows_T, num_rows, stride_mask_r):
    """M transposed: [J, T] is True where row J is row T or its ancestor."""
    offsets = rows_T[None, :].to(tl.int64) * stride_mask_r + rows_J[:, None]
    valid = (rows_T[None, :] < num_rows) & (rows_J[:, None] < num_rows)
    return tl.load(mask_ptr + offsets, mask=valid, other=0) != 0


@triton.jit
def _path_sum(
    total_T, rows_T, stop, dt_ptr, mask_ptr, num_rows, stride_dt_r, stride_mask_r,
    a, dt_bias, dt_min, dt_max, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """total_T + the part of c that comes from ancestors in rows 0..stop - 1, whole tiles."""
    for start in range(0, stop, BLOCK_T):
        rows_J = start + tl.arange(0, BLOCK_T)
        dt_J_ptr = dt_ptr + rows_J.to(tl.int64) * stride_dt_r
        d_J = _time_steps(dt_J_ptr, rows_J < num_rows, dt_bias, dt_min, dt_max)
        mask_JT = _mask_tile(mask_ptr, rows_J, rows_T, num_rows, stride_mask_r)
        total_T += tl.sum(tl.where(mask_JT, (d_J * a)[:, None], 0.0), axis=0)
    return total_T


@triton.jit
def _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT):
    """y + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j for one tile of ancestors."""
    score_JT = _dot(b_JN, c_NT, tl.full(mask_JT.shape, 0.0, tl.float32))
    # Outside the mask the exponent may be positive and overflow, so the mask comes before exp.
    exponent_JT = tl.where(mask_JT, path_T[None, :] - path_J[:, None], float("-inf"))
    weight_JT = score_JT * tl.exp(exponent_JT) * d_J[:, None]
    return _dot(x_PJ, weight_JT.to(x_PJ.dtype), y_PT)


@triton.jit(do_not_specialize=["first", "num_rows", "path_capacity", "stride_mask_r"])
def _tree_scan_kernel(
    # pointers
    state_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, mask_ptr, out_ptr, a_ptr, skip_ptr, dt_bias_ptr,
    prev_x_ptr, prev_dt_ptr, prev_b_ptr, path_ptr, length_ptr,
    # sizes
    first, num_rows, path_capacity, dt_min, dt_max,
    # strides
    stride_state_b, stride_x_b, stride_x_r, stride_dt_b, stride_dt_r, stride_b_b, stride_b_r,
    stride_c_b, stride_c_t, stride_out_b, stride_out_t, stride_mask_r, stride_prev_x_b,
    stride_prev_x_r, stride_prev_dt_b, stride_prev_dt_r, stride_prev_b_b, stride_prev_b_r,
    stride_path_b,
    # meta
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    x_base = head * HEAD_DIM
    b_base = head // HEADS_PER_GROUP * STATE_DIM
    a = tl.load(a_ptr + head)
    skip = tl.load(skip_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)

    state_ptr += sequence * stride_state_b + x_base * STATE_DIM
    state_offsets = dims_P[:, None] * STATE_DIM + dims_N[None, :]
    state = tl.load(state_ptr + state_offsets).to(tl.float32)
    if path_ptr is not None:
        length = tl.load(length_ptr + sequence)
        for start in range(0, path_capacity, BLOCK_L):
            state = _replay_tile(
                state, prev_x_ptr + sequence * stride_prev_x_b + x_base,
                prev_dt_ptr + sequence * stride_prev_dt_b + head,
                prev_b_ptr + sequence * stride_prev_b_b + b_base,
                path_ptr + sequence * stride_path_b, length, start, path_capacity,
                stride_prev_x_r, stride_prev_dt_r, stride_prev_b_r, a, dt_bias, dt_min, dt_max,
                dims_P, dims_N, BLOCK_L,
            )  # fmt: skip
        # Rows are scored against what the next pass will read, whatever the state's dtype.
        rounded = state.to(state_ptr.dtype.element_ty)
        tl.store(state_ptr + state_offsets, rounded)
        state = rounded.to(tl.float32)

    _score_rows(
        state, x_ptr + sequence * stride_x_b + x_base, dt_ptr + sequence * stride_dt_b + head,
        b_ptr + sequence * stride_b_b + b_base, c_ptr + sequence * stride_c_b + b_base, mask_ptr,
        out_ptr + sequence * stride_out_b + x_base, first, num_rows, stride_x_r, stride_dt_r,
        stride_b_r, stride_c_t, stride_out_t, stride_mask_r, a, skip, dt_bias, dt_min, dt_max,
        dims_P, dims_N, BLOCK_P, BLOCK_T,
    )  # fmt: skip


@triton.jit
def _score_rows(
    state, x_ptr, dt_ptr, b_ptr, c_ptr, mask_ptr, out_ptr, first, num_rows, stride_x_r, stride_dt_r,
    stride_b_r, stride_c_t, stride_out_t, stride_mask_r, a, skip, dt_bias, dt_min, dt_max,
    dims_P, dims_N, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write y of rows first..num_rows - 1, tile by tile; pointers are at this sequence and head."""
    for start in range(first // BLOCK_T * BLOCK_T, num_rows, BLOCK_T):
        rows_T = start + tl.arange(0, BLOCK_T)
        within = rows_T < num_rows
        scored = within & (rows_T >= first)
        offset_T = rows_T.to(tl.int64)
        d_T = _time_steps(dt_ptr + offset_T * stride_dt_r, within, dt_bias, dt_min, dt_max)
        mask_TT = _mask_tile(mask_ptr, rows_T, rows_T, num_rows, stride_mask_r)
        path_T = tl.sum(tl.where(mask_TT, (d_T * a)[:, None], 0.0), axis=0)
        path_T = _path_sum(
            path_T, rows_T, start, dt_ptr, mask_ptr, num_rows, stride_dt_r, stride_mask_r,
            a, dt_bias, dt_min, dt_max, BLOCK_T,
        )  # fmt: skip
        c_offsets = (offset_T - first)[None, :] * stride_c_t + dims_N[:, None]
        c_NT = tl.load(c_ptr + c_offsets, mask=scored[None, :], other=0.0)
        x_offsets = offset_T[None, :] * stride_x_r + dims_P[:, None]
        x_PT = tl.load(x_ptr + x_offsets, mask=within[None, :], other=0.0)
        b_offsets = offset_T[:, None] * stride_b_r + dims_N[None, :]
        b_TN = tl.load(b_ptr + b_offsets, mask=within[:, None], other=0.0)

        y_PT = _dot_wide(state, c_NT, tl.full((BLOCK_P, BLOCK_T), 0.0, tl.float32))
        y_PT = y_PT * tl.exp(path_T)[None, :] + skip * x_PT.to(tl.float32)
        y_PT = _add_ancestors(y_PT, x_PT, b_TN, c_NT, d_T, path_T, path_T, mask_TT)
        for earlier in range(0, start, BLOCK_T):
            rows_J = earlier + tl.arange(0, BLOCK_T)
            offset_J = rows_J.to(tl.int64)
            # Earlier tiles are full: every row index is below num_rows.
            d_J = _time_steps(dt_ptr + offset_J * stride_dt_r, rows_J < num_rows, dt_bias, dt_min, dt_max)
            x_PJ = tl.load(x_ptr + offset_J[None, :] * stride_x_r + dims_P[:, None])
            b_JN = tl.load(b_ptr + offset_J[:, None] * stride_b_r + dims_N[None, :])
            mask_JT = _mask_tile(mask_ptr, rows_J, rows_T, num_rows, stride_mask_r)
            path_J = _path_sum(
                tl.full((BLOCK_T,), 0.0, tl.float32), rows_J, earlier + BLOCK_T, dt_ptr, mask_ptr,
                num_rows, stride_dt_r, stride_mask_r, a, dt_bias, dt_min, dt_max, BLOCK_T,
            )  # fmt: skip
            y_PT = _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT)
        out_offsets = (offset_T - first)[None, :] * stride_out_t + dims_P[:, None]
        tl.store(out_ptr + out_offsets, y_PT, mask=scored[None, :])
