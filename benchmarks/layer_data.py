"""One layer's inputs for many calls, and what every op must return for them, in float64.

Shape letters: B batch, T tokens of the tree, R rows of a block buffer, H heads, X heads of x,
P head dim, N state dim, G groups, C columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from bench_shapes import LayerShape, balanced_tree, pending_phases
from torch import Tensor

from stree_core.models.row_block import RowBlock, make_block
from stree_kernels.launch.rows import MAX_BUFFERED, Past, Pending, ScanHeads, ScanRows
from stree_kernels.ssm import tree_scan_ref

UNLIMITED = (0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Buffer:
    """What one call reads and writes; rows are time-major, in the buffers of
    stree_core.models.cache: buffered ones, the previous block's, this block's."""

    state_BHPN: Tensor
    all_rows: ScanRows
    c_BTGN: Tensor
    out_BTHP: Tensor

    @property
    def rows(self) -> ScanRows:
        """The rows that are scored."""
        tokens = self.c_BTGN.shape[1]
        return ScanRows(*(tensor[:, MAX_BUFFERED + tokens :] for tensor in self.all_rows))


@dataclass(frozen=True, slots=True)
class RepeatedRows:
    """A buffer's rows as peers take them: batch-major, x, B and C repeated where heads share."""

    x_BTHP: Tensor
    dt_BTH: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """A layer, a tree, and buffers that calls take turns on."""

    shape: LayerShape
    batch: int
    parents: list[int]
    block: RowBlock
    heads: ScanHeads
    phases: list[Pending]
    buffers: list[Buffer]

    @property
    def tokens(self) -> int:
        """Tokens of the tree."""
        return len(self.parents)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.buffers[0].state_BHPN.device

    @functools.cached_property
    def repeated(self) -> list[RepeatedRows]:
        """Each buffer's rows for peers."""
        return [repeat_rows(self.shape, buffer.rows, buffer.c_BTGN) for buffer in self.buffers]

    @functools.cached_property
    def scored(self) -> Tensor:
        """The y of the tree against buffer 0's state as it stands, in float64."""
        return self.truth(Pending(*(torch.zeros_like(table) for table in self.phases[0])))[0]

    def past(self, buffer: Buffer, pending: Pending) -> Past:
        """Return what a call commits: a path of the previous block's rows, behind buffered ones."""
        return Past(buffer.all_rows, MAX_BUFFERED, pending, commit=True)

    def truth(self, pending: Pending) -> tuple[Tensor, Tensor]:
        """Return y_BTHP and the state after the call on buffer 0, from the float64 reference."""
        buffer = self.buffers[0]
        wide = ScanRows(*(tensor.double() for tensor in buffer.all_rows))
        buffer = Buffer(buffer.state_BHPN.double(), wide, buffer.c_BTGN.double(), buffer.out_BTHP)
        out = torch.empty(buffer.out_BTHP.shape, dtype=torch.float64, device=self.device)
        heads = ScanHeads(*(constants.double() for constants in self.heads))
        tree_scan_ref.tree_scan(
            buffer.state_BHPN, buffer.rows, buffer.c_BTGN, self.block.mask_RR, heads, first=0,
            dt_limit=UNLIMITED, out_BTHP=out, gate=None, past=self.past(buffer, pending),
        )  # fmt: skip
        return out, buffer.state_BHPN


def make_inputs(
    shape: LayerShape, batch: int, tokens: int, num_buffers: int, device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> LayerInputs:  # fmt: skip
    """Draw a layer's inputs, the same on every run on one device."""
    generator = torch.Generator(device).manual_seed(tokens + 1000 * batch)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    heads = ScanHeads(
        -1 - 15 * torch.rand(shape.num_heads, generator=generator, device=device),
        normal(shape.num_heads),
        normal(shape.num_heads) - 3,
    )
    parents = balanced_tree(tokens)
    buffers = []
    for _ in range(num_buffers):
        all_rows, c = _draw_rows(shape, batch, tokens, dtype, normal)
        size = (shape.num_heads, shape.head_dim)
        out = torch.full((tokens, batch, *size), torch.nan, dtype=dtype, device=device)
        state = normal(batch, *size, shape.state_dim)
        buffers.append(Buffer(state, all_rows, c, out.transpose(0, 1)))
    block = make_block(parents, frozenset(), device)
    return LayerInputs(
        shape, batch, parents, block, heads, pending_phases(tokens, batch, device), buffers
    )


def _draw_rows(
    shape: LayerShape, batch: int, tokens: int, dtype: torch.dtype,
    normal: functools.partial[Tensor],
) -> tuple[ScanRows, Tensor]:  # fmt: skip
    """Return buffered rows and two blocks as they lie in memory after a conv, and C of the last."""
    sections = (*shape.conv_dims, shape.num_heads)
    rows_BRE = normal(MAX_BUFFERED + 2 * tokens, batch, sum(sections), dtype=dtype).transpose(0, 1)
    x, b, c, dt = rows_BRE.split(sections, dim=-1)
    all_rows = ScanRows(
        x.unflatten(-1, (shape.num_x_heads, shape.head_dim)),
        dt,
        b.unflatten(-1, (shape.num_b_groups, shape.state_dim)),
    )
    return all_rows, c[:, -tokens:].unflatten(-1, (shape.num_c_groups, shape.state_dim))


def repeat_rows(shape: LayerShape, rows: ScanRows, c_BTGN: Tensor) -> RepeatedRows:
    """Return contiguous rows with x for every head and as many groups of B as of C."""

    def spread(tensor: Tensor, count: int) -> Tensor:
        repeats = count // tensor.shape[2]
        return tensor.repeat_interleave(repeats, dim=2).contiguous()

    x_BTHP, dt_BTH, b_BTGN = rows
    groups = max(shape.num_b_groups, shape.num_c_groups)
    return RepeatedRows(
        spread(x_BTHP, shape.num_heads), dt_BTH.contiguous(), spread(b_BTGN, groups),
        spread(c_BTGN, groups),
    )  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of `expected`; NaN stays NaN."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
