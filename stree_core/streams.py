"""Copies of rows and residual streams, and rows side by side."""

from __future__ import annotations

import torch

from stree_kernels.unscaled import Residual, UnscaledRows


def copied(rows: UnscaledRows) -> UnscaledRows:
    """Return rows that stay when the stream goes on."""
    assert rows.square_sums_MQ is not None
    return rows._replace(
        values_MK=rows.values_MK.clone(), square_sums_MQ=rows.square_sums_MQ.clone()
    )


def side_by_side(left: UnscaledRows, right: UnscaledRows) -> UnscaledRows:
    """Return rows that hold the columns of both, with one norm over all of them."""
    assert left.square_sums_MQ is not None
    assert right.square_sums_MQ is not None
    return left._replace(
        values_MK=torch.cat((left.values_MK, right.values_MK), dim=1),
        square_sums_MQ=torch.cat((left.square_sums_MQ, right.square_sums_MQ), dim=1),
    )


def like(residual: Residual, *, zero: bool) -> Residual:
    """Return another residual of the same kind: zero, or a copy."""
    stream_MD = torch.zeros_like(residual.stream_MD) if zero else residual.stream_MD.clone()
    same = residual.values_MD is residual.stream_MD
    values_MD = stream_MD if same else torch.empty_like(residual.values_MD)
    return Residual(stream_MD, values_MD, torch.empty_like(residual.square_sums_MQ))
