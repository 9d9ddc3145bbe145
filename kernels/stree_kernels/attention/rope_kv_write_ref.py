"""Rotate and file the queries, keys and values of a pass, in plain torch.

It also appends the pending path to the cache. It is the CPU's decode path and what the Triton
kernel is compared with.

Shape letters: B slots, R rows of a block buffer, T rows of this pass, S cache positions, L path
capacity, H heads or kv heads, D head dim, X columns of a projection or angles of a rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.rows import Pending


class KeyValues(NamedTuple):
    """Keys and values of one layer, alike: [R, B, H, D] as rows, [B, S, H, D] as a cache."""

    key: Tensor
    value: Tensor


class HeadNorms(NamedTuple):
    """The norms of every head of q and of k, before they are rotated; weights are fp32."""

    q_D: Tensor
    k_D: Tensor
    eps: float


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

    `qkv_TBX` holds the heads of q, then k, then v. `committed_B` (int32) counts the cache's tokens
    once `pending` is in it; a row's position is that plus its depth. With `norms` the heads of q
    and k are normed first. Position times `inv_freq_X` is the angle of dims d and d + X of a head
    (the Llama convention); dims from 2 X on stay. With `pending`, its rows of `previous` are
    written to the end of the committed tokens, and nothing else of `cache` is. Computes in fp32 at
    least.
    """
    if pending is not None:
        assert previous is not None
        append_path(cache, previous, committed_B, pending)
    num_tokens, num_heads, head_dim = q_TBHD.shape[0], q_TBHD.shape[2], q_TBHD.shape[3]
    end = first + num_tokens
    num_kv_heads = rows.key.shape[2]
    heads_TBHD = qkv_TBX.unflatten(-1, (-1, head_dim))
    position_TB = depth_R[first:end, None] + committed_B
    turning_TBHD = heads_TBHD[:, :, : num_heads + num_kv_heads]
    if norms is not None:
        turning_TBHD = normed_heads(turning_TBHD, num_heads, norms)
    turned_TBHD = rotate(turning_TBHD, position_TB, inv_freq_X)
    q_TBHD.copy_(turned_TBHD[:, :, :num_heads])
    rows.key[first:end] = turned_TBHD[:, :, num_heads:]
    rows.value[first:end] = heads_TBHD[:, :, num_heads + num_kv_heads :]


def normed_heads(x_TBHD: Tensor, num_heads: int, norms: HeadNorms) -> Tensor:
    """Return x with the RMS norm of every head, the first `num_heads` those of q."""
    x_TBHD = x_TBHD.to(torch.promote_types(x_TBHD.dtype, torch.float32))
    scale_TBH1 = torch.rsqrt(x_TBHD.square().mean(-1, keepdim=True) + norms.eps)
    num_kv_heads = x_TBHD.shape[2] - num_heads
    of_head_HD = torch.stack((norms.q_D,) * num_heads + (norms.k_D,) * num_kv_heads)
    return x_TBHD * scale_TBH1 * of_head_HD


def append_path(
    cache: KeyValues, previous: KeyValues, committed_B: Tensor, pending: Pending
) -> None:
    """Write the pending rows to the last `length` committed positions.

    Entries past a path repeat its last one, so that the write needs no length on the host; an empty
    path writes one position's own content back.
    """
    length_B1 = pending.length_B[:, None]
    slot_B1 = torch.arange(len(length_B1), device=length_B1.device)[:, None]
    entry_L = torch.arange(pending.path_BL.shape[1], device=length_B1.device)
    entry_BL = torch.minimum(entry_L, length_B1 - 1)
    position_BL = (committed_B[:, None] - length_B1 + entry_BL).clamp(min=0)
    source_BL = pending.path_BL.gather(1, entry_BL.clamp(min=0))
    empty_BL11 = (length_B1 == 0)[:, :, None, None]
    for kept_BSHD, rows_RBHD in zip(cache, previous, strict=True):
        old_BLHD = kept_BSHD[slot_B1, position_BL]
        new_BLHD = rows_RBHD[source_BL, slot_B1]
        kept_BSHD[slot_B1, position_BL] = torch.where(empty_BL11, old_BLHD, new_BLHD)


def rotate(x_TBHD: Tensor, position_TB: Tensor, inv_freq_X: Tensor) -> Tensor:
    """Return x with the first 2 X dims of every head rotated, in fp32 at least."""
    dtype = torch.promote_types(x_TBHD.dtype, torch.float32)
    angle_TB1X = position_TB[..., None, None].to(dtype) * inv_freq_X.to(dtype)
    cos, sin = angle_TB1X.cos(), angle_TB1X.sin()
    num_angles = len(inv_freq_X)
    low, high, kept = x_TBHD.to(dtype).tensor_split((num_angles, 2 * num_angles), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, kept), dim=-1)
