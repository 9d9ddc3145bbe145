"""What `aot.py` compiles of projections and experts in FP8: calls as a model makes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from stree_kernels.fp8 import experts, projection
from stree_kernels.fp8.scaled_weight import CODES, ScaledWeight
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual

Case = Callable[[], None]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

KINDS = {"block": (128, 128), "tensor": (128, None), "channel": (1, None), "ragged": (32, 128)}
"""Rows of a group and columns of a block by how a checkpoint is scaled; None is all columns."""


def quick_cases() -> Iterator[tuple[str, Case]]:
    """Yield block-scaled projections and experts in bf16."""
    for num_rows in (1, 8, 64):
        yield projection_case(num_rows, 1024, 10240)
    yield "fp8 experts block", partial(moe, 2, 8, 2048, 512, "swiglu")


def more_cases() -> Iterator[tuple[str, Case]]:
    """Yield the other configurations, at sizes that models have."""
    for num_rows in (1, 8, 16, 64, 128, 256):
        yield projection_case(num_rows, 4096, 10240)
    for num_rows, kind in itertools.product((1, 8, 33, 128), KINDS):
        yield projection_case(num_rows, 2048, 4096, kind=kind, groups=32)
    for num_rows in (1, 8, 16, 64, 128):
        yield projection_case(num_rows, 14336, 4096)
        yield projection_case(num_rows, 5120, 34816)
    for num_rows, dtype in itertools.product((1, 8, 33), (FP16, FP32)):
        yield projection_case(num_rows, 2048, 10272, dtype=dtype)
    for kind in KINDS:
        yield f"fp8 experts {kind}", partial(moe, 2, 6, 2688, 1856, "relu2", kind=kind)
        yield f"fp8 gated experts {kind}", partial(moe, 2, 8, 2048, 512, "swiglu", kind=kind)


def projection_case(
    num_rows: int, inner: int, columns: int, *, kind: str = "block", groups: int = 1,
    dtype: torch.dtype = BF16,
) -> tuple[str, Case]:  # fmt: skip
    """Return a named call of the projections."""
    name = f"fp8 {kind} M={num_rows} {columns}x{inner} {dtype} G={groups}"
    run = partial(projections, num_rows, inner, columns, kind=kind, groups=groups, dtype=dtype)
    return name, run


def weight_of(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> ScaledWeight:
    """Return a weight of zeros."""
    row_group, block = KINDS[kind]
    *lead, num_rows, num_columns = shape
    scales = torch.empty(
        *lead, -(-num_rows // row_group), -(-num_columns // (block or num_columns))
    )
    codes = torch.empty(shape, dtype=torch.uint8).view(CODES)
    return ScaledWeight(codes, scales, row_group, block or num_columns, dtype)


def projections(
    num_rows: int, inner: int, columns: int, *, kind: str, groups: int, dtype: torch.dtype
) -> None:
    """Run plain with a norm, gated MLP, fp32 output, added to the stream."""
    num_sums = inner // COLUMNS_PER_SUM if groups == 1 else 2 * groups
    sums = torch.empty(num_rows, num_sums)
    rows = DeferredNorm(torch.empty(num_rows, inner, dtype=dtype), sums, groups, 1e-5)
    plain = weight_of((columns, inner), kind, dtype)
    normed = plain.times_columns(torch.ones(inner))
    out = torch.empty(num_rows, columns, dtype=dtype)
    projection.linear(rows, normed, out)
    half = out[:, : columns // 2].contiguous()
    projection.linear_activated(rows, normed, half, "swiglu")
    projection.linear(rows._replace(square_sums_MQ=None), plain, out.float())
    sums_out = torch.empty(num_rows, columns // COLUMNS_PER_SUM)
    projection.linear_add(rows, plain, Residual(out, out, sums_out), eps=1e-5)
    if dtype != FP32:
        projection.linear_add(rows, plain, Residual(out.float(), out, sums_out), eps=1e-5)


def moe(
    num_rows: int, num_chosen: int, hidden: int, inner: int, activation: Activation, *,
    kind: str = "block",
) -> None:  # fmt: skip
    """Run the experts of some rows, with an output in fp32."""
    num_products = 2 * inner if activation in GATED else inner
    experts.expert_mlps(
        torch.empty(num_rows, hidden, dtype=BF16),
        torch.zeros(num_rows, num_chosen, dtype=torch.int64), torch.empty(num_rows, num_chosen),
        weight_of((2, num_products, hidden), kind, BF16),
        weight_of((2, hidden, inner), kind, BF16), torch.empty(num_rows, hidden),
        activation=activation,
    )  # fmt: skip
