"""File the keys and values of packed prompts, and attend to them, in plain torch.

It is the CPU's path and what the Triton kernels are compared with. A slot's cache holds the keys of
all its tokens, so a prompt read in pieces attends to the pieces before without a special case.

Shape letters: M packed tokens, S sequences, B slots, P cache positions, H heads or kv heads,
D head dim, X columns of a projection or angles of a rotation, T tokens of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues, normed_heads, rotate
from stree_kernels.launch.packing import Packing


def prompt_kv_write(
    qkv_MX: Tensor, packing: Packing, inv_freq_X: Tensor, *, q_MHD: Tensor, cache: KeyValues,
    norms: HeadNorms | None = None,
) -> None:  # fmt: skip
    """Rotate the projection of packed tokens; write queries to `q_MHD`, the rest to `cache`.

    The projection and its rotation are those of `rope_kv_write_ref.rope_kv_write`; `cache` is
    [B, P, H, D]. Token t of sequence s stands at position `starts_S[s] + t` of its slot. Computes
    in fp32 at least.
    """
    offsets, slots, starts = (table.tolist() for table in packing)
    num_heads, head_dim = q_MHD.shape[1:]
    num_turned = num_heads + cache.key.shape[2]
    for sequence, slot in enumerate(slots):
        here = slice(offsets[sequence], offsets[sequence + 1])
        end = starts[sequence] + here.stop - here.start
        position_T1 = torch.arange(starts[sequence], end, device=qkv_MX.device)[:, None]
        heads_T1HD = qkv_MX[here].unflatten(-1, (-1, head_dim))[:, None]
        turning_T1HD = heads_T1HD[:, :, :num_turned]
        if norms is not None:
            turning_T1HD = normed_heads(turning_T1HD, num_heads, norms)
        turned_THD = rotate(turning_T1HD, position_T1, inv_freq_X)[:, 0]
        q_MHD[here] = turned_THD[:, :num_heads].to(q_MHD.dtype)
        cache.key[slot, starts[sequence] : end] = turned_THD[:, num_heads:].to(cache.key.dtype)
        cache.value[slot, starts[sequence] : end] = heads_T1HD[:, 0, num_turned:]


def prompt_attention(
    q_MHD: Tensor, cache: KeyValues, packing: Packing, *, scale: float, out_MHD: Tensor
) -> None:
    """Attend from every token to those of its slot up to its own position."""
    offsets, slots, starts = (table.tolist() for table in packing)
    group = q_MHD.shape[1] // cache.key.shape[2]
    for sequence, slot in enumerate(slots):
        here = slice(offsets[sequence], offsets[sequence + 1])
        length = here.stop - here.start
        if not length:
            continue
        end = starts[sequence] + length
        key, value = (
            kept[slot, :end].transpose(0, 1).repeat_interleave(group, 0)[None] for kept in cache
        )
        seen_TK = torch.ones(length, end, dtype=torch.bool, device=q_MHD.device)
        out_1HTD = functional.scaled_dot_product_attention(
            q_MHD[here].transpose(0, 1)[None], key, value,
            attn_mask=seen_TK.tril(starts[sequence]), scale=scale,
        )  # fmt: skip
        out_MHD[here] = out_1HTD[0].transpose(0, 1)
