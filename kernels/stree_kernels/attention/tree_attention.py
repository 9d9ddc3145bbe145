"""Attend to a committed cache and, in a block of rows, to a token tree: how the work is cut.

The work is that of `tree_attention_ref`. Keys are cut into tiles: those of the cache up to the
committed length, then those of the block. The number of shares of the tiles is chosen on the host,
their length on the device (`tree_attention_kernel`).

Shape letters: B slots, R rows of a block buffer, T rows of this pass, S cache positions, H heads or
kv heads, D head dim.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stree_kernels.attention.rope_kv_write_ref import KeyValues
from stree_kernels.attention.tree_attention_kernel import merge_kernel, tree_attention_kernel
from stree_kernels.launch import pdl
from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.rows import FLOATS, check_cover, require_dtypes, require_packed
from stree_kernels.launch.shared_memory import match_neighbours

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
    """Return the smallest config whose tile holds all query rows of a kv head, else the largest.

    Raises ValueError for a head dim that the kernel does not take.
    """
    _require_head_dim(head_dim, dtype)
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
    # A cache of this size has no more tiles.
    max_tiles = triton.cdiv(num_positions, config.block_keys)
    max_tiles += triton.cdiv(first + num_tokens, config.block_keys)
    num_shares = min(max_tiles, pick_shares(config, num_tokens * group, num_pairs))
    num_places = num_tokens * num_slots * num_heads
    one_share = num_shares == 1
    _check_workspace(workspace, 0 if one_share else num_shares * num_places * (head_dim + 2))
    options = launch_options(q_TBHD.device)
    is_small = pdl.capability(q_TBHD.device) in SMALL_MEMORY
    num_stages = min(config.num_stages, MAX_STAGES_THERE) if is_small else config.num_stages
    grid = (triton.cdiv(num_tokens * group, config.block_queries), num_shares, num_pairs)
    kernel = tree_attention_kernel[grid](
        q_TBHD, *cache, *rows, mask_RR, committed_B, out_TBHD, workspace, scale * math.log2(math.e),
        first, num_tokens, num_slots, num_positions, num_shares, mask_RR.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_Q=config.block_queries,
        BLOCK_K=config.block_keys, NUM_STAGES=num_stages, ONE_SHARE=one_share,
        num_warps=config.num_warps, **options,
    )  # fmt: skip
    match_neighbours(kernel, q_TBHD.device, num_tokens * num_slots, one_token=num_tokens == 1)
    if not one_share:
        kernel = merge_kernel[(num_places,)](
            workspace, out_TBHD, num_shares, HEAD_DIM=head_dim,
            BLOCK_N=triton.next_power_of_2(num_shares), num_warps=4, **options,
        )  # fmt: skip
        match_neighbours(kernel, q_TBHD.device, num_tokens * num_slots, one_token=num_tokens == 1)


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
    _require_head_dim(head_dim, q.dtype)
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


def _require_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    """Raise ValueError for a head dim that the kernel does not take."""
    max_head_dim = FP32_CONFIGS[-1].max_head_dim if dtype == torch.float32 else HEAD_DIMS[-1]
    if head_dim not in HEAD_DIMS or head_dim > max_head_dim:
        raise ValueError(
            f"the attention kernel takes head dims {HEAD_DIMS} up to {max_head_dim} in "
            f"{dtype}, got {head_dim}; use the torch backend"
        )


def _check_workspace(workspace: Tensor, num_values: int) -> None:
    """Raise ValueError unless the workspace holds this many fp32 values."""
    if workspace.numel() < num_values or workspace.dtype != torch.float32:
        raise ValueError(
            f"the workspace holds {num_values} fp32 values, got {workspace.numel()} of "
            f"{workspace.dtype}; ask `workspace_size` with the cache's slots"
        )
    require_packed("the workspace", (workspace,), workspace.ndim)
