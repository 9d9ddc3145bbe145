"""Multiply unscaled rows by a weight: the projections of a decoding step, one launch each.

The work is that of `linear_ref`. Few rows take one Triton kernel, which streams the weight once and
does what follows the product; more rows take cuBLAS between row-wise kernels.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stree_kernels.linear_kernel import linear_kernel
from stree_kernels.pdl import launch_options
from stree_kernels.residual import add_residual, scale_rows, swiglu
from stree_kernels.rows import require_dtypes, require_packed
from stree_kernels.unscaled import (
    COLUMNS_PER_SUM,
    Residual,
    UnscaledRows,
    check_residual,
    check_rows,
)

FLOATS = (torch.bfloat16, torch.float32)
MAX_SMALL_ROWS = 64
BLOCK_ROWS = (8, 16, 32, 64)
MAX_SUMS = 4096
"""Sums of squares that a program holds at a time."""
MAX_TILES = 4096
MAX_PARTIALS = 1 << 22


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How a launch is cut: the tile of the weight, warps of 32 threads, tiles under way.

    `prefetch_k` columns of the weight are fetched ahead of the previous kernel's end; `split_k`
    programs share the columns of a tile.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    prefetch_k: int
    split_k: int = 1


# Never autotuned: the order of additions, and with it the tokens, depends on the config.
FP32_CONFIG = LinearConfig(16, 32, 4, 3, prefetch_k=512)
CONFIGS = (
    LinearConfig(16, 128, 4, 4, prefetch_k=1024),
    LinearConfig(32, 128, 4, 4, prefetch_k=1024),
    LinearConfig(64, 128, 4, 4, prefetch_k=512),
)


def pick_config(num_rows: int, num_columns: int, dtype: torch.dtype) -> LinearConfig:
    """Return the config for `num_rows` rows and a weight of `num_columns` rows."""
    if dtype == torch.float32:
        return FP32_CONFIG
    small, medium, large = CONFIGS
    if num_columns < 8192:
        return small if num_rows <= 16 else medium
    return medium if num_rows <= 16 else large


def linear(rows: UnscaledRows, weight_NK: Tensor, out_MN: Tensor) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype; its rows may be apart.

    The contract is that of `linear_ref.linear`. Allocates above MAX_SMALL_ROWS rows.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = len(rows.values_MK)
    _check(rows, weight_NK, out_MN, (num_rows, len(weight_NK)))
    if num_rows <= MAX_SMALL_ROWS:
        launch(pick_config(num_rows, len(weight_NK), weight_NK.dtype), rows, weight_NK, out_MN)
    else:
        _matmul(rows, weight_NK, out_MN)


def linear_swiglu(rows: UnscaledRows, weight_2FK: Tensor, out_MF: Tensor) -> None:
    """Write silu(gate) * up to `out_MF`; the weight holds the rows of gate, then those of up.

    The contract is that of `linear_ref.linear_swiglu`. Allocates above MAX_SMALL_ROWS rows.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = len(rows.values_MK)
    _check(rows, weight_2FK, out_MF, (num_rows, len(weight_2FK) // 2))
    if num_rows <= MAX_SMALL_ROWS:
        config = pick_config(num_rows, len(weight_2FK), weight_2FK.dtype)
        launch(config, rows, weight_2FK, out_MF, swiglu=True)
    else:
        gate_up_M2F = weight_2FK.new_empty(num_rows, len(weight_2FK))
        _matmul(rows, weight_2FK, gate_up_M2F)
        swiglu(gate_up_M2F, out_MF)


def linear_add(rows: UnscaledRows, weight_DK: Tensor, residual: Residual) -> None:
    """Add norm(rows) @ weight.T to the residual stream; all parts of `residual` are written.

    The contract is that of `linear_ref.linear_add`. Allocates above MAX_SMALL_ROWS rows.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = len(rows.values_MK)
    check_residual(residual)
    _check(rows, weight_DK, residual.stream_MD, (num_rows, len(weight_DK)))
    if num_rows <= MAX_SMALL_ROWS:
        config = pick_config(num_rows, len(weight_DK), weight_DK.dtype)
        launch(config, rows, weight_DK, residual.stream_MD, residual=residual)
    else:
        product_MD = torch.empty_like(residual.stream_MD, dtype=torch.float32)
        _matmul(rows, weight_DK, product_MD)
        add_residual(product_MD, residual)


def launch(
    config: LinearConfig, rows: UnscaledRows, weight: Tensor, out: Tensor,
    *, swiglu: bool = False, residual: Residual | None = None,
) -> None:  # fmt: skip
    """Run the kernel on at most MAX_SMALL_ROWS rows; `out` is the stream of a residual."""
    values, sums, num_groups, eps = rows
    num_rows, num_inner = values.shape
    group_columns = num_inner // num_groups
    group_sums = 0 if sums is None else sums.shape[1] // num_groups
    block_m = next(block for block in BLOCK_ROWS if num_rows <= block)
    block_k = min(config.block_k, max(16, triton.next_power_of_2(group_columns)))
    block_q = min(triton.next_power_of_2(max(1, group_sums)), MAX_SUMS // block_m)
    out_values = out_sums = None
    if residual is not None:
        out_sums = residual.square_sums_MQ
        if residual.values_MD.dtype != out.dtype:
            out_values = residual.values_MD
    tiles = triton.cdiv(len(weight), config.block_n)
    partials = arrived = None
    if config.split_k > 1:
        assert tiles <= MAX_TILES
        assert tiles * config.split_k * config.block_n * block_m <= MAX_PARTIALS
        partials, arrived = _workspace(values.device)
    linear_kernel[tiles, config.split_k](
        values, sums, weight, out, out_values, out_sums, partials, arrived,
        num_rows, out.shape[1], group_columns, group_sums, eps, config.prefetch_k, out.stride(0),
        GROUPS=num_groups, SWIGLU=swiglu, PER_SUM=COLUMNS_PER_SUM, BLOCK_M=block_m,
        BLOCK_N=config.block_n, BLOCK_K=block_k, BLOCK_Q=block_q,
        SUM_BLOCKS=triton.cdiv(group_sums, block_q), EVEN_K=group_columns % block_k == 0,
        SPLIT_K=config.split_k, PREFETCH=values.is_cuda, num_warps=config.num_warps,
        num_stages=config.num_stages, **launch_options(values.device),
    )  # fmt: skip


@functools.cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a device's partial sums and arrivals, for launches that follow one another.

    The arrivals are zero between two launches: the kernel resets what it counts.
    """
    partials = torch.empty(MAX_PARTIALS, dtype=torch.float32, device=device)
    return partials, torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def _matmul(rows: UnscaledRows, weight_NK: Tensor, out_MN: Tensor) -> None:
    """Write norm(rows) @ weight.T by cuBLAS, in the dtype of `out_MN`."""
    scaled_MK = rows.values_MK
    if rows.square_sums_MQ is not None:
        scaled_MK = torch.empty_like(rows.values_MK)
        scale_rows(rows, None, scaled_MK)
    if out_MN.dtype == scaled_MK.dtype:
        torch.mm(scaled_MK, weight_NK.T, out=out_MN)
    else:
        torch.mm(scaled_MK, weight_NK.T, out_dtype=out_MN.dtype, out=out_MN)


def _check(rows: UnscaledRows, weight: Tensor, out: Tensor, out_shape: tuple[int, int]) -> None:
    """Raise ValueError for what the kernel cannot take."""
    check_rows(rows)
    require_dtypes("the rows and the weight", (rows.values_MK, weight), FLOATS)
    require_dtypes("the output", (out,), (weight.dtype, torch.float32))
    require_packed("the weight", (weight,), 2)
    require_packed("a row of the output", (out,), 1)
    num_inner = rows.values_MK.shape[1]
    if weight.shape[1] != num_inner or out.shape != out_shape:
        raise ValueError(
            f"a weight has a column for each of the {num_inner} of the rows, and the output is "
            f"{out_shape}, got {tuple(weight.shape)} and {tuple(out.shape)}; pass one layer's"
        )
    if num_inner // rows.num_groups % 16:
        raise ValueError(
            "a norm group, or a row without, is a multiple of 16 columns, got "
            f"{num_inner // rows.num_groups}; use the torch backend"
        )
