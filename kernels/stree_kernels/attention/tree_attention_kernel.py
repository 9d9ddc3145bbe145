"""Attention to a committed cache and to a token tree: a share of the keys, and the merge of shares.

One program takes the query rows of one kv head of one slot against an equal share of the tiles of
keys, with a running softmax in fp32; a second kernel merges the shares in a fixed order.
Source: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding (pytorch.org/blog/flash-decoding).

Shape letters: D head dim, Q query rows of a kv head (rows of the pass times its heads), K keys of a
tile, N shares.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.launch.pdl import wait_for_previous


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
def tree_attention_kernel(
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
    """Attend to one share of the keys; with ONE_SHARE write the output, else the workspace."""
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
def merge_kernel(
    # pointers
    workspace_ptr, out_ptr,
    # sizes
    num_shares,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one place, a query head of a row, into the output."""
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
