"""Blocks of rows: which rows a pass runs, and their residual streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_kernels.launch.rows import MASK_MULTIPLE, conv_ancestors
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Device tables of a block of rows whose parents stand before them.

    `mask_RR` (bool) is the tree mask, its columns filled up to a multiple of MASK_MULTIPLE,
    `depth_R` (int32) the distance from the path's first row, `ancestors_RK` (int32) the conv's
    table of stree_kernels.launch.rows.conv_ancestors, by conv width.
    """

    num_rows: int
    mask_RR: Tensor
    depth_R: Tensor
    ancestors_RK: dict[int, Tensor]


def make_block(
    parents: Sequence[int], conv_widths: frozenset[int], device: torch.device
) -> RowBlock:
    """Build the tables for rows with these parents (-1 at the start of a path) on `device`."""
    paths: list[list[int]] = []
    for row, parent in enumerate(parents):
        paths.append([*paths[parent], row] if parent >= 0 else [row])
    num_columns = -(-len(parents) // MASK_MULTIPLE) * MASK_MULTIPLE
    mask = torch.zeros(len(parents), num_columns, dtype=torch.bool)
    for row, path in enumerate(paths):
        mask[row, path] = True
    depths = torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32)
    ancestors = {
        width: torch.tensor(conv_ancestors(parents, width), dtype=torch.int32, device=device)
        for width in conv_widths
    }
    return RowBlock(len(parents), mask.to(device), depths.to(device), ancestors)


def copied(rows: DeferredNorm) -> DeferredNorm:
    """Return rows that stay when the stream goes on."""
    assert rows.square_sums_MQ is not None
    return rows._replace(
        values_MK=rows.values_MK.clone(), square_sums_MQ=rows.square_sums_MQ.clone()
    )


def side_by_side(left: DeferredNorm, right: DeferredNorm) -> DeferredNorm:
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
