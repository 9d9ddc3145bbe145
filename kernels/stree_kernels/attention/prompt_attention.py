"""File the keys and values of packed prompts, and attend to them, in two Triton kernels.

The work is that of `prompt_attention_ref`. A program of the attention takes a tile of one
sequence's queries of one head against its slot's keys, with a running softmax in fp32.
Source: FlashAttention-2 (arXiv:2307.08691).

Shape letters: M packed tokens, S sequences, B slots, P cache positions, H heads or kv heads,
D head dim, Q queries of a tile, K keys of a tile, X columns of a projection or angles.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.attention.rope_kv_write import (
    BLOCK_VALUES,
    HEAD_DIMS,
    MAX_POSITIONS,
    NUM_WARPS,
    cos_sin,
    norm_heads,
)
from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues
from stree_kernels.launch import pdl
from stree_kernels.launch.packing import Packing, check_packing, num_tiles
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.tiles import find_tile, find_token


@dataclass(frozen=True, slots=True)
class PromptAttentionConfig:
    """Queries and keys of a tile, a program's warps, tiles of keys under way."""

    max_head_dim: int
    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Never autotuned: the order of sums is the tiles'.
CONFIGS = (
    PromptAttentionConfig(64, 128, 64, 4, 3),
    PromptAttentionConfig(128, 128, 64, 8, 3),
    PromptAttentionConfig(256, 64, 32, 8, 2),
)
# Before compute capability 9.0 a block has less shared memory; newer ones were not measured.
OTHER_CONFIGS = (
    PromptAttentionConfig(128, 64, 32, 4, 2),
    PromptAttentionConfig(256, 32, 32, 4, 1),
)
FP32_CONFIG = PromptAttentionConfig(128, 16, 32, 4, 2)
"""With wider heads it spills (docs/log.md), as the attention to a tree does."""


def pick_config(head_dim: int, dtype: torch.dtype, capability: int) -> PromptAttentionConfig:
    """Return the config for heads of this size."""
    if dtype == torch.float32:
        return FP32_CONFIG
    table = CONFIGS if capability == 90 else OTHER_CONFIGS
    return next(config for config in table if head_dim <= config.max_head_dim)


@triton.jit
def _prompt_kv_write_kernel(
    # pointers
    qkv_ptr, offsets_ptr, slots_ptr, starts_ptr, inv_freq_ptr, q_ptr, key_ptr, value_ptr,
    q_norm_ptr, k_norm_ptr,
    # sizes
    eps, num_sequences, num_positions,
    # strides
    stride_qkv_m,
    # meta
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_ANGLES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate a block of heads of one token; store each where it belongs."""
    token = tl.program_id(0)
    dims_D = tl.arange(0, HEAD_DIM)
    # An angle of 0 leaves the dims behind the rotated ones as they are.
    inv_freq_D = tl.load(
        inv_freq_ptr + dims_D % NUM_ANGLES, mask=dims_D < 2 * NUM_ANGLES, other=0.0
    )
    wait_for_previous(PDL)
    sequence, start, is_somebodys = find_token(offsets_ptr, num_sequences, token, BLOCK_S)
    if is_somebodys:
        position = tl.load(starts_ptr + sequence) + token - start
        cos_D, sin_D = cos_sin(position.to(tl.float32) * inv_freq_D)
        is_low = dims_D < NUM_ANGLES
        partner_D = tl.where(is_low, dims_D + NUM_ANGLES, dims_D - NUM_ANGLES)
        head_H1 = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        exists = head_H1 < NUM_HEADS + 2 * NUM_KV_HEADS
        rotated = exists & (dims_D < 2 * NUM_ANGLES)[None, :]
        ptrs = qkv_ptr + token.to(tl.int64) * stride_qkv_m + head_H1 * HEAD_DIM
        x = tl.load(ptrs + dims_D[None, :], mask=exists, other=0.0).to(tl.float32)
        partner = tl.load(ptrs + partner_D[None, :], mask=rotated, other=0.0).to(tl.float32)
        turning = x
        if q_norm_ptr is not None:
            turning, partner = norm_heads(
                x, partner, head_H1, dims_D, partner_D, q_norm_ptr, k_norm_ptr, eps, NUM_HEADS
            )
        turned = turning * cos_D[None, :] + partner * tl.where(is_low, -sin_D, sin_D)[None, :]
        q_ptrs = q_ptr + (token.to(tl.int64) * NUM_HEADS + head_H1) * HEAD_DIM + dims_D[None, :]
        tl.store(q_ptrs, turned, mask=head_H1 < NUM_HEADS)
        place = tl.load(slots_ptr + sequence).to(tl.int64) * num_positions + position
        k_head_H1 = head_H1 - NUM_HEADS
        key_ptrs = key_ptr + (place * NUM_KV_HEADS + k_head_H1) * HEAD_DIM + dims_D[None, :]
        tl.store(key_ptrs, turned, mask=(k_head_H1 >= 0) & (k_head_H1 < NUM_KV_HEADS))
        v_head_H1 = k_head_H1 - NUM_KV_HEADS
        value_ptrs = value_ptr + (place * NUM_KV_HEADS + v_head_H1) * HEAD_DIM + dims_D[None, :]
        tl.store(value_ptrs, x, mask=(v_head_H1 >= 0) & exists)


@triton.jit
def _attend(
    state, q, scale, key_ptrs, value_ptrs, first_key, positions_Q, num_keys,
    WHOLE: tl.constexpr, ROW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The running (greatest score, sum of weights, weighted values) with one more tile of keys.

    WHOLE tiles are seen by all queries; of others a query sees the keys up to its position.
    """
    greatest_Q, total_Q, sum_QD = state
    offset = first_key * tl.full((), ROW, tl.int64)
    if WHOLE:
        key_KD = tl.load(key_ptrs + offset)
        value_KD = tl.load(value_ptrs + offset)
        score_QK = tl.dot(q, tl.trans(key_KD), input_precision="tf32x3") * scale
    else:
        keys_K = first_key + tl.arange(0, BLOCK_K)
        exists_K1 = (keys_K < num_keys)[:, None]
        key_KD = tl.load(key_ptrs + offset, mask=exists_K1, other=0.0)
        value_KD = tl.load(value_ptrs + offset, mask=exists_K1, other=0.0)
        score_QK = tl.dot(q, tl.trans(key_KD), input_precision="tf32x3") * scale
        score_QK = tl.where(keys_K[None, :] <= positions_Q[:, None], score_QK, -float("inf"))
    # Every query sees the slot's first key, which is in the first tile: this is finite.
    now_Q = tl.maximum(greatest_Q, tl.max(score_QK, 1))
    weight_QK = tl.exp2(score_QK - now_Q[:, None])
    fade_Q = tl.exp2(greatest_Q - now_Q)
    sum_QD = tl.dot(
        weight_QK.to(value_KD.dtype), value_KD, sum_QD * fade_Q[:, None], input_precision="tf32x3"
    )
    return now_Q, total_Q * fade_Q + tl.sum(weight_QK, 1), sum_QD


@triton.jit
def _prompt_attention_kernel(
    # pointers
    q_ptr, key_ptr, value_ptr, offsets_ptr, slots_ptr, starts_ptr, out_ptr,
    # sizes
    scale, num_sequences, num_positions,
    # meta
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # The last tiles of a prompt see most keys: they come first.
    number, head = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0)
    wait_for_previous(PDL)
    sequence, start, first, end = find_tile(offsets_ptr, num_sequences, number, BLOCK_Q, BLOCK_S)
    if first < end:
        rows_Q, dims_D = first + tl.arange(0, BLOCK_Q), tl.arange(0, HEAD_DIM)
        inside_QD = (rows_Q.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM
        inside_QD += dims_D[None, :]
        exists_Q1 = (rows_Q < end)[:, None]
        q = tl.load(q_ptr + inside_QD, mask=exists_Q1, other=0.0)
        before = tl.load(starts_ptr + sequence) - start
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        row: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
        offset = slot * num_positions * row + head // GROUP * HEAD_DIM
        inside_KD = tl.arange(0, BLOCK_K)[:, None] * row + dims_D[None, :]
        key_ptrs, value_ptrs = key_ptr + offset + inside_KD, value_ptr + offset + inside_KD
        positions_Q, num_keys = before + rows_Q, before + tl.minimum(first + BLOCK_Q, end)
        state = (
            tl.full((BLOCK_Q,), -float("inf"), tl.float32),
            tl.full((BLOCK_Q,), 0.0, tl.float32),
            tl.full((BLOCK_Q, HEAD_DIM), 0.0, tl.float32),
        )
        # Keys up to the first query's own are seen by all.
        num_whole = (before + first + 1) // BLOCK_K
        for tile in tl.range(0, num_whole, num_stages=NUM_STAGES):
            state = _attend(
                state, q, scale, key_ptrs, value_ptrs, tile * BLOCK_K, positions_Q, num_keys,
                True, row, BLOCK_K,
            )  # fmt: skip
        for tile in tl.range(num_whole, tl.cdiv(num_keys, BLOCK_K), num_stages=NUM_STAGES):
            state = _attend(
                state, q, scale, key_ptrs, value_ptrs, tile * BLOCK_K, positions_Q, num_keys,
                False, row, BLOCK_K,
            )  # fmt: skip
        _, total_Q, sum_QD = state
        out = sum_QD / total_Q[:, None]
        tl.store(out_ptr + inside_QD, out.to(out_ptr.dtype.element_ty), mask=exists_Q1)


def prompt_kv_write(
    qkv_MX: Tensor, packing: Packing, inv_freq_X: Tensor, *, q_MHD: Tensor, cache: KeyValues,
    norms: HeadNorms | None = None,
) -> None:  # fmt: skip
    """Rotate the projection of packed tokens; write queries to `q_MHD`, the rest to `cache`.

    The contract is that of `prompt_attention_ref.prompt_kv_write`, in a dtype of `FLOATS`, the
    rotation in fp32, positions up to 2^20. Raises ValueError when a size, dtype or stride is beyond
    what the kernel takes.
    """
    _check(q_MHD, cache, packing)
    num_tokens, num_heads, head_dim = q_MHD.shape
    num_kv_heads, num_columns = cache.key.shape[2], qkv_MX.shape[1]
    require_dtypes("the projection and queries", (qkv_MX, q_MHD), FLOATS)
    require_dtypes("the rotation", (inv_freq_X,), (torch.float32,))
    require_packed("a row of the projection, or the rotation", (qkv_MX, inv_freq_X), 1)
    if (
        not 0 < 2 * len(inv_freq_X) <= head_dim
        or num_columns != (num_heads + 2 * num_kv_heads) * head_dim
    ):
        raise ValueError(
            f"a row holds the heads of q, k and v, {num_heads} + 2 x {num_kv_heads} times "
            f"{head_dim}, of which at least 2 dims are rotated, got {num_columns} columns and "
            f"{2 * len(inv_freq_X)} dims; pass one layer's"
        )
    q_norm_D, k_norm_D, eps = norms or (None, None, 0.0)
    if norms is not None:
        require_dtypes("norms of heads", norms[:2], (torch.float32,))
        require_packed("norms of heads", norms[:2], 1)
    block_heads, num_sequences = BLOCK_VALUES // head_dim, len(packing.slots_S)
    blocks = triton.cdiv(num_heads + 2 * num_kv_heads, block_heads)
    _prompt_kv_write_kernel[num_tokens, blocks](
        qkv_MX, *packing, inv_freq_X, q_MHD, *cache, q_norm_D, k_norm_D, eps, num_sequences,
        cache.key.shape[1],
        qkv_MX.stride(0), NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        NUM_ANGLES=len(inv_freq_X), BLOCK_H=block_heads,
        BLOCK_S=triton.next_power_of_2(num_sequences), num_warps=NUM_WARPS, num_stages=1,
        **launch_options(qkv_MX.device),
    )  # fmt: skip


def prompt_attention(
    q_MHD: Tensor, cache: KeyValues, packing: Packing, *, scale: float, out_MHD: Tensor
) -> None:
    """Attend from every token to those of its slot up to its own position.

    The contract is that of `prompt_attention_ref.prompt_attention`, in a dtype of `FLOATS`. Raises
    ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    _check(q_MHD, cache, packing)
    if q_MHD.dtype == torch.float32 and q_MHD.shape[2] > FP32_CONFIG.max_head_dim:
        raise ValueError(
            f"in fp32 the attention to prompts takes head dims up to {FP32_CONFIG.max_head_dim}, "
            f"got {q_MHD.shape[2]}; use bf16 or the torch backend"
        )
    require_dtypes("queries and output", (q_MHD, out_MHD), FLOATS)
    require_packed("the output", (out_MHD,), 3)
    num_tokens, num_heads, head_dim = q_MHD.shape
    num_sequences, num_kv_heads = len(packing.slots_S), cache.key.shape[2]
    config = pick_config(head_dim, q_MHD.dtype, pdl.capability(q_MHD.device))
    tiles = num_tiles(num_tokens, num_sequences, config.block_queries)
    _prompt_attention_kernel[num_heads, tiles](
        q_MHD, *cache, *packing, out_MHD, scale * math.log2(math.e), num_sequences,
        cache.key.shape[1], NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim, BLOCK_Q=config.block_queries, BLOCK_K=config.block_keys,
        BLOCK_S=triton.next_power_of_2(num_sequences), NUM_STAGES=config.num_stages,
        num_warps=config.num_warps, **launch_options(q_MHD.device),
    )  # fmt: skip


def _check(q: Tensor, cache: KeyValues, packing: Packing) -> None:
    """Raise ValueError for what the kernels cannot take."""
    num_heads, head_dim = q.shape[1:]
    num_positions, num_kv_heads = cache.key.shape[1:3]
    if head_dim not in HEAD_DIMS or num_heads % num_kv_heads or num_positions > MAX_POSITIONS:
        raise ValueError(
            f"the kernels of prompts take head dims {HEAD_DIMS}, kv heads that divide heads, and "
            f"{MAX_POSITIONS} positions, got {head_dim}, {num_kv_heads} of {num_heads} and "
            f"{num_positions}; use the torch backend"
        )
    check_packing(packing)
    require_dtypes("queries and the cache", (q, *cache), FLOATS)
    require_packed("queries", (q,), 3)
    require_packed("the cache", cache, 4)
