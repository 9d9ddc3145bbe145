"""Replay an accepted path and score a token tree with a Mamba2 layer's scan, in one Triton kernel.

The formulas are those of `tree_scan_ref`. One program owns a tile of one head's state: it loads the
tile once, replays the path, stores it once and scores all rows against its registers, so the state
moves as often as in one autoregressive step. Rows lie in columns ([P, rows]): the state is then the
first operand of every product it enters and never leaves registers.
Source: Mamba-2 (arXiv:2405.21060) sec. 6; tree form: STree (arXiv:2505.14969).

Shape letters: B batch, R rows of a block buffer, T rows scored by this pass, J their ancestors,
L path capacity, H heads, P head dim, N state dim, G groups.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.rows import Pending, ScanHeads, ScanRows, check_cover, check_scan

MAX_ROWS = 256
HEAD_DIMS = (16, 32, 64, 128)
STATE_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class ScanConfig:
    """How a launch is cut: rows of a tile, state values of a program, its warps of 32 threads."""

    max_rows: int
    max_state_dim: int
    block_rows: int
    state_values: int
    num_warps: int

    def block_head_dim(self, head_dim: int, state_dim: int) -> int:
        """Return how many of a head's dims one program owns."""
        return min(head_dim, 64, max(16, self.state_values // state_dim))


# Never autotuned: the kernel updates the state in place, and one choice per size keeps decoding
# reproducible. Sized by registers and shared memory (`benchmarks/aot.py`), not by timing.
CONFIGS = (
    ScanConfig(max_rows=16, max_state_dim=128, block_rows=16, state_values=8192, num_warps=4),
    ScanConfig(max_rows=32, max_state_dim=128, block_rows=32, state_values=8192, num_warps=4),
    ScanConfig(max_rows=64, max_state_dim=128, block_rows=64, state_values=8192, num_warps=8),
    ScanConfig(max_rows=16, max_state_dim=256, block_rows=16, state_values=8192, num_warps=8),
    ScanConfig(max_rows=256, max_state_dim=256, block_rows=32, state_values=8192, num_warps=8),
)
FP32_CONFIG = ScanConfig(256, max_state_dim=128, block_rows=16, state_values=16, num_warps=8)
TOKEN_CONFIG = ScanConfig(1, max_state_dim=256, block_rows=1, state_values=4096, num_warps=4)
# The least that a tensor core multiplies; an accepted path is seldom longer.
BLOCK_PATH = 16
# Longer ones are replayed by tiles; an estimate of where a row at a time costs more.
MAX_TOKEN_PATH = 16


def pick_config(num_rows: int, state_dim: int, dtype: torch.dtype) -> ScanConfig:
    """Return the first config that takes this many rows of this dtype against this state."""
    return next(
        config
        for config in ((FP32_CONFIG,) if dtype == torch.float32 else CONFIGS)
        if num_rows <= config.max_rows and state_dim <= config.max_state_dim
    )


@triton.jit
def _dot_wide(wide, right, total):
    """total + wide @ right for an fp32 `wide`: with bf16 on the right, as two bf16 parts."""
    if right.dtype == tl.float32:
        total = tl.dot(wide, right, total, input_precision="ieee")
    else:
        high = wide.to(right.dtype)
        low = (wide - high.to(tl.float32)).to(right.dtype)
        total = tl.dot(low, right, tl.dot(high, right, total))
    return total


@triton.jit
def _time_steps(dt, law):
    """d of raw dt; `law` says how a head's dt becomes decay: (A, dt_bias, least d, greatest d)."""
    value = dt.to(tl.float32) + law[1]
    # log(1 + u) as the series of 2 atanh(u / (2 + u)): `log` loses the digits of a small u.
    u = tl.exp(-tl.abs(value))
    z = u / (2.0 + u)
    series = 1.0 / 15.0
    for term in tl.static_range(1, 8):
        series = series * z * z + 1.0 / (15 - 2 * term)
    softplus = tl.maximum(value, 0.0) + 2.0 * z * series
    return tl.minimum(tl.maximum(softplus, law[2]), law[3])


@triton.jit
def _load_steps(source, row, valid, law):
    """d of each row [rows]; a source is a pair (pointer at this sequence and head, row stride)."""
    offsets = row.to(tl.int64) * source[1]
    return _time_steps(tl.load(source[0] + offsets, mask=valid, other=0.0), law)


@triton.jit
def _load_rows(source, row, valid, dims):
    """Rows of a source as they lie [rows, dims]."""
    offsets = row.to(tl.int64)[:, None] * source[1] + dims[None, :]
    return tl.load(source[0] + offsets, mask=valid[:, None], other=0.0)


@triton.jit
def _load_columns(source, row, valid, dims):
    """Rows of a source transposed [dims, rows]."""
    offsets = row.to(tl.int64)[None, :] * source[1] + dims[:, None]
    return tl.load(source[0] + offsets, mask=valid[None, :], other=0.0)


@triton.jit
def _load_mask(mask, rows_J, rows_T, num_rows):
    """M transposed [J, T]: True where row J is row T or its ancestor."""
    offsets = rows_T.to(tl.int64)[None, :] * mask[1] + rows_J[:, None]
    valid = (rows_T[None, :] < num_rows) & (rows_J[:, None] < num_rows)
    return tl.load(mask[0] + offsets, mask=valid, other=0) != 0


@triton.jit
def _commit(pointers, state):
    """Store the state; return what the next pass will read: rows are scored against that."""
    rounded = state.to(pointers.dtype.element_ty)
    tl.store(pointers, rounded)
    return rounded.to(tl.float32)


@triton.jit
def _replay(state, rows, path_ptr, length, capacity, law, dims_P, dims_N, BLOCK_L: tl.constexpr):
    """The state tile [P, N] after the pending path, tile by tile."""
    x, dt, b = rows
    for start in range(0, capacity, BLOCK_L):
        position = start + tl.arange(0, BLOCK_L)
        listed = position < capacity
        row = tl.load(path_ptr + position, mask=listed, other=0)
        # Rows past the path are loaded too: no load waits for `length`. Any bits may be there.
        used = position < length
        d = tl.where(used, _load_steps(dt, row, listed, law), 0.0)
        x_PL = tl.where(used[None, :], _load_columns(x, row, listed, dims_P).to(tl.float32), 0.0)
        b_LN = _load_rows(b, row, listed, dims_N)
        b_LN = tl.where(used[:, None], b_LN, 0.0).to(b_LN.dtype)
        log_decay = d * law[0]
        # A suffix sum, not a difference of prefix sums, which loses digits on long paths.
        later = position[:, None] > position[None, :]
        after = tl.sum(tl.where(later, log_decay[:, None], 0.0), axis=0)
        weighted_PL = x_PL * (tl.exp(after) * d)[None, :]
        state = _dot_wide(weighted_PL, b_LN, state * tl.exp(tl.sum(log_decay, axis=0)))
    return state


@triton.jit
def _path_sum(rows_T, stop, dt, mask, num_rows, law, BLOCK_T: tl.constexpr):
    """The part of c that comes from ancestors in rows 0..stop - 1; `stop` is a tile's end."""
    total_T = tl.full(rows_T.shape, 0.0, tl.float32)
    for start in range(0, stop, BLOCK_T):
        rows_J = start + tl.arange(0, BLOCK_T)
        log_decay_J = _load_steps(dt, rows_J, rows_J < num_rows, law) * law[0]
        mask_JT = _load_mask(mask, rows_J, rows_T, num_rows)
        total_T += tl.sum(tl.where(mask_JT, log_decay_J[:, None], 0.0), axis=0)
    return total_T


@triton.jit
def _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT):
    """y + sum_j M_ij exp(c_i - c_j) d_j (C_i . B_j) x_j for one tile of ancestors."""
    score_JT = tl.dot(b_JN, c_NT, input_precision="ieee")
    # Outside the mask the exponent may be positive and overflow, so the mask comes before exp.
    exponent_JT = tl.where(mask_JT, path_T[None, :] - path_J[:, None], float("-inf"))
    weight_JT = score_JT * tl.exp(exponent_JT) * d_J[:, None]
    return tl.dot(x_PJ, weight_JT.to(x_PJ.dtype), y_PT, input_precision="ieee")


@triton.jit
def _attend(
    rows, c, mask, start, first, num_rows, law, skip, dims_P, dims_N, ONE_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What rows start..start + BLOCK_T - 1 owe to rows, not to the state; C and c of these rows."""
    x, dt, b = rows
    rows_T = start + tl.arange(0, BLOCK_T)
    within = rows_T < num_rows
    d_T = _load_steps(dt, rows_T, within, law)
    mask_TT = _load_mask(mask, rows_T, rows_T, num_rows)
    x_PT = _load_columns(x, rows_T, within, dims_P)
    b_TN = _load_rows(b, rows_T, within, dims_N)
    # The source `c` begins at row `first`.
    c_NT = _load_columns(c, rows_T - first, within & (rows_T >= first), dims_N)
    path_T = tl.sum(tl.where(mask_TT, (d_T * law[0])[:, None], 0.0), axis=0)
    if not ONE_TILE:
        path_T += _path_sum(rows_T, start, dt, mask, num_rows, law, BLOCK_T)
    y_PT = skip * x_PT.to(tl.float32)
    y_PT = _add_ancestors(y_PT, x_PT, b_TN, c_NT, d_T, path_T, path_T, mask_TT)
    if not ONE_TILE:
        for earlier in range(0, start, BLOCK_T):
            rows_J = earlier + tl.arange(0, BLOCK_T)
            within_J = rows_J < num_rows
            path_J = _path_sum(rows_J, earlier + BLOCK_T, dt, mask, num_rows, law, BLOCK_T)
            d_J = _load_steps(dt, rows_J, within_J, law)
            x_PJ = _load_columns(x, rows_J, within_J, dims_P)
            b_JN = _load_rows(b, rows_J, within_J, dims_N)
            mask_JT = _load_mask(mask, rows_J, rows_T, num_rows)
            y_PT = _add_ancestors(y_PT, x_PJ, b_JN, c_NT, d_J, path_J, path_T, mask_JT)
    return y_PT, c_NT, path_T


@triton.jit
def _add_state(
    y_PT, state, c_NT, path_T, out, start, first, num_rows, dims_P, BLOCK_T: tl.constexpr
):
    """Store y + exp(c) S C of rows start..start + BLOCK_T - 1."""
    carried_PT = _dot_wide(state, c_NT, tl.full(y_PT.shape, 0.0, tl.float32))
    row = start - first + tl.arange(0, BLOCK_T)
    scored = (row >= 0) & (row < num_rows - first)
    offsets = row.to(tl.int64)[None, :] * out[1] + dims_P[:, None]
    tl.store(out[0] + offsets, y_PT + carried_PT * tl.exp(path_T)[None, :], mask=scored[None, :])


@triton.jit(do_not_specialize=["first", "num_rows", "path_capacity", "stride_mask_r"])
def _tree_scan_kernel(
    # pointers
    state_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, out_ptr, a_ptr, skip_ptr, dt_bias_ptr,
    prev_x_ptr, prev_dt_ptr, prev_b_ptr, path_ptr, length_ptr, mask_ptr,
    # sizes and limits
    dt_min, dt_max, first, num_rows, path_capacity,
    # strides
    stride_state_b, stride_x_b, stride_dt_b, stride_b_b, stride_c_b, stride_out_b,
    stride_prev_x_b, stride_prev_dt_b, stride_prev_b_b, stride_path_b,
    stride_prev_x_r, stride_prev_dt_r, stride_prev_b_r,
    stride_x_r, stride_dt_r, stride_b_r, stride_c_t, stride_out_t, stride_mask_r,
    # meta
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    x_base = head * HEAD_DIM
    b_base = head // HEADS_PER_GROUP * STATE_DIM
    law = (tl.load(a_ptr + head), tl.load(dt_bias_ptr + head), dt_min, dt_max)
    state_ptr += sequence * stride_state_b + x_base * STATE_DIM
    state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
    state = tl.load(state_ptrs).to(tl.float32)
    x = (x_ptr + sequence * stride_x_b + x_base, stride_x_r)
    dt = (dt_ptr + sequence * stride_dt_b + head, stride_dt_r)
    b = (b_ptr + sequence * stride_b_b + b_base, stride_b_r)
    c = (c_ptr + sequence * stride_c_b + b_base, stride_c_t)
    out = (out_ptr + sequence * stride_out_b + x_base, stride_out_t)
    mask = (mask_ptr, stride_mask_r)
    skip = tl.load(skip_ptr + head)
    if ONE_TILE:
        # Before the replay, so that these loads wait together with the state's.
        y_PT, c_NT, path_T = _attend(
            (x, dt, b), c, mask, 0, first, num_rows, law, skip, dims_P, dims_N, True, BLOCK_T
        )
    if path_ptr is not None:
        x_prev = (prev_x_ptr + sequence * stride_prev_x_b + x_base, stride_prev_x_r)
        dt_prev = (prev_dt_ptr + sequence * stride_prev_dt_b + head, stride_prev_dt_r)
        b_prev = (prev_b_ptr + sequence * stride_prev_b_b + b_base, stride_prev_b_r)
        state = _replay(
            state, (x_prev, dt_prev, b_prev), path_ptr + sequence * stride_path_b,
            tl.load(length_ptr + sequence), path_capacity, law, dims_P, dims_N, BLOCK_L,
        )  # fmt: skip
        state = _commit(state_ptrs, state)
    if ONE_TILE:
        _add_state(y_PT, state, c_NT, path_T, out, 0, first, num_rows, dims_P, BLOCK_T)
    else:
        for start in range(first // BLOCK_T * BLOCK_T, num_rows, BLOCK_T):
            y_PT, c_NT, path_T = _attend(
                (x, dt, b), c, mask, start, first, num_rows, law, skip, dims_P, dims_N, False,
                BLOCK_T,
            )  # fmt: skip
            _add_state(y_PT, state, c_NT, path_T, out, start, first, num_rows, dims_P, BLOCK_T)


@triton.jit
def _replay_row(state, rows, path_ptr, used, law, dims_P, dims_N):
    """The state tile [P, N] after the row that `path_ptr` names, unchanged unless `used`."""
    x, dt, b = rows
    row = tl.load(path_ptr).to(tl.int64)
    # An unused row may hold any bits.
    d = tl.where(used, _time_steps(tl.load(dt[0] + row * dt[1]), law), 0.0)
    x_P = tl.where(used, tl.load(x[0] + row * x[1] + dims_P).to(tl.float32), 0.0)
    b_N = tl.where(used, tl.load(b[0] + row * b[1] + dims_N).to(tl.float32), 0.0)
    return state * tl.exp(d * law[0]) + (d * x_P)[:, None] * b_N[None, :]


@triton.jit
def _token_scan_kernel(
    # pointers
    state_ptr, x_ptr, dt_ptr, b_ptr, c_ptr, out_ptr, a_ptr, skip_ptr, dt_bias_ptr,
    prev_x_ptr, prev_dt_ptr, prev_b_ptr, path_ptr, length_ptr,
    # limits
    dt_min, dt_max,
    # strides
    stride_state_b, stride_x_b, stride_dt_b, stride_b_b, stride_c_b, stride_out_b,
    stride_prev_x_b, stride_prev_dt_b, stride_prev_b_b, stride_path_b,
    stride_prev_x_r, stride_prev_dt_r, stride_prev_b_r,
    # meta
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Replay a short path and score row 0, without matrix products."""
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    x_base = head * HEAD_DIM
    b_base = head // HEADS_PER_GROUP * STATE_DIM
    law = (tl.load(a_ptr + head), tl.load(dt_bias_ptr + head), dt_min, dt_max)
    state_ptr += sequence * stride_state_b + x_base * STATE_DIM
    state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
    state = tl.load(state_ptrs).to(tl.float32)
    # Loaded before the state is stored: no load may pass a store that it might read from.
    step = _time_steps(tl.load(dt_ptr + sequence * stride_dt_b + head), law)
    x_P = tl.load(x_ptr + sequence * stride_x_b + x_base + dims_P).to(tl.float32)
    b_N = tl.load(b_ptr + sequence * stride_b_b + b_base + dims_N).to(tl.float32)
    c_N = tl.load(c_ptr + sequence * stride_c_b + b_base + dims_N).to(tl.float32)
    skip = tl.load(skip_ptr + head)
    if path_ptr is not None:
        x_prev = (prev_x_ptr + sequence * stride_prev_x_b + x_base, stride_prev_x_r)
        dt_prev = (prev_dt_ptr + sequence * stride_prev_dt_b + head, stride_prev_dt_r)
        b_prev = (prev_b_ptr + sequence * stride_prev_b_b + b_base, stride_prev_b_r)
        prev = (x_prev, dt_prev, b_prev)
        path_ptr += sequence * stride_path_b
        length = tl.load(length_ptr + sequence)
        # Outside the loop, so that the usual path's only row does not wait for `length`.
        state = _replay_row(state, prev, path_ptr, length > 0, law, dims_P, dims_N)
        for entry in range(1, length):
            state = _replay_row(state, prev, path_ptr + entry, entry < length, law, dims_P, dims_N)
        state = _commit(state_ptrs, state)
    y_P = tl.exp(step * law[0]) * tl.sum(state * c_N[None, :], axis=1)
    y_P += (step * tl.sum(b_N * c_N, axis=0) + skip) * x_P
    tl.store(out_ptr + sequence * stride_out_b + x_base + dims_P, y_P)


def tree_scan(
    state_BHPN: Tensor, rows: ScanRows, c_BTGN: Tensor, mask_RR: Tensor, heads: ScanHeads, *,
    first: int, dt_limit: tuple[float, float], out_BTHP: Tensor, previous: ScanRows | None,
    pending: Pending | None,
) -> None:  # fmt: skip
    """Advance the state along `pending`, then score rows first..first + T - 1 against it.

    The contract is that of `tree_scan_ref.tree_scan`, with all in bf16 or fp32.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = first + c_BTGN.shape[1]
    capacity = pending.path_BL.shape[1] if pending else 0
    batch, num_heads, head_dim, state_dim = state_BHPN.shape
    _check(head_dim, state_dim, c_BTGN.dtype, num_rows, capacity)
    check_scan(state_BHPN, rows, c_BTGN, mask_RR, heads, out_BTHP, previous, pending)
    check_cover(num_rows, rows.x_BRHP.shape[1], *mask_RR.shape)
    path, length = pending or (None, None)
    prev = previous if pending and previous else (None, None, None)
    pointers = (state_BHPN, *rows, c_BTGN, out_BTHP, *heads, *prev, path, length)
    by_sequence = (state_BHPN, *rows, c_BTGN, out_BTHP, *prev, path)
    strides = [0 if tensor is None else tensor.stride(0) for tensor in by_sequence]
    strides += [0 if tensor is None else tensor.stride(1) for tensor in prev]
    one_token = num_rows == 1 and capacity <= MAX_TOKEN_PATH
    config = TOKEN_CONFIG if one_token else pick_config(num_rows, state_dim, c_BTGN.dtype)
    block_p = config.block_head_dim(head_dim, state_dim)
    grid = (head_dim // block_p, num_heads, batch)
    meta = {
        "HEADS_PER_GROUP": num_heads // c_BTGN.shape[2], "HEAD_DIM": head_dim,
        "STATE_DIM": state_dim, "BLOCK_P": block_p, "num_warps": config.num_warps, "num_stages": 1,
    }  # fmt: skip
    limits = tuple(map(float, dt_limit))
    if one_token:
        _token_scan_kernel[grid](*pointers, *limits, *strides, **meta)
        return
    strides += [tensor.stride(1) for tensor in (*rows, c_BTGN, out_BTHP)]
    _tree_scan_kernel[grid](
        *pointers, mask_RR, *limits, first, num_rows, capacity, *strides, mask_RR.stride(0),
        BLOCK_T=config.block_rows, ONE_TILE=num_rows <= config.block_rows, BLOCK_L=BLOCK_PATH,
        **meta,
    )  # fmt: skip


def _check(head_dim: int, state_dim: int, dtype: torch.dtype, num_rows: int, path: int) -> None:
    """Raise ValueError for sizes that the kernel cannot take; `path` is the path's capacity."""
    state_dims = STATE_DIMS[:-1] if dtype == torch.float32 else STATE_DIMS
    if head_dim not in HEAD_DIMS or state_dim not in state_dims:
        raise ValueError(
            f"in {dtype} the scan kernel takes head dims {HEAD_DIMS} and state dims "
            f"{state_dims}, got {head_dim} and {state_dim}; use the torch backend"
        )
    if max(num_rows, path) > MAX_ROWS:
        raise ValueError(
            f"the scan kernel takes at most {MAX_ROWS} rows and path entries, "
            f"got {num_rows} and {path}; cut the block"
        )
