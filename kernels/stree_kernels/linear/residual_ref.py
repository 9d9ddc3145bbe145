"""The row-wise steps between two projections, in plain torch: what the kernels are compared with.

It is also the CPU's path. All compute in fp32 at least.

Shape letters: M rows, K columns, G norm groups, D hidden, F MLP inner, X = 2 F if gated, else F,
V vocab, W rows of every slot, B slots, N rows of a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.settings import Activation
from stree_kernels.linear.deferred_norm import (
    COLUMNS_PER_SUM,
    DeferredNorm,
    Residual,
    scale_factors,
)


def start_residual(
    embed_VD: Tensor, tokens_M: Tensor, residual: Residual, *, scale: float = 1.0
) -> None:
    """Make the residual the embeddings of `tokens_M` (int64) times `scale`."""
    dtype = torch.promote_types(embed_VD.dtype, torch.float32)
    _write(embed_VD[tokens_M].to(dtype) * scale, residual)


def add_residual(
    product_MD: Tensor, residual: Residual, norm_of: DeferredNorm | None = None,
    scaled: DeferredNorm | None = None,
) -> None:  # fmt: skip
    """Add `product_MD`, of any float dtype, to the residual stream.

    With `norm_of` the product is of these rows without their norm, which has one group: each row
    of it is multiplied by the norm's scale. With `scaled` the stream's rows times their norm, whose
    eps it holds, are written to its values.
    """
    dtype = torch.promote_types(residual.stream_MD.dtype, torch.float32)
    product_MD = product_MD.to(dtype)
    if norm_of is not None and norm_of.square_sums_MQ is not None:
        product_MD = product_MD * scale_factors(norm_of)
    _write(residual.stream_MD.to(dtype) + product_MD, residual)
    if scaled is not None:
        scale_rows(residual.rows(scaled.eps), None, scaled.values_MK)


def join_rows(
    embed_VD: Tensor, tokens_WB: Tensor, hidden_NBD: Tensor, source_WB: Tensor, out_MK: Tensor,
    *, eps: float, scale: float = 1.0,
) -> None:  # fmt: skip
    """Write the norms of embeddings times `scale`, and of hidden states beside them, to `out_MK`.

    Row w of slot b is of `tokens_WB[w, b]`, then of `hidden_NBD[source_WB[w, b], b]`.
    """
    dtype = torch.promote_types(out_MK.dtype, torch.float32)
    slot_B = torch.arange(hidden_NBD.shape[1], device=hidden_NBD.device)
    halves = (embed_VD[tokens_WB].to(dtype) * scale, hidden_NBD[source_WB, slot_B].to(dtype))
    normed = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in halves]
    out_MK.copy_(torch.cat(normed, dim=-1).flatten(0, 1))


def scale_rows(rows: DeferredNorm, weight_K: Tensor | None, out_MK: Tensor) -> None:
    """Write the rows' norm times `weight_K`, or times one, to `out_MK`."""
    scaled_MK = normalised(rows)
    out_MK.copy_(scaled_MK if weight_K is None else scaled_MK * weight_K)


def activate(inputs_MX: Tensor, out_MF: Tensor, activation: Activation) -> None:
    """Write an MLP's activation to `out_MF`; gated, a row holds all of gate, then all of up."""
    dtype = torch.promote_types(inputs_MX.dtype, torch.float32)
    out_MF.copy_(activated(inputs_MX.to(dtype), activation))


def activated(inputs_MX: Tensor, activation: Activation) -> Tensor:
    """Return an MLP's activation; gated ones halve the columns. The gelu is the exact one."""
    if activation == "relu2":
        return functional.relu(inputs_MX).square()
    gate_MF, up_MF = inputs_MX.chunk(2, dim=1)
    gate = functional.silu if activation == "swiglu" else functional.gelu
    return gate(gate_MF) * up_MF


def normalised(rows: DeferredNorm) -> Tensor:
    """Return the rows times their scale factors, in fp32 at least."""
    dtype = torch.promote_types(rows.values_MK.dtype, torch.float32)
    values_MK = rows.values_MK.to(dtype)
    if rows.square_sums_MQ is None:
        return values_MK
    scales_MG = scale_factors(rows)
    return values_MK * scales_MG.repeat_interleave(values_MK.shape[1] // rows.num_groups, dim=1)


def _write(stream_MD: Tensor, residual: Residual) -> None:
    """Write the stream, its rounded values and the sums of squares of what the stream holds."""
    residual.stream_MD.copy_(stream_MD)
    if residual.values_MD is not residual.stream_MD:
        residual.values_MD.copy_(residual.stream_MD)
    exact_MD = residual.stream_MD.to(residual.square_sums_MQ.dtype)
    residual.square_sums_MQ.copy_(exact_MD.square().unflatten(1, (-1, COLUMNS_PER_SUM)).sum(2))
