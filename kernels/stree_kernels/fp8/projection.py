"""Multiply unscaled rows by a weight that may be in FP8: the projections of a decoding step.

The work is that of `projection_ref`. Weights that are tensors go to `linear.linear`, with
`one_token`, which says nothing of a weight in FP8. A weight in FP8 is multiplied as it is stored
(W8A16): up to 128 rows by a Gluon kernel on compute capability 9.0, elsewhere up to 16 by one that
decodes codes in registers too and does what follows the product, up to 128 by one between row-wise
kernels. For more rows it becomes a tensor of the model's dtype, in memory of the call, for cuBLAS:
a value is then rounded once, as in a checkpoint of that dtype. No kernel of ours takes such a
tensor: they load a weight before the kernel ahead of them, which writes it, has ended.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner, X = 2 F if gated, else F.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from stree_kernels.fp8 import tile_kernel
from stree_kernels.fp8.dequantise import dequantise
from stree_kernels.fp8.rows_kernel import VECTOR, WIDTH, launch_rows
from stree_kernels.fp8.scaled_weight import (
    InProjection,
    Projection,
    ScaledWeight,
    StackedWeight,
    parts_of,
)
from stree_kernels.fp8.stream_plan import CODE_BOX_K, FEW_ROWS, CodeConfig, make_plan
from stree_kernels.fp8.tile_kernel import launch_tiles
from stree_kernels.launch import pdl
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.launch.shared_memory import (
    NARROW,
    match_neighbours,
    num_multiprocessors,
    prefer_cache,
    prefer_shared,
)
from stree_kernels.linear import linear as tensors
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual, check_residual, check_rows
from stree_kernels.linear.linear import COPY_BYTES, STREAM_CAPABILITY
from stree_kernels.linear.linear_kernel import LinearConfig
from stree_kernels.linear.residual import activate, add_residual, scale_rows
from stree_kernels.linear.shares import add_shares
from stree_kernels.linear.stream_plan import StreamPlan

MAX_ROWS = 16
WIDE = 8192
"""Weights of more columns are shared by more warps."""

# Never autotuned: the order of additions, and with it the tokens, depends on the config.
ROWS_CONFIG = LinearConfig(32, 4, depth=2, rows_depth=2, weight_first=True)
WIDE_ROWS_CONFIG = LinearConfig(32, 8, depth=2, rows_depth=2, weight_first=True)
STREAM_CONFIG = CodeConfig(ring_kib=56, programs_per_sm=3)
"""Where full tiles do not suit, and of shares, while registers are enough for it."""
FULL_TILES_STREAM_CONFIG = CodeConfig(ring_kib=88, programs_per_sm=2, full_tiles=True)
MORE_ROWS_STREAM_CONFIG = CodeConfig(ring_kib=80, programs_per_sm=2, full_tiles=True)
MOST_ROWS_STREAM_CONFIG = CodeConfig(ring_kib=160)
ROWS_OF_TWO = 64
"""Rows for which two programs fit a multiprocessor: a step's are kept twice beside the ring."""
MAX_STREAMED_ROWS = 128
MAX_GROUP_SUMS = 4
"""Partial sums of a norm group that a step of the streamed kernel adds up for itself."""

Config = LinearConfig | CodeConfig


def pick_config(
    num_rows: int, weight: ScaledWeight, num_outputs: int, *, shares: bool = False
) -> Config | None:
    """Return the config for some rows and a weight, None where it becomes a tensor first.

    `num_outputs` are the weight's rows, of gate if gated; with `shares` the product is added up.
    """
    if num_rows <= MAX_STREAMED_ROWS and _can_stream(weight):
        return _pick_ring(num_rows, num_outputs, num_multiprocessors(weight.device), shares)
    if weight.dtype == torch.float32 or num_rows > MAX_ROWS:
        return None
    return WIDE_ROWS_CONFIG if weight.shape[1] > WIDE else ROWS_CONFIG


def _pick_ring(num_rows: int, num_outputs: int, num_sms: int, shares: bool) -> CodeConfig:
    """Return the config for a weight that is streamed."""
    if num_rows > FEW_ROWS:
        return MORE_ROWS_STREAM_CONFIG if num_rows <= ROWS_OF_TWO else MOST_ROWS_STREAM_CONFIG
    full = FULL_TILES_STREAM_CONFIG
    if num_rows > MAX_ROWS or (not shares and full.fills(num_outputs, num_sms)):
        return full
    return STREAM_CONFIG


def _can_stream(weight: ScaledWeight) -> bool:
    """Say whether bulk copies can read a weight, and its blocks end where steps do."""
    num_columns = weight.shape[1]
    return (
        pdl.capability(weight.device) == STREAM_CAPABILITY
        and weight.dtype != torch.float32
        and weight.codes.data_ptr() % COPY_BYTES == 0
        and num_columns % COPY_BYTES == 0
        and (weight.column_block % CODE_BOX_K == 0 or weight.column_block >= num_columns)
    )


def linear(
    rows: DeferredNorm, weight_NK: InProjection, out_MN: Tensor, *, one_token: bool = False
) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype; its rows may be apart.

    The contract is that of `projection_ref.linear`. Allocates where it takes several launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    if isinstance(weight_NK, StackedWeight):
        for part, out in parts_of(weight_NK, out_MN):
            linear(rows, part, out, one_token=one_token)
        return
    if isinstance(weight_NK, Tensor):
        tensors.linear(rows, weight_NK, out_MN, one_token=one_token)
        return
    num_rows = len(rows.values_MK)
    _check(rows, weight_NK, out_MN, (num_rows, len(weight_NK)))
    config = pick_config(num_rows, weight_NK, len(weight_NK))
    if config is None:
        _matmul(rows, weight_NK, out_MN)
    else:
        launch(config, rows, weight_NK, out_MN)


def linear_activated(
    rows: DeferredNorm, weight_XK: Projection, out_MF: Tensor, activation: Activation, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write the activation of norm(rows) @ weight.T to `out_MF`.

    The contract is that of `projection_ref.linear_activated`. Allocates where it takes several
    launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    if isinstance(weight_XK, Tensor):
        tensors.linear_activated(rows, weight_XK, out_MF, activation, one_token=one_token)
        return
    num_rows, num_products = len(rows.values_MK), len(weight_XK)
    num_inner = num_products // 2 if activation in GATED else num_products
    _check(rows, weight_XK, out_MF, (num_rows, num_inner))
    config = pick_config(num_rows, weight_XK, num_inner)
    if config is None:
        product_MX = rows.values_MK.new_empty(num_rows, num_products)
        _matmul(rows, weight_XK, product_MX)
        activate(product_MX, out_MF, activation)
    else:
        launch(config, rows, weight_XK, out_MF, activation=activation)


def linear_add(
    rows: DeferredNorm, weight_DK: Projection, residual: Residual, *, eps: float,
    one_token: bool = False,
) -> DeferredNorm:  # fmt: skip
    """Add norm(rows) @ weight.T to the residual stream; return its rows for the next projection.

    The contract is that of `projection_ref.linear_add`. Allocates where it takes several launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    if isinstance(weight_DK, Tensor):
        return tensors.linear_add(rows, weight_DK, residual, eps=eps, one_token=one_token)
    num_rows = len(rows.values_MK)
    check_residual(residual)
    _check(rows, weight_DK, residual.stream_MD, (num_rows, len(weight_DK)))
    config = pick_config(num_rows, weight_DK, len(weight_DK), shares=True)
    if isinstance(config, CodeConfig):
        return _stream_add(config, rows, weight_DK, residual, eps)
    if config is None:
        product_MD = torch.empty_like(residual.stream_MD, dtype=torch.float32)
        _matmul(rows, weight_DK, product_MD)
        add_residual(product_MD, residual)
    else:
        launch(config, rows, weight_DK, residual.stream_MD, residual=residual)
    return residual.rows(eps)


def launch(
    config: Config, rows: DeferredNorm, weight: ScaledWeight, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
) -> None:  # fmt: skip
    """Run the kernel that `config` is of; `out` is the stream of a residual."""
    if isinstance(config, CodeConfig):
        plan = _plan(
            config, *rows.values_MK.shape, out.shape[1], num_multiprocessors(weight.device),
            activation in GATED, False,
        )  # fmt: skip
        _stream(plan, _by_step(rows), weight, out, activation)
        return
    kernel = launch_rows(config, rows, weight, out, activation=activation, residual=residual)
    if weight.shape[1] >= NARROW:
        prefer_cache(kernel, weight.device)
    else:
        match_neighbours(kernel, weight.device, len(out), weight.shape[1])


def _stream_add(
    config: CodeConfig, rows: DeferredNorm, weight_DK: ScaledWeight, residual: Residual,
    eps: float,
) -> DeferredNorm:  # fmt: skip
    """Add norm(rows) @ weight.T to the stream in two launches; return its rows."""
    num_rows, num_columns = residual.stream_MD.shape
    rows = _by_step(rows)
    plan = _plan(
        config, *rows.values_MK.shape, num_columns, num_multiprocessors(weight_DK.device),
        False, True,
    )  # fmt: skip
    shares_RMD = weight_DK.scales.new_empty(plan.num_ranks(num_columns), num_rows, num_columns)
    _stream(plan, rows, weight_DK, shares_RMD, None)
    # One scale for a whole row may wait until the product is there; groups may not.
    late = rows if rows.num_groups == 1 else rows._replace(square_sums_MQ=None, num_groups=1)
    return add_shares(shares_RMD, plan, residual, late, eps)


def _stream(
    plan: StreamPlan, rows: DeferredNorm, weight: ScaledWeight, out: Tensor,
    activation: Activation | None,
) -> None:  # fmt: skip
    """Run the Gluon kernel, which other architectures do not import."""
    from stree_kernels.fp8.stream_kernel import launch_codes

    kernel = launch_codes(plan, rows, weight, out, activation=activation)
    prefer_shared(kernel, weight.device, plan.num_programs, streamed=True)


@functools.lru_cache(maxsize=1024)
def _plan(
    config: CodeConfig, num_rows: int, num_inner: int, num_outputs: int, num_sms: int,
    gated: bool, shares: bool,
) -> StreamPlan:  # fmt: skip
    return make_plan(config, num_rows, num_outputs, num_inner, num_sms, gated=gated, shares=shares)


def _by_step(rows: DeferredNorm) -> DeferredNorm:
    """Return the rows with a norm that the streamed kernel can apply step by step, or with none."""
    values_MK, sums_MQ, num_groups, eps = rows
    if sums_MQ is None or num_groups == 1:
        return rows._replace(num_groups=1)
    if (
        values_MK.shape[1] // num_groups % CODE_BOX_K == 0
        and sums_MQ.shape[1] // num_groups <= MAX_GROUP_SUMS
    ):
        return rows
    scaled_MK = torch.empty_like(values_MK)
    scale_rows(rows, None, scaled_MK)
    return DeferredNorm(scaled_MK, None, 1, eps)


def _matmul(rows: DeferredNorm, weight_NK: ScaledWeight, out_MN: Tensor) -> None:
    """Write norm(rows) @ weight.T in the dtype of `out_MN`: by tiles, or as a tensor by cuBLAS."""
    scaled_MK = rows.values_MK
    by_tiles = takes_tiles(len(scaled_MK), weight_NK)
    # A tensor takes the columns' factor into its one rounding.
    factor_K = weight_NK.column_factor_K if by_tiles else None
    if rows.square_sums_MQ is not None or factor_K is not None:
        scaled_MK = torch.empty_like(rows.values_MK)
        scale_rows(rows, factor_K, scaled_MK)
    if by_tiles:
        launch_tiles(scaled_MK, weight_NK, out_MN)
        return
    weight_KN = dequantise(weight_NK).T
    if out_MN.dtype == scaled_MK.dtype:
        torch.mm(scaled_MK, weight_KN, out=out_MN)
    else:
        torch.mm(scaled_MK, weight_KN, out_dtype=out_MN.dtype, out=out_MN)


def takes_tiles(num_rows: int, weight: ScaledWeight) -> bool:
    """Tell whether rows take our tile kernel, rather than cuBLAS behind one dequantising kernel."""
    return weight.dtype != torch.float32 and num_rows <= tile_kernel.MAX_ROWS


def _check(
    rows: DeferredNorm, weight: ScaledWeight, out: Tensor, out_shape: tuple[int, int]
) -> None:
    """Raise ValueError for what the kernels cannot take."""
    check_rows(rows)
    dtype = rows.values_MK.dtype
    require_dtypes("the rows", (rows.values_MK,), (weight.dtype,))
    require_dtypes("the output", (out,), (dtype, torch.float32))
    require_dtypes("the scales", (weight.scales,), (torch.float32,))
    require_packed("the codes and their scales", (weight.codes, weight.scales), 2)
    require_packed("a row of the output", (out,), 1)
    if weight.column_factor_K is not None:
        require_dtypes("the columns' factor", (weight.column_factor_K,), FLOATS)
        require_packed("the columns' factor", (weight.column_factor_K,), 1)
    num_inner = rows.values_MK.shape[1]
    if weight.shape[1] != num_inner or out.shape != out_shape:
        raise ValueError(
            f"a weight has a column for each of the {num_inner} of the rows, and the output is "
            f"{out_shape}, got {tuple(weight.shape)} and {tuple(out.shape)}; pass one layer's"
        )
    multiple = VECTOR if rows.num_groups == 1 else WIDTH
    if num_inner // rows.num_groups % multiple:
        raise ValueError(
            f"a norm group, or a row without, is a multiple of {multiple} columns for a weight in "
            f"FP8, got {num_inner // rows.num_groups}; use the torch backend"
        )
    if weight.column_block < num_inner and weight.column_block % WIDTH:
        raise ValueError(
            f"a block of a weight in FP8 has a multiple of {WIDTH} columns, or all of them, got "
            f"{weight.column_block}; use the torch backend"
        )
