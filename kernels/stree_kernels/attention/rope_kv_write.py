"""Rotate and file the queries, keys and values of a pass, in one Triton kernel.

The work is that of `rope_kv_write_ref`. Some programs split one row of the projection each, block
of heads by block of heads; others append a piece of the pending path to the cache. No program reads
what another one writes.

Shape letters: B slots, R rows of a block buffer, T rows of this pass, S cache positions, L path
capacity, H heads or kv heads, D head dim, X columns of a projection or angles of a rotation.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, Pending, check_cover, require_dtypes, require_packed
from stree_kernels.launch.shared_memory import match_neighbours

HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_POSITIONS = 1 << 20
# One choice for all sizes: a program moves a few kilobytes, and one token makes several programs.
BLOCK_VALUES = 1024
BLOCK_PATH = 16
NUM_WARPS = 4
# 2 pi as a sum. The first two have so few bits that their product with a number of turns below
# 2^18 is exact, and so is the difference from an angle below 2^20.
TURN = tl.constexpr(6.25)
TURN_NEXT = tl.constexpr(0.033203125)
TURN_REST = tl.constexpr(2 * math.pi - 6.25 - 0.033203125)
PER_TURN = tl.constexpr(0.5 / math.pi)


@triton.jit
def cos_sin(angle):
    """cos and sin of fp32 angles below 2^20, with errors below 1e-6.

    Triton's own sin and cos take a slow path through local memory for angles above 1e5.
    """
    turns = tl.floor(angle * PER_TURN + 0.5)
    half = 0.5 * (((angle - turns * TURN) - turns * TURN_NEXT) - turns * TURN_REST)
    square = half * half
    # Taylor series to the 13th power, enough for half an angle: it is at most pi / 2.
    cos_half, sin_half = 1.0, 1.0
    for step in tl.static_range(6):
        cos_half = 1.0 - square * (1.0 / ((12 - 2 * step) * (11 - 2 * step))) * cos_half
        sin_half = 1.0 - square * (1.0 / ((12 - 2 * step) * (13 - 2 * step))) * sin_half
    sin_half = half * sin_half
    return 1.0 - 2.0 * sin_half * sin_half, 2.0 * sin_half * cos_half


@triton.jit
def _append(
    work, path_ptr, length_ptr, committed_ptr, prev_key_ptr, prev_value_ptr, cache_key_ptr,
    cache_value_ptr, num_slots, num_positions, stride_path_b,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Copy some of a path's rows of one kv head to the end of the slot's committed tokens."""
    slot = work // NUM_KV_HEADS % num_slots
    entry_L = work // (NUM_KV_HEADS * num_slots) * BLOCK_L + tl.arange(0, BLOCK_L)
    length = tl.load(length_ptr + slot)
    position_L = tl.load(committed_ptr + slot) - length + entry_L
    valid = entry_L < length
    row_L = tl.load(path_ptr + slot * stride_path_b + entry_L, mask=valid, other=0).to(tl.int64)
    dims_D = work % NUM_KV_HEADS * HEAD_DIM + tl.arange(0, HEAD_DIM)
    row_values: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    sources = (row_L * num_slots + slot)[:, None] * row_values + dims_D[None, :]
    targets = position_L.to(tl.int64)[:, None] * row_values + dims_D[None, :]
    targets += slot.to(tl.int64) * num_positions * row_values
    key = tl.load(prev_key_ptr + sources, mask=valid[:, None], other=0.0)
    value = tl.load(prev_value_ptr + sources, mask=valid[:, None], other=0.0)
    tl.store(cache_key_ptr + targets, key, mask=valid[:, None])
    tl.store(cache_value_ptr + targets, value, mask=valid[:, None])


@triton.jit
def norm_heads(x, partner, head_H1, dims_D, partner_D, q_norm_ptr, k_norm_ptr, eps, NUM_HEADS):
    """Heads of q and k and their rotation's partners, normed; v's likewise, of no use."""
    square_H = tl.sum(x * x, axis=1)
    scale_H1 = (1.0 / tl.sqrt(square_H * (1.0 / x.shape[1]) + eps))[:, None]
    is_q = head_H1 < NUM_HEADS
    weight = tl.where(
        is_q, tl.load(q_norm_ptr + dims_D)[None, :], tl.load(k_norm_ptr + dims_D)[None, :]
    )
    of_partner = tl.where(
        is_q, tl.load(q_norm_ptr + partner_D)[None, :], tl.load(k_norm_ptr + partner_D)[None, :]
    )
    return x * scale_H1 * weight, partner * scale_H1 * of_partner


@triton.jit
def _split(
    work, inv_freq_D, depth_ptr, committed_ptr, qkv_ptr, q_ptr, key_ptr, value_ptr, q_norm_ptr,
    k_norm_ptr, eps, first, num_slots, stride_qkv_row, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_ANGLES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of one row; store each where it belongs."""
    num_blocks: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    row = work // num_blocks
    position = tl.load(committed_ptr + row % num_slots) + tl.load(
        depth_ptr + first + row // num_slots
    )
    cos_D, sin_D = cos_sin(position.to(tl.float32) * inv_freq_D)
    dims_D = tl.arange(0, HEAD_DIM)
    is_low = dims_D < NUM_ANGLES
    partner_D = tl.where(is_low, dims_D + NUM_ANGLES, dims_D - NUM_ANGLES)
    head_H1 = (work % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    exists = head_H1 < NUM_HEADS + 2 * NUM_KV_HEADS
    rotated = exists & (dims_D < 2 * NUM_ANGLES)[None, :]
    ptrs = qkv_ptr + row.to(tl.int64) * stride_qkv_row + head_H1 * HEAD_DIM
    x = tl.load(ptrs + dims_D[None, :], mask=exists, other=0.0).to(tl.float32)
    partner = tl.load(ptrs + partner_D[None, :], mask=rotated, other=0.0).to(tl.float32)
    turning = x
    if q_norm_ptr is not None:
        turning, partner = norm_heads(
            x, partner, head_H1, dims_D, partner_D, q_norm_ptr, k_norm_ptr, eps, NUM_HEADS
        )
    turned = turning * cos_D[None, :] + partner * tl.where(is_low, -sin_D, sin_D)[None, :]
    q_ptrs = q_ptr + (row.to(tl.int64) * NUM_HEADS + head_H1) * HEAD_DIM + dims_D[None, :]
    tl.store(q_ptrs, turned, mask=head_H1 < NUM_HEADS)
    first_head = (first * num_slots + row).to(tl.int64) * NUM_KV_HEADS
    k_head_H1 = head_H1 - NUM_HEADS
    key_ptrs = key_ptr + (first_head + k_head_H1) * HEAD_DIM + dims_D[None, :]
    tl.store(key_ptrs, turned, mask=(k_head_H1 >= 0) & (k_head_H1 < NUM_KV_HEADS))
    v_head_H1 = k_head_H1 - NUM_KV_HEADS
    value_ptrs = value_ptr + (first_head + v_head_H1) * HEAD_DIM + dims_D[None, :]
    tl.store(value_ptrs, x, mask=(v_head_H1 >= 0) & exists)


@triton.jit(do_not_specialize=["first", "num_slots", "num_row_programs", "num_positions"])
def _rope_kv_write_kernel(
    # pointers
    qkv_ptr, depth_ptr, committed_ptr, inv_freq_ptr, q_ptr, key_ptr, value_ptr,
    cache_key_ptr, cache_value_ptr, prev_key_ptr, prev_value_ptr, path_ptr, length_ptr,
    q_norm_ptr, k_norm_ptr,
    # sizes
    eps, first, num_slots, num_row_programs, num_positions,
    # strides
    stride_qkv_row, stride_path_b,
    # meta
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_ANGLES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    dims_D = tl.arange(0, HEAD_DIM)
    # An angle of 0 leaves the dims behind the rotated ones as they are.
    inv_freq_D = tl.load(
        inv_freq_ptr + dims_D % NUM_ANGLES, mask=dims_D < 2 * NUM_ANGLES, other=0.0
    )
    wait_for_previous(PDL)
    if program < num_row_programs:
        _split(
            program, inv_freq_D, depth_ptr, committed_ptr, qkv_ptr, q_ptr, key_ptr, value_ptr,
            q_norm_ptr, k_norm_ptr, eps, first, num_slots, stride_qkv_row, NUM_HEADS,
            NUM_KV_HEADS, HEAD_DIM, NUM_ANGLES, BLOCK_H,
        )  # fmt: skip
    elif path_ptr is not None:
        _append(
            program - num_row_programs, path_ptr, length_ptr, committed_ptr, prev_key_ptr,
            prev_value_ptr, cache_key_ptr, cache_value_ptr, num_slots, num_positions,
            stride_path_b, NUM_KV_HEADS, HEAD_DIM, BLOCK_L,
        )  # fmt: skip


def rope_kv_write(
    qkv_TBX: Tensor,
    depth_R: Tensor,
    committed_B: Tensor,
    inv_freq_X: Tensor,
    *,
    first: int,
    q_TBHD: Tensor,
    rows: KeyValues,
    cache: KeyValues,
    previous: KeyValues | None,
    pending: Pending | None,
    norms: HeadNorms | None = None,
) -> None:
    """Split the projection of rows first..first + T - 1 into `q_TBHD` and `rows`, rotated.

    The contract is that of `rope_kv_write_ref.rope_kv_write`, with activations of a dtype in
    `FLOATS`, rotations in fp32 and positions up to 2^20. Raises ValueError when a size, dtype or
    stride is beyond what the kernel takes.
    """
    num_tokens, num_slots, num_heads, head_dim = q_TBHD.shape
    num_kv_heads = rows.key.shape[2]
    path, length = (pending.path_BL, pending.length_B) if pending else (None, None)
    _check(
        qkv_TBX, q_TBHD, (depth_R, committed_B), inv_freq_X, rows, cache,
        previous if pending else None, pending, norms, first,
    )  # fmt: skip
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    prev_key, prev_value = previous if pending and previous else (None, None)
    block_heads = BLOCK_VALUES // head_dim
    num_blocks = triton.cdiv(num_heads + 2 * num_kv_heads, block_heads)
    num_row_programs = num_tokens * num_slots * num_blocks
    num_pieces = 0 if path is None else triton.cdiv(path.shape[1], BLOCK_PATH)
    num_programs = num_row_programs + num_pieces * num_slots * num_kv_heads
    kernel = _rope_kv_write_kernel[(num_programs,)](
        qkv_TBX, depth_R, committed_B, inv_freq_X, q_TBHD, *rows, *cache, prev_key, prev_value,
        path, length, q_norm, k_norm, eps, first, num_slots, num_row_programs, cache.key.shape[1],
        qkv_TBX.stride(0 if num_slots == 1 else 1), 0 if path is None else path.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        NUM_ANGLES=len(inv_freq_X), BLOCK_H=block_heads, BLOCK_L=BLOCK_PATH, num_warps=NUM_WARPS,
        num_stages=1, **launch_options(qkv_TBX.device),
    )  # fmt: skip
    match_neighbours(kernel, qkv_TBX.device, num_tokens * num_slots, one_token=num_tokens == 1)


def _check(
    qkv: Tensor, q: Tensor, counts: tuple[Tensor, Tensor], inv_freq: Tensor, rows: KeyValues,
    cache: KeyValues, previous: KeyValues | None, pending: Pending | None,
    norms: HeadNorms | None, first: int,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernel cannot take."""
    num_tokens, _, num_heads, head_dim = q.shape
    num_kv_heads, num_positions = rows.key.shape[2], cache.key.shape[1]
    if head_dim not in HEAD_DIMS or not 0 < 2 * len(inv_freq) <= head_dim:
        raise ValueError(
            f"the key kernel takes head dims {HEAD_DIMS} of which at least 2 are rotated, got "
            f"{head_dim} and {2 * len(inv_freq)}; use the torch backend"
        )
    if num_positions > MAX_POSITIONS:
        raise ValueError(
            f"the key kernel takes up to {MAX_POSITIONS} positions, got {num_positions}; "
            "use a smaller cache"
        )
    if qkv.shape[2] != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(
            f"a row holds the heads of q, k and v, {num_heads} + 2 x {num_kv_heads} times "
            f"{head_dim}, got {qkv.shape[2]} columns; pass the whole projection"
        )
    if pending and previous is None:
        raise ValueError("a pending path needs the rows it names, got none; pass `previous`")
    check_cover(first + num_tokens, len(counts[0]), len(rows.key), len(rows.value))
    buffers = (q, *rows, *(previous or ()))
    require_dtypes("the projection, rows and cache", (qkv, *buffers, *cache), FLOATS)
    weights = () if norms is None else norms[:2]
    if any(weight.shape != (head_dim,) for weight in weights):
        raise ValueError(
            f"norms of heads have {head_dim} weights, got {[tuple(w.shape) for w in weights]}; "
            "pass those of one layer"
        )
    require_dtypes("the rotation and norms", (inv_freq, *weights), (torch.float32,))
    require_dtypes("depths, counts and the path", (*counts, *(pending or ())), (torch.int32,))
    require_packed("q, a row buffer or the cache", (*buffers, *cache), 4)
    require_packed("a row of the projection or path", (qkv, inv_freq, *counts, *(pending or ())), 1)
    if 1 not in qkv.shape[:2] and qkv.stride(0) != qkv.shape[1] * qkv.stride(1):
        raise ValueError(
            f"the projection's rows lie at one distance, got strides {qkv.stride()}; pass a "
            "contiguous buffer or columns of one"
        )
