"""A gated delta layer's inputs for many calls, and what every op must return, in float64.

Shape letters: B batch, T tokens of the tree, R rows of a buffer, H value heads, P value head dim,
N key head dim, G key heads, C columns of q, k and v.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stree_core.models.row_block import RowBlock, make_block
from stree_kernels.delta import delta_scan_ref
from stree_kernels.delta.rows import DeltaHeads, DeltaPast, DeltaRows, DeltaTokens
from stree_kernels.launch.rows import MAX_BUFFERED, Pending, next_num_buffered

ACCEPTED_ROWS = 4
PHASES = 5
"""Calls until the state is stored: paths of four rows beside at most sixteen."""
DECAY_BIAS = -3.0


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """A gated delta layer's scan."""

    name: str
    num_key_heads: int
    num_heads: int
    state_dim: int
    head_dim: int

    @property
    def sections(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        keys = self.num_key_heads * self.state_dim
        return keys, keys, self.num_heads * self.head_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in fp32."""
        return 4 * self.num_heads * self.head_dim * self.state_dim

    def floor_bytes(self, batch: int, tokens: int) -> int:
        """Return the bytes that a call cannot avoid: the state is read, rows are read and written.

        q, k, v and o are in bf16, u and the gates in fp32; four accepted rows are read.
        """
        keys, _, values = self.sections
        scored = 2 * (2 * keys + 2 * values) + 4 * (values + 2 * self.num_heads)
        replayed = 2 * keys + 4 * (values + self.num_heads)
        return batch * (self.state_bytes + tokens * scored + ACCEPTED_ROWS * replayed)


SHAPES = {
    shape.name: shape
    for shape in (
        DeltaShape("qwen3-next", 16, 32, 128, 128),
        DeltaShape("qwen3.5-27b", 16, 48, 128, 128),
    )
}


def likely_tree(num_tokens: int, max_depth: int = 8) -> list[int]:
    """Return the parents of the likeliest nodes where rank r is accepted at 0.62 * 0.35^r."""
    frontier: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    paths: list[tuple[int, ...]] = []
    while len(paths) < num_tokens:
        weight, path = heapq.heappop(frontier)
        paths.append(path)
        if len(path) < max_depth:
            for rank in range(6):
                heapq.heappush(frontier, (weight * 0.62 * 0.35**rank, (*path, rank)))
    paths.sort(key=lambda path: (len(path), path))
    place = {path: node for node, path in enumerate(paths)}
    return [place[path[:-1]] if path else -1 for path in paths]


def depth(parents: Sequence[int]) -> int:
    """Return the edges of a tree's longest path."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return max(depths)


@dataclass(frozen=True, slots=True)
class Buffer:
    """What one call reads and writes; rows are time-major: buffered ones, the previous block's,
    this block's. `raw_BTX` is what peers make the gates from: a, then b."""

    state_BHPN: Tensor
    all_rows: DeltaRows
    tokens: DeltaTokens
    out_BTHP: Tensor
    raw_BTX: Tensor

    @property
    def rows(self) -> DeltaRows:
        """The rows that are scored."""
        num_tokens = self.out_BTHP.shape[1]
        return DeltaRows(*(tensor[:, -num_tokens:] for tensor in self.all_rows))


@dataclass(frozen=True)
class DeltaInputs:
    """A layer, a tree, and buffers that calls take turns on."""

    shape: DeltaShape
    batch: int
    parents: list[int]
    block: RowBlock
    heads: DeltaHeads
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
    def chain(self) -> RowBlock:
        """As many tokens, one after the other."""
        return make_block(range(-1, self.tokens - 1), frozenset(), self.device)

    def past(self, buffer: Buffer, pending: Pending) -> DeltaPast:
        """Return what a call commits: a path of the previous block's rows, behind buffered ones."""
        return DeltaPast(buffer.all_rows, MAX_BUFFERED, pending, commit=True)

    def truth(self, pending: Pending, block: RowBlock) -> tuple[Tensor, Tensor]:
        """Return o_BTHP and the state after the call on buffer 0, from the float64 reference."""
        buffer = self.buffers[0]
        all_rows = DeltaRows(*(tensor.double() for tensor in buffer.all_rows))
        num_tokens = self.tokens
        rows = DeltaRows(*(tensor[:, -num_tokens:] for tensor in all_rows))
        out = torch.empty(buffer.out_BTHP.shape, dtype=torch.float64, device=self.device)
        state = buffer.state_BHPN.double()
        delta_scan_ref.delta_scan(
            state, rows, DeltaTokens(*(tensor.double() for tensor in buffer.tokens)),
            block.mask_RR, first=0, out_BTHP=out, gate=None,
            past=DeltaPast(all_rows, MAX_BUFFERED, pending, commit=True),
        )  # fmt: skip
        return out, state

    @property
    def nothing(self) -> Pending:
        """No accepted rows: what peers that keep none are compared with."""
        return Pending(*(torch.zeros_like(table) for table in self.phases[0]))


def make_inputs(
    shape: DeltaShape, batch: int, tokens: int, num_buffers: int, device: torch.device
) -> DeltaInputs:
    """Draw a layer's inputs, the same on every run on one device."""
    generator = torch.Generator(device).manual_seed(tokens + 1000 * batch)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    rates = torch.rand(shape.num_heads, generator=generator, device=device)
    heads = DeltaHeads(-16 * rates - 0.1, normal(shape.num_heads) + DECAY_BIAS)
    parents = likely_tree(tokens)
    buffers = [_draw(shape, heads, batch, tokens, normal) for _ in range(num_buffers)]
    return DeltaInputs(
        shape, batch, parents, make_block(parents, frozenset(), device), heads,
        pending_phases(batch, device), buffers,
    )  # fmt: skip


def _draw(
    shape: DeltaShape, heads: DeltaHeads, batch: int, tokens: int,
    normal: functools.partial[Tensor],
) -> Buffer:  # fmt: skip
    """Return rows as they lie in memory after the conv, and a state."""
    num_rows = MAX_BUFFERED + max(tokens, ACCEPTED_ROWS) + tokens
    rows_BRC = normal(num_rows, batch, sum(shape.sections), dtype=torch.bfloat16).transpose(0, 1)
    q, k, v = rows_BRC.split(shape.sections, dim=-1)
    q, k = (x.unflatten(-1, (shape.num_key_heads, shape.state_dim)) for x in (q, k))
    for x in (q, k):
        x.copy_(functional.normalize(x.float(), dim=-1))
    raw_BRX = normal(num_rows, batch, 2 * shape.num_heads).transpose(0, 1)
    a, b = raw_BRX.split(shape.num_heads, dim=-1)
    gates = torch.empty(num_rows, batch, 2 * shape.num_heads, device=raw_BRX.device)
    g, beta = gates.transpose(0, 1).split(shape.num_heads, dim=-1)
    g.copy_(heads.a_H * functional.softplus(a + heads.bias_H))
    beta.copy_(torch.sigmoid(b))
    size = (shape.num_heads, shape.head_dim)
    u = normal(num_rows, batch, *size).transpose(0, 1)
    out = torch.full((tokens, batch, *size), torch.nan, dtype=torch.bfloat16, device=raw_BRX.device)
    return Buffer(
        state_BHPN=normal(batch, *size, shape.state_dim),
        all_rows=DeltaRows(u, k, g),
        tokens=DeltaTokens(q[:, -tokens:], v.unflatten(-1, size)[:, -tokens:], beta[:, -tokens:]),
        out_BTHP=out.transpose(0, 1),
        raw_BTX=raw_BRX[:, -tokens:],
    )


def pending_phases(batch: int, device: torch.device) -> list[Pending]:
    """Return what is pending in the calls of one flush cycle, for every sequence alike."""
    path = torch.arange(ACCEPTED_ROWS, dtype=torch.int32, device=device).expand(batch, -1)
    length = torch.full((batch,), ACCEPTED_ROWS, dtype=torch.int32, device=device)
    phases = [Pending(path.contiguous(), length, torch.zeros_like(length))]
    while len(phases) < PHASES:
        phases.append(Pending(path.contiguous(), length, next_num_buffered(phases[-1])))
    return phases
