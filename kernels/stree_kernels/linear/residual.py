"""The row-wise steps between two projections, each one Triton kernel.

The work is that of `residual_ref`. A program owns a run of one row's columns; `scale_rows`
and `add_residual` read what others wrote: the sums of squares of a norm.

Shape letters: M rows, K columns, Q partial sums of a row, D hidden, F MLP inner,
X = 2 F if gated, else F, V vocab, W rows of every slot, B slots, N rows of a buffer.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed, strides
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.launch.shared_memory import match_neighbours
from stree_kernels.linear.deferred_norm import (
    COLUMNS_PER_SUM,
    DeferredNorm,
    Residual,
    check_residual,
    check_rows,
)
from stree_kernels.linear.device_functions import gate, scale_factor, square_relu

BLOCK = 1024
"""Columns of one row that a program holds at a time."""
NUM_WARPS = 4


@triton.jit
def row_scale(sums_ptr, num_sums, num_columns, eps, BLOCK_Q: tl.constexpr):
    """The number that a norm multiplies by."""
    sums_Q = tl.arange(0, BLOCK_Q)
    total = tl.sum(tl.load(sums_ptr + sums_Q, mask=sums_Q < num_sums, other=0.0), axis=0)
    return scale_factor(total, num_columns, eps)


@triton.jit
def write_stream(
    total_D, row, columns_D, valid_D, num_columns, stream_ptr, values_ptr, sums_ptr,
    BLOCK_D: tl.constexpr, PER_SUM: tl.constexpr,
):  # fmt: skip
    """Store a part of one row of a residual and return it: stream, rounded values, squares."""
    stored_D = total_D.to(stream_ptr.dtype.element_ty)
    tl.store(stream_ptr + row * num_columns + columns_D, stored_D, mask=valid_D)
    exact_D = stored_D.to(tl.float32)
    if values_ptr is not None:
        rounded_D = exact_D.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * num_columns + columns_D, rounded_D, mask=valid_D)
    squares_QD = tl.reshape(exact_D * exact_D, [BLOCK_D // PER_SUM, PER_SUM])
    num_sums = num_columns // PER_SUM
    sums_Q = tl.program_id(1) * (BLOCK_D // PER_SUM) + tl.arange(0, BLOCK_D // PER_SUM)
    sums_ptrs = sums_ptr + row * num_sums + sums_Q
    tl.store(sums_ptrs, tl.sum(squares_QD, axis=1), mask=sums_Q < num_sums)
    return exact_D


@triton.jit
def _start_residual_kernel(
    # pointers
    embed_ptr, tokens_ptr, stream_ptr, values_ptr, sums_ptr,
    # sizes
    num_columns, scale,
    # meta
    BLOCK_D: tl.constexpr, PER_SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid_D = columns_D < num_columns
    wait_for_previous(PDL)
    token = tl.load(tokens_ptr + row)
    embed_D = tl.load(embed_ptr + token * num_columns + columns_D, mask=valid_D, other=0.0)
    write_stream(
        embed_D.to(tl.float32) * scale, row, columns_D, valid_D, num_columns,
        stream_ptr, values_ptr, sums_ptr, BLOCK_D, PER_SUM,
    )  # fmt: skip


@triton.jit
def _join_rows_kernel(
    # pointers
    embed_ptr, tokens_ptr, hidden_ptr, source_ptr, out_ptr,
    # sizes
    num_slots, num_columns, eps, scale,
    # strides
    stride_source_w, stride_source_b,
    # meta
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    columns_D = tl.arange(0, BLOCK_D)
    valid_D = columns_D < num_columns
    wait_for_previous(PDL)
    slot = row % num_slots
    if half == 0:
        token = tl.load(tokens_ptr + row)
        embed_D = tl.load(embed_ptr + token * num_columns + columns_D, mask=valid_D, other=0.0)
        values_D = embed_D.to(tl.float32) * scale
    else:
        source_ptrs = source_ptr + row // num_slots * stride_source_w + slot * stride_source_b
        source = tl.load(source_ptrs).to(tl.int64) * num_slots + slot
        hidden_D = tl.load(hidden_ptr + source * num_columns + columns_D, mask=valid_D, other=0.0)
        values_D = hidden_D.to(tl.float32)
    values_D *= scale_factor(tl.sum(values_D * values_D, axis=0), num_columns, eps)
    out_ptrs = out_ptr + (2 * row + half) * num_columns + columns_D
    tl.store(out_ptrs, values_D.to(out_ptr.dtype.element_ty), mask=valid_D)


@triton.jit
def _add_residual_kernel(
    # pointers
    product_ptr, norm_sums_ptr, stream_ptr, values_ptr, sums_ptr, scaled_ptr,
    # sizes
    num_columns, norm_columns, num_norm_sums, eps, scaled_eps,
    # meta
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PER_SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid_D = columns_D < num_columns
    wait_for_previous(PDL)
    offsets_D = row * num_columns + columns_D
    product_D = tl.load(product_ptr + offsets_D, mask=valid_D, other=0.0).to(tl.float32)
    stream_D = tl.load(stream_ptr + offsets_D, mask=valid_D, other=0.0).to(tl.float32)
    if norm_sums_ptr is not None:
        norm_ptr = norm_sums_ptr + row * num_norm_sums
        product_D *= row_scale(norm_ptr, num_norm_sums, norm_columns, eps, BLOCK_Q)
    exact_D = write_stream(
        stream_D + product_D, row, columns_D, valid_D, num_columns,
        stream_ptr, values_ptr, sums_ptr, BLOCK_D, PER_SUM,
    )  # fmt: skip
    if scaled_ptr is not None:
        scale = scale_factor(tl.sum(exact_D * exact_D, axis=0), num_columns, scaled_eps)
        scaled_D = (exact_D * scale).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + offsets_D, scaled_D, mask=valid_D)


@triton.jit
def _scale_rows_kernel(
    # pointers
    values_ptr, sums_ptr, weight_ptr, out_ptr,
    # sizes
    group_columns, group_sums, eps,
    # strides
    stride_out_m,
    # meta
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    num_groups = tl.num_programs(1)
    wait_for_previous(PDL)
    scale = 1.0
    if sums_ptr is not None:
        group_ptr = sums_ptr + (row * num_groups + group) * group_sums
        scale = row_scale(group_ptr, group_sums, group_columns, eps, BLOCK_Q)
    for start in range(0, group_columns, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        valid_K = inner_K < group_columns
        columns_K = group * group_columns + inner_K
        values_ptrs = values_ptr + row * num_groups * group_columns + columns_K
        scaled_K = tl.load(values_ptrs, mask=valid_K, other=0.0).to(tl.float32) * scale
        if weight_ptr is not None:
            scaled_K *= tl.load(weight_ptr + columns_K, mask=valid_K, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + row * stride_out_m + columns_K
        tl.store(out_ptrs, scaled_K.to(out_ptr.dtype.element_ty), mask=valid_K)


@triton.jit
def _activate_kernel(
    # pointers
    inputs_ptr, out_ptr,
    # sizes
    num_columns,
    # strides
    stride_out_m,
    # meta
    BLOCK_F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    valid_F = columns_F < num_columns
    wait_for_previous(PDL)
    if GATED:
        gate_ptrs = inputs_ptr + row * 2 * num_columns + columns_F
        gate_F = tl.load(gate_ptrs, mask=valid_F, other=0.0).to(tl.float32)
        up_F = tl.load(gate_ptrs + num_columns, mask=valid_F, other=0.0).to(tl.float32)
        out_F = gate(gate_F, up_F, ACTIVATION)
    else:
        up_ptrs = inputs_ptr + row * num_columns + columns_F
        out_F = square_relu(tl.load(up_ptrs, mask=valid_F, other=0.0).to(tl.float32))
    out_ptrs = out_ptr + row * stride_out_m + columns_F
    tl.store(out_ptrs, out_F.to(out_ptr.dtype.element_ty), mask=valid_F)


def start_residual(
    embed_VD: Tensor, tokens_M: Tensor, residual: Residual, *, scale: float = 1.0
) -> None:
    """Make the residual the embeddings of `tokens_M` (int64, within the vocabulary) times `scale`.

    The contract is that of `residual_ref.start_residual`.
    """
    check_residual(residual)
    stream, values, sums = residual
    require_dtypes("the embedding and the residual's values", (embed_VD, values), FLOATS)
    require_dtypes("tokens", (tokens_M,), (torch.int64,))
    require_packed("the embedding", (embed_VD,), 2)
    require_packed("tokens", (tokens_M,), 1)
    _check_shape("the residual stream", stream, (len(tokens_M), embed_VD.shape[1]))
    kernel = _start_residual_kernel[_grid(stream)](
        embed_VD, tokens_M, stream, None if values.dtype == stream.dtype else values, sums,
        stream.shape[1], float(scale), BLOCK_D=BLOCK, PER_SUM=COLUMNS_PER_SUM, num_warps=NUM_WARPS,
        **launch_options(stream.device),
    )  # fmt: skip
    match_neighbours(kernel, stream.device, len(stream), stream.shape[1])


def join_rows(
    embed_VD: Tensor, tokens_WB: Tensor, hidden_NBD: Tensor, source_WB: Tensor, out_MK: Tensor,
    *, eps: float, scale: float = 1.0,
) -> None:  # fmt: skip
    """Write the norms of embeddings (tokens are int64), and of hidden states beside them.

    The contract is that of `residual_ref.join_rows`; `source_WB` may have any strides.
    """
    require_dtypes("the embedding, hidden states and rows", (embed_VD, hidden_NBD, out_MK), FLOATS)
    require_dtypes("tokens", (tokens_WB,), (torch.int64,))
    require_dtypes("sources", (source_WB,), (torch.int32, torch.int64))
    require_packed("the embedding, the tokens or the rows", (embed_VD, tokens_WB, out_MK), 2)
    require_packed("hidden states", (hidden_NBD,), 3)
    num_rows, num_slots, num_columns = tokens_WB.numel(), tokens_WB.shape[1], embed_VD.shape[1]
    _check_shape("the sources", source_WB, tuple(tokens_WB.shape))
    _check_shape("the hidden states", hidden_NBD, (len(hidden_NBD), num_slots, num_columns))
    _check_shape("the rows", out_MK, (num_rows, 2 * num_columns))
    kernel = _join_rows_kernel[num_rows, 2](
        embed_VD, tokens_WB, hidden_NBD, source_WB, out_MK, num_slots, num_columns, eps,
        float(scale), *strides((source_WB,), 0), *strides((source_WB,), 1),
        BLOCK_D=triton.next_power_of_2(num_columns), num_warps=2 * NUM_WARPS,
        **launch_options(out_MK.device),
    )  # fmt: skip
    match_neighbours(kernel, out_MK.device, num_rows, num_columns)


def add_residual(
    product_MD: Tensor, residual: Residual, norm_of: DeferredNorm | None = None,
    scaled: DeferredNorm | None = None,
) -> None:  # fmt: skip
    """Add `product_MD`, of a dtype in `FLOATS`, to the residual stream, times some rows' norm.

    The contract is that of `residual_ref.add_residual`.
    """
    check_residual(residual)
    stream, values, sums = residual
    require_dtypes("the product", (product_MD,), FLOATS)
    require_packed("the product", (product_MD,), 2)
    _check_shape("the product", product_MD, tuple(stream.shape))
    norm_sums, norm_columns, num_norm_sums, eps = None, 1, 1, 0.0
    if norm_of is not None and norm_of.square_sums_MQ is not None:
        check_rows(norm_of)
        norm_sums, eps = norm_of.square_sums_MQ, norm_of.eps
        norm_columns, num_norm_sums = norm_of.values_MK.shape[1], norm_sums.shape[1]
        _check_shape("the norm's sums of squares", norm_sums, (len(stream), num_norm_sums))
        assert norm_of.num_groups == 1
    # The norm of what is written needs whole rows in one program.
    block = BLOCK if scaled is None else triton.next_power_of_2(stream.shape[1])
    scaled_MD, _, _, scaled_eps = scaled or (None, None, 1, 0.0)
    if scaled_MD is not None:
        _check_shape("the scaled rows", scaled_MD, tuple(stream.shape))
    kernel = _add_residual_kernel[len(stream), triton.cdiv(stream.shape[1], block)](
        product_MD, norm_sums, stream, None if values.dtype == stream.dtype else values, sums,
        scaled_MD, stream.shape[1], norm_columns, num_norm_sums, eps, scaled_eps, BLOCK_D=block,
        BLOCK_Q=triton.next_power_of_2(num_norm_sums), PER_SUM=COLUMNS_PER_SUM,
        num_warps=NUM_WARPS if scaled is None else 2 * NUM_WARPS, **launch_options(stream.device),
    )  # fmt: skip
    match_neighbours(kernel, stream.device, len(stream), stream.shape[1])


def scale_rows(rows: DeferredNorm, weight_K: Tensor | None, out_MK: Tensor) -> None:
    """Write the rows' norm times `weight_K`, or times one, to `out_MK`, whose rows may be apart.

    The contract is that of `residual_ref.scale_rows`.
    """
    check_rows(rows)
    values, sums, num_groups, eps = rows
    require_dtypes("the output", (out_MK,), FLOATS)
    require_packed("a row of the output", (out_MK,), 1)
    _check_shape("the output", out_MK, tuple(values.shape))
    if weight_K is not None:
        require_dtypes("the norm's weight", (weight_K,), FLOATS)
        require_packed("the norm's weight", (weight_K,), 1)
        _check_shape("the norm's weight", weight_K, (values.shape[1],))
    group_columns = values.shape[1] // num_groups
    group_sums = 0 if sums is None else sums.shape[1] // num_groups
    kernel = _scale_rows_kernel[len(values), num_groups](
        values, sums, weight_K, out_MK, group_columns, group_sums, eps, out_MK.stride(0),
        BLOCK_K=min(BLOCK, triton.next_power_of_2(group_columns)),
        BLOCK_Q=triton.next_power_of_2(max(1, group_sums)), num_warps=NUM_WARPS,
        **launch_options(values.device),
    )  # fmt: skip
    match_neighbours(kernel, values.device, len(values), values.shape[1])


def activate(inputs_MX: Tensor, out_MF: Tensor, activation: Activation) -> None:
    """Write an MLP's activation to `out_MF`, whose rows may be apart.

    The contract is that of `residual_ref.activate`.
    """
    gated = activation in GATED
    require_dtypes("the activation's inputs and output", (inputs_MX, out_MF), FLOATS)
    require_packed("the activation's inputs", (inputs_MX,), 2)
    require_packed("a row of the output", (out_MF,), 1)
    num_columns = out_MF.shape[1]
    _check_shape("the activation's inputs", inputs_MX, (len(out_MF), num_columns * (1 + gated)))
    kernel = _activate_kernel[_grid(out_MF)](
        inputs_MX, out_MF, num_columns, out_MF.stride(0), BLOCK_F=BLOCK, GATED=gated,
        ACTIVATION=activation, num_warps=NUM_WARPS, **launch_options(out_MF.device),
    )  # fmt: skip
    match_neighbours(kernel, out_MF.device, len(out_MF), num_columns)


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], BLOCK)


def _check_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{what} is {expected}, got {tuple(tensor.shape)}; pass buffers of one model"
        )
