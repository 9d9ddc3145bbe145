"""Attend to a committed cache and, in a block of rows, to a token tree, in plain torch.

It is the CPU's decode path and what the Triton kernel is compared with.

Shape letters: B slots, R rows of a block buffer, T rows of this pass, S cache positions, K keys
(all of the cache, the block's rows, padding), H heads or kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.attention.rope_kv_write_ref import KeyValues

KEY_MULTIPLE = 16
"""Attention over a multiple of this many keys needs no padded copy of the mask."""


def workspace_size(
    num_tokens: int, num_slots: int, num_heads: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Return how many fp32 values `tree_attention` needs for passes of up to `num_tokens` rows."""
    return 0


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
    workspace: Tensor | None,
) -> None:
    """Attend from rows first..first + T - 1 to committed tokens and rows in their mask.

    The first `committed_B[b]` (int32) positions of `cache` are tokens of slot b; `rows` is filled
    up to the pass's last row. `mask_RR` (bool) is True where the column is the row's ancestor or
    the row itself. The rest of `cache` does not matter as long as it
    is finite: it enters with weight 0.
    """
    num_tokens, num_slots, num_heads = q_TBHD.shape[:3]
    end, num_kv_heads = first + num_tokens, rows.key.shape[2]
    capacity = cache.key.shape[1]
    padding = -(capacity + end) % KEY_MULTIPLE
    seen_BS = torch.arange(capacity, device=q_TBHD.device) < committed_B[:, None]
    seen_BTK = torch.cat(
        (
            seen_BS[:, None].expand(-1, num_tokens, -1),
            functional.pad(mask_RR[first:end, :end], (0, padding)).expand(num_slots, -1, -1),
        ),
        dim=2,
    )
    bias_BTK = q_TBHD.new_zeros(()).where(seen_BTK, -torch.inf)
    out = functional.scaled_dot_product_attention(
        # The rows once for each query head of a kv head.
        q_TBHD.unflatten(2, (num_kv_heads, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3),
        _gather(cache.key, rows.key[:end], padding),
        _gather(cache.value, rows.value[:end], padding),
        attn_mask=bias_BTK.repeat(1, num_heads // num_kv_heads, 1)[:, None],
        scale=scale,
    )
    heads_TBHD = out.unflatten(2, (-1, num_tokens)).permute(3, 0, 1, 2, 4).flatten(2, 3)
    out_TBHD.copy_(heads_TBHD)


def _gather(cache_BSHD: Tensor, rows_RBHD: Tensor, padding: int) -> Tensor:
    """Return the keys or values of a pass [B, H, K, D]: cache, rows, then zeros."""
    rows_BRHD = functional.pad(rows_RBHD.transpose(0, 1), (0, 0, 0, 0, 0, padding))
    return torch.cat((cache_BSHD, rows_BRHD), dim=1).transpose(1, 2)
