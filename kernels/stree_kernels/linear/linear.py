"""Multiply unscaled rows by a weight: the projections of a decoding step, one launch each.

The work is that of `linear_ref`. Few rows take one Triton kernel, which streams the weight once and
does what follows the product. On compute capability 9.0 more rows take a Gluon kernel that does so
by bulk copies; what is left takes cuBLAS between row-wise kernels.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner, X = 2 F if gated, else F.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from stree_kernels.launch import pdl
from stree_kernels.launch.rows import FLOATS, ConvTail, require_dtypes, require_packed
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.launch.shared_memory import (
    NARROW,
    NARROW_ROWS,
    is_streamed,
    match_neighbours,
    num_multiprocessors,
    prefer_cache,
    prefer_shared,
)
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual, check_residual, check_rows
from stree_kernels.linear.gemv_kernel import GemvConfig, launch_gemv
from stree_kernels.linear.linear_kernel import LinearConfig, launch_linear
from stree_kernels.linear.residual import activate, add_residual, scale_rows
from stree_kernels.linear.shares import add_shares
from stree_kernels.linear.stream_plan import StreamConfig, StreamPlan, make_plan

GROUP_MULTIPLE = 32
"""What the columns of a norm group are a multiple of: a group may end at no other column."""
MAX_COLUMNS = 8192
MAX_WEIGHT_ROWS = 16384
"""The largest weight that the tensor cores' kernel takes: beyond it cuBLAS is as fast."""

# Never autotuned: the order of additions, and with it the tokens, depends on the config. Chosen
# from times on an H200 (docs/kernels-and-numerics.md).
GEMV_CONFIGS = {
    1024: GemvConfig(8, 4, 1, depth=8),
    2048: GemvConfig(8, 4, 2, depth=8),
    MAX_COLUMNS: GemvConfig(8, 2, 2, depth=8),
}
"""The config for one row by the most columns that it is for."""
WIDEST_GEMV_CONFIG = GemvConfig(8, 2, 4, depth=4)
FEW_ROWS_CONFIG = LinearConfig(16, 4, depth=20, rows_depth=5, weight_first=True)
MORE_ROWS_CONFIG = LinearConfig(16, 4, depth=10, rows_depth=4)
STREAM_CONFIG = StreamConfig(ring_kib=96, splits=2, programs_per_sm=2)
STREAM_CAPABILITY = 90
COPY_BYTES = 16
"""What the address of a bulk copy, and the bytes of a row of its tensor, are multiples of."""

Config = LinearConfig | GemvConfig | StreamConfig


def pick_config(num_rows: int, weight_NK: Tensor, *, one_token: bool = False) -> Config | None:
    """Return the config for some rows and a weight, None where cuBLAS is faster."""
    num_weight_rows, num_columns = weight_NK.shape
    if is_streamed(num_rows, num_columns, one_token=one_token) and _can_stream(weight_NK):
        return STREAM_CONFIG
    if num_rows == 1:
        configs = GEMV_CONFIGS.items()
        return next((c for most, c in configs if num_columns <= most), WIDEST_GEMV_CONFIG)
    if weight_NK.dtype == torch.float32:
        return None
    if num_columns > MAX_COLUMNS or num_weight_rows > MAX_WEIGHT_ROWS:
        return None
    if num_rows <= 8:
        return FEW_ROWS_CONFIG
    narrow = num_rows <= NARROW_ROWS and num_columns < NARROW
    return MORE_ROWS_CONFIG if narrow else None


def _is_short(config: Config | None, weight_NK: Tensor) -> bool:
    """Say whether a kernel ends so soon that its launch counts, not its weight.

    Such a kernel lets the next one start before its own wait, and takes the conv behind an
    in-projection with it. With 2 to 8 rows, and with wide weights, both were slower (docs/log.md).
    """
    may_be = isinstance(config, GemvConfig) or config == MORE_ROWS_CONFIG
    return may_be and weight_NK.shape[1] < NARROW


def _can_stream(weight_NK: Tensor) -> bool:
    """Say whether bulk copies can read a weight on its device."""
    return (
        pdl.capability(weight_NK.device) == STREAM_CAPABILITY
        and weight_NK.element_size() == 2
        and weight_NK.data_ptr() % COPY_BYTES == 0
        and weight_NK.shape[1] * weight_NK.element_size() % COPY_BYTES == 0
    )


def linear(
    rows: DeferredNorm, weight_NK: Tensor, out_MN: Tensor, *, one_token: bool = False
) -> None:
    """Write norm(rows) @ weight.T to `out_MN`, in its dtype; its rows may be apart.

    The contract is that of `linear_ref.linear`. Allocates where it takes several launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = len(rows.values_MK)
    _check(rows, weight_NK, out_MN, (num_rows, len(weight_NK)))
    config = pick_config(num_rows, weight_NK, one_token=one_token)
    if config is not None:
        launch(config, rows, weight_NK, out_MN)
    else:
        _matmul(rows, weight_NK, out_MN)


def takes_conv(num_rows: int, weight_NK: Tensor, *, one_token: bool = False) -> bool:
    """Say whether `linear_conv` is for some rows and an in-projection's weight."""
    return _is_short(pick_config(num_rows, weight_NK, one_token=one_token), weight_NK)


def linear_conv(
    rows: DeferredNorm, weight_NK: Tensor, out_MN: Tensor, conv: ConvTail, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write norm(rows) @ weight.T to `out_MN` and convolve some of its columns, in one launch.

    For what `takes_conv` says. Checks nothing of the conv: `ssm.tree_conv.check_conv` does.
    """
    num_rows = len(rows.values_MK)
    _check(rows, weight_NK, out_MN, (num_rows, len(weight_NK)))
    config = pick_config(num_rows, weight_NK, one_token=one_token)
    assert config is not None
    launch(config, rows, weight_NK, out_MN, conv=conv)


def linear_activated(
    rows: DeferredNorm, weight_XK: Tensor, out_MF: Tensor, activation: Activation, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Write the activation of norm(rows) @ weight.T to `out_MF`.

    The contract is that of `linear_ref.linear_activated`. Allocates where it takes several
    launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows, num_products = len(rows.values_MK), len(weight_XK)
    num_inner = num_products // 2 if activation in GATED else num_products
    _check(rows, weight_XK, out_MF, (num_rows, num_inner))
    config = pick_config(num_rows, weight_XK, one_token=one_token)
    if config is not None:
        launch(config, rows, weight_XK, out_MF, activation=activation)
    else:
        product_MX = weight_XK.new_empty(num_rows, num_products)
        _matmul(rows, weight_XK, product_MX)
        activate(product_MX, out_MF, activation)


def linear_add(
    rows: DeferredNorm, weight_DK: Tensor, residual: Residual, *, eps: float,
    one_token: bool = False,
) -> DeferredNorm:  # fmt: skip
    """Add norm(rows) @ weight.T to the residual stream; return its rows for the next projection.

    The contract is that of `linear_ref.linear_add`. Where the next projection takes cuBLAS the rows
    come with their norm applied. Allocates where it takes several launches.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    num_rows = len(rows.values_MK)
    check_residual(residual)
    _check(rows, weight_DK, residual.stream_MD, (num_rows, len(weight_DK)))
    config = pick_config(num_rows, weight_DK, one_token=one_token)
    if isinstance(config, StreamConfig):
        return _stream_add(config, rows, weight_DK, residual, eps)
    if config is not None:
        launch(config, rows, weight_DK, residual.stream_MD, residual=residual)
        return residual.rows(eps)
    product_MD = torch.empty_like(residual.stream_MD, dtype=torch.float32)
    # One scale for a whole row may wait until the product is added; groups may not.
    late = rows.num_groups == 1
    _matmul(rows._replace(square_sums_MQ=None) if late else rows, weight_DK, product_MD)
    scaled = DeferredNorm(torch.empty_like(residual.values_MD), None, 1, eps)
    add_residual(product_MD, residual, rows if late else None, scaled)
    return scaled


def launch(
    config: Config, rows: DeferredNorm, weight: Tensor, out: Tensor,
    *, activation: Activation | None = None, residual: Residual | None = None,
    conv: ConvTail | None = None,
) -> None:  # fmt: skip
    """Run the kernel that `config` is of; `out` is the stream of a residual."""
    if isinstance(config, StreamConfig):
        plan = _plan(config, rows, weight, out.shape[1], gated=activation in GATED, shares=False)
        _stream(plan, rows, weight, out, activation)
        return
    more: dict[str, Any] = {"activation": activation, "residual": residual, "conv": conv}
    more["early"] = _is_short(config, weight)
    if isinstance(config, GemvConfig):
        kernel = launch_gemv(config, rows, weight, out, **more)
    else:
        kernel = launch_linear(config, rows, weight, out, **more)
    if weight.shape[1] >= NARROW:
        prefer_cache(kernel, weight.device)
    else:
        match_neighbours(kernel, weight.device, len(out), weight.shape[1])


def _stream_add(
    config: StreamConfig, rows: DeferredNorm, weight_DK: Tensor, residual: Residual, eps: float
) -> DeferredNorm:
    """Add norm(rows) @ weight.T to the stream in two launches; return its rows."""
    num_rows, num_columns = residual.stream_MD.shape
    # One scale for a whole row may wait until the product is there; groups may not.
    rows = rows if rows.num_groups == 1 else _scaled(rows)
    plan = _plan(config, rows, weight_DK, num_columns, gated=False, shares=True)
    shares_RMD = weight_DK.new_empty(
        plan.num_ranks(num_columns), num_rows, num_columns, dtype=torch.float32
    )
    _stream(plan, rows, weight_DK, shares_RMD, None)
    return add_shares(shares_RMD, plan, residual, rows, eps)


def _stream(
    plan: StreamPlan, rows: DeferredNorm, weight: Tensor, out: Tensor,
    activation: Activation | None,
) -> None:  # fmt: skip
    """Run the Gluon kernel, which other architectures do not import."""
    from stree_kernels.linear.stream_kernel import launch_stream

    rows = rows if rows.num_groups == 1 else _scaled(rows)
    kernel = launch_stream(plan, rows, weight, out, activation=activation)
    prefer_shared(kernel, weight.device, plan.num_programs, streamed=True)


def _plan(
    config: StreamConfig, rows: DeferredNorm, weight: Tensor, num_outputs: int, *, gated: bool,
    shares: bool,
) -> StreamPlan:  # fmt: skip
    num_rows, num_inner = rows.values_MK.shape
    num_sms = num_multiprocessors(weight.device)
    return _cached_plan(config, num_rows, num_outputs, num_inner, num_sms, gated, shares)


@functools.lru_cache(maxsize=1024)
def _cached_plan(
    config: StreamConfig, num_rows: int, num_outputs: int, num_inner: int, num_sms: int,
    gated: bool, shares: bool,
) -> StreamPlan:  # fmt: skip
    return make_plan(config, num_rows, num_outputs, num_inner, num_sms, gated=gated, shares=shares)


def _scaled(rows: DeferredNorm) -> DeferredNorm:
    """Return the rows times their norm, rounded, in a buffer of their own."""
    if rows.square_sums_MQ is None:
        return rows
    scaled_MK = torch.empty_like(rows.values_MK)
    scale_rows(rows, None, scaled_MK)
    return DeferredNorm(scaled_MK, None, 1, rows.eps)


def _matmul(rows: DeferredNorm, weight_NK: Tensor, out_MN: Tensor) -> None:
    """Write norm(rows) @ weight.T by cuBLAS, in the dtype of `out_MN`."""
    scaled_MK = _scaled(rows).values_MK
    if out_MN.dtype == scaled_MK.dtype:
        torch.mm(scaled_MK, weight_NK.T, out=out_MN)
    else:
        torch.mm(scaled_MK, weight_NK.T, out_dtype=out_MN.dtype, out=out_MN)


def _check(rows: DeferredNorm, weight: Tensor, out: Tensor, out_shape: tuple[int, int]) -> None:
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
    multiple = 16 if rows.num_groups == 1 else GROUP_MULTIPLE
    if num_inner // rows.num_groups % multiple:
        raise ValueError(
            f"a norm group, or a row without, is a multiple of {multiple} columns, got "
            f"{num_inner // rows.num_groups}; use the torch backend"
        )
