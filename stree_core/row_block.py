"""The tokens of one pass as rows of a block, with every table that depends on their shape alone.

Shape letters: T or R rows of the block, K conv width - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_kernels.rows import MASK_MULTIPLE, conv_ancestors


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Device tables of a block of rows whose parents stand before them.

    `mask_RR` (bool) is the tree mask, its columns filled up to a multiple of MASK_MULTIPLE,
    `depth_R` (int32) the distance from the path's first row, `ancestors_RK` (int32) the conv's
    table of stree_kernels.rows.conv_ancestors, by conv width.
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
