"""Attend to a committed cache and, in a block of rows, to a token tree, in two Triton kernels.

The work is that of `tree_attention_ref`. Keys are cut into tiles: those of the cache up to the
committed length, then those of the block. One program takes the query rows of one kv head of one
slot against an equal share of the tiles, with a running softmax in fp32; a second kernel merges the
shares in a fixed order. The number of shares is chosen on the host, their length on the device.
Source: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding (pytorch.org/blog/flash-decoding).

Shape letters: B slots, R rows of a block buffer, T rows of this pass, S cache positions, H heads or
kv heads, D head dim, Q query rows of a kv head (T times its heads), K keys of a tile, N shares.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels import pdl
from stree_kernels.key_rows_ref import KeyValues
from stree_kernels.pdl import launch_options, wait_for_previous
from stree_kernels.rows import FLOATS, check_cover, require_dtypes, require_packed

MAX_ROWS = 256
MAX_GROUP = 16
MAX_POSITIONS = 1 << 20
HEAD_DIMS = (16, 32, 64, 128, 256)
# Enough programs for every multiprocessor of an H100 or H200; a constant, so that what a program
# sums, and with it every output bit, is the same on every GPU.
NUM_PROGRAMS = 132
MAX_SHARES = 64


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How a launch is cut: query rows and keys of a tile, a program's warps, tiles in flight."""

    max_head_dim: int
    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Sized by registers and shared memory (`benchmarks/aot.py`) and by times on an H200: one token over
# 16k tokens takes 21 us with 4 stages of 64 keys, 26 with 3.
CONFIGS = (
    AttentionConfig(64, block_queries=16, block_keys=64, num_warps=4, num_stages=3),
    AttentionConfig(64, block_queries=32, block_keys=64, num_warps=4, num_stages=3),
    AttentionConfig(64, block_queries=64, block_keys=64, num_warps=4, num_stages=3),
    AttentionConfig(64, block_queries=128, block_keys=64, num_warps=8, num_stages=3),
    AttentionConfig(128, block_queries=16, block_keys=64, num_warps=4, num_stages=4),
    AttentionConfig(128, block_queries=32, block_keys=64, num_warps=4, num_stages=3),
    AttentionConfig(128, block_queries=64, block_keys=32, num_warps=4, num_stages=4),
    AttentionConfig(128, block_queries=128, block_keys=32, num_warps=8, num_stages=4),
    AttentionConfig(256, block_queries=16, block_keys=32, num_warps=4, num_stages=3),
    AttentionConfig(256, block_queries=64, block_keys=32, num_warps=8, num_stages=2),
)
FP32_CONFIGS = (AttentionConfig(128, block_queries=16, block_keys=32, num_warps=4, num_stages=3),)


SMALL_MEMORY = (86, 89)
"""Compute capabilities whose blocks have 99 KiB of shared memory: room for fewer stages."""
MAX_STAGES_THERE = 3


def pick_config(num_queries: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Return the smallest config whose tile holds all query rows of a kv head, else the largest."""
    table = FP32_CONFIGS if dtype == torch.float32 else CONFIGS
    max_head_dim = min(c.max_head_dim for c in table if head_dim <= c.max_head_dim)
    fitting = [config for config in table if config.max_head_dim == max_head_dim]
    return next((c for c in fitting if num_queries <= c.block_queries), fitting[-1])


def pick_shares(config: AttentionConfig, num_queries: int, num_pairs: int) -> int:
    """Return into how many shares the keys are cut, for `num_pairs` kv heads of all slots."""
    num_tiles = -(-num_queries // config.block_queries)
    return max(1, min(MAX_SHARES, NUM_PROGRAMS // (num_tiles * num_pairs)))


@functools.cache
def workspace_size(
    num_tokens: int, num_slots: int, num_heads: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Return how many fp32 values `tree_attention` needs for passes of up to `num_tokens` rows."""
    sizes = [0]
    for tokens in range(1, num_tokens + 1):
        num_queries = tokens * (num_heads // num_kv_heads)
        config = pick_config(num_queries, head_dim, dtype)
        shares = pick_shares(config, num_queries, num_slots * num_kv_heads)
        if shares > 1:
            sizes.append(shares * tokens * num_slots * num_heads * (head_dim + 2))
    return max(sizes)


@triton.jit
def _attend(state, q, scale, key_ptrs, value_ptrs, valid_K, seen_QK):
    """The running (greatest score, sum of weights, weighted values) with one more tile of keys.

    In fp32 a product is three of tensor cores, exact to about 1e-6: "ieee" would need both
    operands' whole rows in registers.
    """
    greatest_Q, total_Q, sum_QD = state
    key_KD = tl.load(key_ptrs, mask=valid_K[:, None], other=0.0)
    score_QK = tl.dot(q, tl.trans(key_KD), input_precision="tf32x3") * scale
    score_QK = tl.where(seen_QK, score_QK, -float("inf"))
    now_Q = tl.maximum(greatest_Q, tl.max(score_QK, 1))
    # A row that has seen nothing yet: -inf - -inf is NaN.
    shift_Q = tl.where(now_Q == -float("inf"), 0.0, now_Q)
    weight_QK = tl.exp2(score_QK - shift_Q[:, None])
    fade_Q = tl.exp2(greatest_Q - shift_Q)
    value_KD = tl.load(value_ptrs, mask=valid_K[:, None], other=0.0)
    sum_QD = tl.dot(
        weight_QK.to(value_KD.dtype), value_KD, sum_QD * fade_Q[:, None], input_precision="tf32x3"
    )
    return now_Q, total_Q * fade_Q + tl.sum(weight_QK, 1), sum_QD


@triton.jit
def _attend_cache(
    state, q, scale, key_ptr, value_ptr, tiles, num_committed,
    ROW: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to some tiles of one kv head's committed keys, which lie ROW values apart."""
    keys_K, dims_D = tl.arange(0, BLOCK_K), tl.arange(0, q.shape[1])
    inside_KD = keys_K[:, None] * ROW + dims_D[None, :]
    tile_values = tl.full((), BLOCK_K * ROW, tl.int64)
    for tile in tl.range(tiles[0], tiles[1], num_stages=NUM_STAGES):
        valid_K = tile * BLOCK_K + keys_K < num_committed
        offset = tile * tile_values
        state = _attend(
            state, q, scale, key_ptr + offset + inside_KD, value_ptr + offset + inside_KD, valid_K,
            valid_K[None, :],
        )  # fmt: skip
    return state


@triton.jit
def _attend_block(
    state, q, scale, key_ptr, value_ptr, mask_ptr, mask_Q, exists_Q, tiles, num_rows, stride_r,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attend to some tiles of the block's rows; `mask_Q` is where a query's row of M starts."""
    keys_K, dims_D = tl.arange(0, BLOCK_K), tl.arange(0, q.shape[1])
    inside_KD = keys_K[:, None] * stride_r + dims_D[None, :]
    tile_values = tl.full((), BLOCK_K, tl.int64) * stride_r
    for tile in tl.range(tiles[0], tiles[1], num_stages=1):
        row_K = tile * BLOCK_K + keys_K
        valid_K = row_K < num_rows
        seen_QK = tl.load(
            mask_ptr + (mask_Q[:, None] + row_K[None, :]),
            mask=exists_Q[:, None] & valid_K[None, :], other=0,
        )  # fmt: skip
        offset = tile * tile_values
        state = _attend(
            state, q, scale, key_ptr + offset + inside_KD, value_ptr + offset + inside_KD, valid_K,
            seen_QK != 0,
        )  # fmt: skip
    return state


@triton.jit(do_not_specialize=["first", "num_tokens", "num_slots", "num_positions", "num_shares"])
def _tree_attention_kernel(
    # pointers
    q_ptr, key_ptr, value_ptr, key_rows_ptr, value_rows_ptr, mask_ptr, committed_ptr, out_ptr,
    workspace_ptr,
    # sizes
    scale, first, num_tokens, num_slots, num_positions, num_shares,
    # strides
    stride_mask_r,
    # meta
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    ONE_SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    pair, share = tl.program_id(2), tl.program_id(1)
    slot, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
    query = tl.program_id(0) * BLOCK_Q
    query_Q = query + tl.arange(0, BLOCK_Q)
    token_Q = query_Q // GROUP
    exists_Q = token_Q < num_tokens
    # A place is a query head of a row, counted as q and the output lie in memory.
    token_places = num_slots * (NUM_KV_HEADS * GROUP)
    place = (query // GROUP).to(tl.int64) * token_places + pair * GROUP
    inside_Q = (token_Q - query // GROUP) * token_places + query_Q % GROUP
    inside_QD = inside_Q[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    q = tl.load(q_ptr + place * HEAD_DIM + inside_QD, mask=exists_Q[:, None], other=0.0)

    num_committed = tl.load(committed_ptr + slot)
    num_cached = tl.cdiv(num_committed, BLOCK_K)
    num_tiles = num_cached + tl.cdiv(first + num_tokens, BLOCK_K)
    start = share * tl.cdiv(num_tiles, num_shares)
    stop = tl.minimum(start + tl.cdiv(num_tiles, num_shares), num_tiles)
    state = (
        tl.full((BLOCK_Q,), -float("inf"), tl.float32),
        tl.full((BLOCK_Q,), 0.0, tl.float32),
        tl.full((BLOCK_Q, HEAD_DIM), 0.0, tl.float32),
    )
    offset = (slot.to(tl.int64) * num_positions * NUM_KV_HEADS + head) * HEAD_DIM
    state = _attend_cache(
        state, q, scale, key_ptr + offset, value_ptr + offset,
        (start, tl.minimum(stop, num_cached)), num_committed, NUM_KV_HEADS * HEAD_DIM, BLOCK_K,
        NUM_STAGES,
    )  # fmt: skip
    offset = pair * HEAD_DIM
    greatest_Q, total_Q, sum_QD = _attend_block(
        state, q, scale, key_rows_ptr + offset, value_rows_ptr + offset,
        mask_ptr, (first + token_Q) * stride_mask_r, exists_Q,
        (tl.maximum(start - num_cached, 0), stop - num_cached), first + num_tokens,
        num_slots * NUM_KV_HEADS * HEAD_DIM, BLOCK_K,
    )  # fmt: skip
    if ONE_SHARE:
        # Queries that fill up the tile may have seen nothing.
        part_Q = 1.0 / tl.where(exists_Q, total_Q, 1.0)
        out_ptrs = out_ptr + place * HEAD_DIM + inside_QD
        tl.store(out_ptrs, sum_QD * part_Q[:, None], mask=exists_Q[:, None])
    else:
        # Per share: sums, greatest scores, totals, each for all places.
        num_places = num_tokens.to(tl.int64) * token_places
        share_ptr = workspace_ptr + share * num_places * (HEAD_DIM + 2)
        worked_Q = exists_Q & (start < stop)
        tl.store(share_ptr + place * HEAD_DIM + inside_QD, sum_QD, mask=worked_Q[:, None])
        place_ptrs = share_ptr + num_places * HEAD_DIM + place + inside_Q
        tl.store(place_ptrs, greatest_Q, mask=exists_Q)
        tl.store(place_ptrs + num_places, total_Q, mask=exists_Q)


@triton.jit(do_not_specialize=["num_shares"])
def _merge_kernel(
    # pointers
    workspace_ptr, out_ptr,
    # sizes
    num_shares,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    place, num_places = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    shares_N, dims_D = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    share_ptrs = workspace_ptr + shares_N * num_places * (HEAD_DIM + 2)
    exists_N = shares_N < num_shares
    place_ptrs = share_ptrs + num_places * HEAD_DIM + place
    greatest_N = tl.load(place_ptrs, mask=exists_N, other=-float("inf"))
    total_N = tl.load(place_ptrs + num_places, mask=exists_N, other=0.0)
    # A row sees itself, so one of them is finite. Where a share has seen nothing its sums may not
    # have been written.
    seen_N1 = (greatest_N > -float("inf"))[:, None]
    sum_ptrs = share_ptrs[:, None] + place * HEAD_DIM + dims_D[None, :]
    sum_ND = tl.load(sum_ptrs, mask=seen_N1, other=0.0)
    fade_N = tl.exp2(greatest_N - tl.max(greatest_N, 0))
    merged_D = tl.sum(sum_ND * fade_N[:, None], 0) / tl.sum(total_N * fade_N, 0)
    tl.store(out_ptr + place * HEAD_DIM + dims_D, merged_D)


def tree_attention(
    q_TBHD: Tensor,
    cache: KeyValues,
    rows: KeyValues,
    mask_RR: Tensor,
    committed_B: Tensor,
    *,
    first: int,
    scale: float,
    out_TBHD: Tensor,
    workspace: Tensor,
) -> None:
    """Attend from rows first..first + T - 1 to committed tokens and rows in their mask.

    The contract is that of `tree_attention_ref.tree_attention`, in a dtype of `FLOATS`; NaN in
    unused parts of `cache` and `rows` does no harm. `workspace` holds `workspace_size` fp32 values,
    which need no preparation.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_tokens, num_slots, num_heads, head_dim = q_TBHD.shape
    num_kv_heads, num_positions = rows.key.shape[2], cache.key.shape[1]
    _check(q_TBHD, cache, rows, mask_RR, committed_B, out_TBHD, first)
    group = num_heads // num_kv_heads
    config = pick_config(num_tokens * group, head_dim, q_TBHD.dtype)
    num_pairs = num_slots * num_kv_heads
    num_shares = pick_shares(config, num_tokens * group, num_pairs)
    # A cache of this size has no more tiles.
    max_tiles = triton.cdiv(num_positions, config.block_keys)
    max_tiles += triton.cdiv(first + num_tokens, config.block_keys)
    num_shares = min(num_shares, max_tiles)
    num_places = num_tokens * num_slots * num_heads
    one_share = num_shares == 1
    _check_workspace(workspace, 0 if one_share else num_shares * num_places * (head_dim + 2))
    options = launch_options(q_TBHD.device)
    is_small = pdl.capability(q_TBHD.device) in SMALL_MEMORY
    num_stages = min(config.num_stages, MAX_STAGES_THERE) if is_small else config.num_stages
    grid = (triton.cdiv(num_tokens * group, config.block_queries), num_shares, num_pairs)
    _tree_attention_kernel[grid](
        q_TBHD, *cache, *rows, mask_RR, committed_B, out_TBHD, workspace, scale * math.log2(math.e),
        first, num_tokens, num_slots, num_positions, num_shares, mask_RR.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_Q=config.block_queries,
        BLOCK_K=config.block_keys, NUM_STAGES=num_stages, ONE_SHARE=one_share,
        num_warps=config.num_warps, **options,
    )  # fmt: skip
    if not one_share:
        _merge_kernel[(num_places,)](
            workspace, out_TBHD, num_shares, HEAD_DIM=head_dim,
            BLOCK_N=triton.next_power_of_2(num_shares), num_warps=4, **options,
        )  # fmt: skip


def _check(
    q: Tensor, cache: KeyValues, rows: KeyValues, mask: Tensor, committed: Tensor, out: Tensor,
    first: int,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernel cannot take."""
    num_tokens, num_heads, head_dim = q.shape[0], q.shape[2], q.shape[3]
    num_kv_heads, num_positions, num_rows = (
        rows.key.shape[2],
        cache.key.shape[1],
        first + num_tokens,
    )
    max_head_dim = FP32_CONFIGS[-1].max_head_dim if q.dtype == torch.float32 else HEAD_DIMS[-1]
    if head_dim not in HEAD_DIMS or head_dim > max_head_dim:
        raise ValueError(
            f"the attention kernel takes head dims {HEAD_DIMS} up to {max_head_dim} in "
            f"{q.dtype}, got {head_dim}; use the torch backend"
        )
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise ValueError(
            f"the attention kernel takes 1 to {MAX_GROUP} query heads for each kv head, got "
            f"{num_heads} and {num_kv_heads}; use the torch backend"
        )
    if num_rows > MAX_ROWS or num_positions > MAX_POSITIONS:
        raise ValueError(
            f"the attention kernel takes {MAX_ROWS} rows and {MAX_POSITIONS} positions, got "
            f"{num_rows} and {num_positions}; use a smaller tree or cache"
        )
    check_cover(num_rows, len(mask), len(rows.key), len(rows.value))
    blocks = (q, out, *cache, *rows)
    require_dtypes("q, the cache, rows and output", blocks, FLOATS)
    require_dtypes("the mask", (mask,), (torch.bool,))
    require_dtypes("the committed lengths", (committed,), (torch.int32,))
    require_packed("q, the cache, a row buffer or the output", blocks, 4)
    require_packed("a row of the mask or the lengths", (mask, committed), 1)


def _check_workspace(workspace: Tensor, num_values: int) -> None:
    """Raise ValueError unless the workspace holds this many fp32 values."""
    if workspace.numel() < num_values or workspace.dtype != torch.float32:
        raise ValueError(
            f"the workspace holds {num_values} fp32 values, got {workspace.numel()} of "
            f"{workspace.dtype}; ask `workspace_size` with the cache's slots"
        )
    require_packed("the workspace", (workspace,), workspace.ndim)
