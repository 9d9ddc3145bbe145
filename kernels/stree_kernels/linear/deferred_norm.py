"""Rows that travel without their norm: values, sums of squares, and a residual stream.

RMS norm multiplies a row, or a group of its columns, by one number. A product with a weight may be
multiplied by it instead, so no kernel has to wait for a whole row before it can store a part of it.
The norm's own weights are folded into the weight that the rows are multiplied by.

Shape letters: M rows, K columns, Q partial sums of a row, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed

COLUMNS_PER_SUM = 8
"""Columns of a residual stream that one sum of squares covers: the least a program may own."""


class DeferredNorm(NamedTuple):
    """Rows in the model's dtype and what their norm divides by.

    `square_sums_MQ` (fp32) splits the columns into Q equal runs, one sum of squares each; None is
    no norm. The norm is taken over `num_groups` equal runs of columns; it divides Q.
    """

    values_MK: Tensor
    square_sums_MQ: Tensor | None
    num_groups: int
    eps: float


class Residual(NamedTuple):
    """A residual stream, in fp32 or the model's dtype, and what the next layer reads of it.

    `values_MD` is the stream rounded to the model's dtype: the same tensor where the dtypes agree.
    `square_sums_MQ` (fp32) is of the stream's own values, one for `COLUMNS_PER_SUM` columns.
    """

    stream_MD: Tensor
    values_MD: Tensor
    square_sums_MQ: Tensor

    def rows(self, eps: float) -> DeferredNorm:
        """Return the rows as the input of a layer with one norm over all columns."""
        return DeferredNorm(self.values_MD, self.square_sums_MQ, 1, eps)


def scale_factors(rows: DeferredNorm) -> Tensor:
    """Return the number [M, groups] that each group of columns is multiplied by."""
    assert rows.square_sums_MQ is not None
    num_rows, num_columns = rows.values_MK.shape
    sums_MG = rows.square_sums_MQ.view(num_rows, rows.num_groups, -1).sum(2)
    return torch.rsqrt(sums_MG * (rows.num_groups / num_columns) + rows.eps)


def check_rows(rows: DeferredNorm) -> None:
    """Raise ValueError unless the rows have the sizes, dtypes and strides a kernel relies on."""
    values, sums = rows.values_MK, rows.square_sums_MQ
    require_dtypes("rows", (values,), FLOATS)
    require_packed("rows", (values,), 2)
    if sums is None:
        return
    require_dtypes("sums of squares", (sums,), (torch.float32,))
    require_packed("sums of squares", (sums,), 2)
    if values.shape[1] % sums.shape[1] or sums.shape[1] % rows.num_groups:
        raise ValueError(
            "norm groups divide the sums of squares and these the columns, got "
            f"{rows.num_groups}, {sums.shape[1]} and {values.shape[1]}; check the model's config"
        )


def check_residual(residual: Residual) -> None:
    """Raise ValueError unless a residual has the sizes, dtypes and strides a kernel relies on."""
    stream, values, sums = residual
    num_rows, num_columns = stream.shape
    require_dtypes("the residual stream", (stream,), FLOATS)
    require_dtypes("the residual's values", (values,), FLOATS)
    require_dtypes("sums of squares", (sums,), (torch.float32,))
    require_packed("the residual", residual, 2)
    if stream.dtype == values.dtype and stream.data_ptr() != values.data_ptr():
        raise ValueError(
            f"a residual stream in the model's dtype is its own values, got two of {values.dtype}; "
            "pass the stream twice"
        )
    num_sums, overhead = divmod(num_columns, COLUMNS_PER_SUM)
    if overhead or values.shape != stream.shape or sums.shape != (num_rows, num_sums):
        raise ValueError(
            f"a residual has one sum of squares for {COLUMNS_PER_SUM} columns, got stream "
            f"{tuple(stream.shape)}, values {tuple(values.shape)}, sums {tuple(sums.shape)}; "
            "the hidden size is a multiple of it"
        )
