"""What the kernels of the scan share: loading rows, time steps, and the accepted rows before them.

A source is a pair (pointer at this sequence and head, row stride). Products of a row index and a
stride are 32-bit: the launcher refuses larger buffers.

Shape letters: T rows, J their ancestors, L accepted rows that are not in the state, P head dim,
N state dim.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.launch.rows import MAX_BUFFERED

BUFFERED = tl.constexpr(MAX_BUFFERED)


@triton.jit
def time_steps(dt, decay_terms):
    """d of raw dt; `decay_terms` says how a head's dt becomes decay: (A, dt_bias, least d, greatest
    d)."""
    value = dt.to(tl.float32) + decay_terms[1]
    # log(1 + u) as the series of 2 atanh(u / (2 + u)): `log` loses the digits of a small u.
    u = tl.exp(-tl.abs(value))
    z = u / (2.0 + u)
    series = 1.0 / 15.0
    for term in tl.static_range(1, 8):
        series = series * z * z + 1.0 / (15 - 2 * term)
    softplus = tl.maximum(value, 0.0) + 2.0 * z * series
    return tl.minimum(tl.maximum(softplus, decay_terms[2]), decay_terms[3])


@triton.jit
def load_vector(source, row, valid):
    """One value of each row [rows]."""
    return tl.load(source[0] + row * source[1], mask=valid, other=0.0)


@triton.jit
def load_rows(source, row, valid, dims):
    """Rows of a source as they lie [rows, dims]."""
    offsets = row[:, None] * source[1] + dims[None, :]
    return tl.load(source[0] + offsets, mask=valid[:, None], other=0.0)


@triton.jit
def load_columns(source, row, valid, dims):
    """Rows of a source transposed [dims, rows]."""
    offsets = row[None, :] * source[1] + dims[:, None]
    return tl.load(source[0] + offsets, mask=valid[None, :], other=0.0)


@triton.jit
def halves(wide):
    """Two bf16 numbers whose sum an fp32 one is, but for its last bits; an fp16 one exactly."""
    high = wide.to(tl.bfloat16)
    return high, (wide - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_wide(wide, right, total):
    """total + wide @ right for an fp32 `wide`: with 16 bits on the right, as two bf16 parts.

    Parts of fp16 would overflow or lose their digits, so fp16 on the right is taken apart too.
    """
    if right.dtype == tl.float32:
        total = tl.dot(wide, right, total, input_precision="ieee")
    else:
        high, low = halves(wide)
        if right.dtype == tl.float16:
            right, right_low = halves(right.to(tl.float32))
            total = tl.dot(high, right_low, total)
        total = tl.dot(low, right, tl.dot(high, right, total))
    return total


@triton.jit
def dot_rounded(left, right, total, NARROW: tl.constexpr):
    """total + left @ right, one of fp32 and one of dtype NARROW, to which the first is rounded.

    Beside fp16 it is rounded to tf32, which has as many digits and the range of fp32.
    """
    if tl.float16 == NARROW:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(left.to(NARROW), right.to(NARROW), total, input_precision="ieee")
    return total


@triton.jit
def load_past(position, past, counts, dims_P, dims_N):
    """x [P, L], raw dt [L] and b [L, N] of accepted rows; which of them are the path's.

    `past` is (x, dt, b, path, first row of the path's block), `counts` (buffered rows, path's
    length).
    """
    x, dt, b, path_ptr, start = past
    entry = position - counts[0]
    in_path = (entry >= 0) & (entry < counts[1])
    found = start + tl.load(path_ptr + entry, mask=in_path, other=0)
    row = tl.where(in_path, found, position)
    valid = position < counts[0] + counts[1]
    return (
        load_columns(x, row, valid, dims_P), load_vector(dt, row, valid),
        load_rows(b, row, valid, dims_N), in_path,
    )  # fmt: skip


@triton.jit
def keep_rows(position, past, x_PL, dt_L, b_LN, saved, dims_P, dims_N, owns):
    """Store rows at their place among the buffered ones; `owns` says which parts this program
    has."""
    x, dt, b, _, _ = past
    x_ptrs = x[0] + position[None, :] * x[1] + dims_P[:, None]
    b_ptrs = b[0] + position[:, None] * b[1] + dims_N[None, :]
    tl.store(x_ptrs, x_PL, mask=saved[None, :] & owns[0])
    tl.store(dt[0] + position * dt[1], dt_L, mask=saved & owns[1])
    tl.store(b_ptrs, b_LN, mask=saved[:, None] & owns[2])


@triton.jit
def weigh(position, total, dt_L, decay_terms):
    """d and the log decay after each row [L], 0 past the last of `total` rows, and all decay."""
    d_L = tl.where(position < total, time_steps(dt_L, decay_terms), 0.0)
    log_decay_L = d_L * decay_terms[0]
    # A suffix sum, not a difference of prefix sums, which loses digits on long paths.
    later = position[:, None] > position[None, :]
    after_L = tl.sum(tl.where(later, log_decay_L[:, None], 0.0), axis=0)
    return d_L, after_L, tl.sum(log_decay_L, axis=0)


@triton.jit
def advance(state, past, counts, total, decay_terms, dims_P, dims_N, owns, saves):
    """The state tile [P, N] after the first `total` accepted rows, which may be none.

    With `saves` the path's rows are stored behind the buffered ones.
    """
    for begin in range(0, tl.maximum(total, 1), BUFFERED):
        position = begin + tl.arange(0, BUFFERED)
        x_PL, dt_L, b_LN, in_path = load_past(position, past, counts, dims_P, dims_N)
        keep_rows(position, past, x_PL, dt_L, b_LN, in_path & saves, dims_P, dims_N, owns)
        d_L, after_L, decay = weigh(position, total, dt_L, decay_terms)
        weighted_PL = x_PL.to(tl.float32) * (tl.exp(after_L) * d_L)[None, :]
        state = dot_wide(weighted_PL, b_LN, state * tl.exp(decay))
    return state
