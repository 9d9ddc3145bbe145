"""Cases of the gated delta scan, and its recurrence over nodes in numpy.

Shape letters: B batch, R rows of a buffer, T rows scored, L path capacity, H value heads, P value
head dim, N key head dim, G key heads, Q partial sums of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stree_core.tree import Tree
from stree_kernels.delta.rows import DeltaPast, DeltaRows, DeltaTokens
from stree_kernels.launch.rows import MASK_MULTIPLE, MAX_BUFFERED, Gate, Pending, gate_width
from stree_kernels.testing import assert_close, poisoned

OUT_ERRORS = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    # three bits more than bf16; the state is rounded to tf32 for its product with q
    torch.float16: 1e-3,
    # the output's own rounding is 1.7e-3
    torch.bfloat16: 2.5e-3,
}
"""Relative errors of o by the dtype of the rows."""
SOLVED_ERRORS = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}
"""Of u: what it is solved from enters as two parts of bf16."""
STATE_ERROR = 1e-5


@dataclass(frozen=True)
class DeltaCase:
    """The tensors of one scan: buffers of buffered rows, the previous block and this one, each
    block followed by a row of NaN, and the NaN of what is not kept and of what is to be solved
    for."""

    state: Tensor
    buffer: DeltaRows
    previous: int
    current: int
    tokens: DeltaTokens
    mask: Tensor
    pending: Pending
    z: Tensor | None = None

    @property
    def rows(self) -> DeltaRows:
        """The block that is scored."""
        end = self.current + self.tokens.v_BTHP.shape[1]
        return DeltaRows(*(tensor[:, self.current : end] for tensor in self.buffer))

    def scan(
        self, op: Any, first: int = 0, stop: int | None = None, *, commit: bool = True
    ) -> Tensor:
        """Return o of rows first..stop - 1; the state and the buffers change in place."""
        tokens = DeltaTokens(*(tensor[:, first:stop] for tensor in self.tokens))
        v = tokens.v_BTHP
        out = poisoned(*v.shape, dtype=v.dtype, device=v.device)
        gate = None
        if self.z is not None:
            width = gate_width(*self.state.shape[2:], v.dtype)
            wide = torch.promote_types(torch.float32, v.dtype)
            num_sums = v[0, 0].numel() // width
            sums = poisoned(*v.shape[:2], num_sums, dtype=wide, device=v.device)
            gate = Gate(self.z[:, first:stop], sums)
        op.delta_scan(
            self.state, self.rows, tokens, self.mask, first=first, out_BTHP=out, gate=gate,
            past=DeltaPast(self.buffer, self.previous, self.pending, commit),
        )  # fmt: skip
        if gate is not None:
            _check_sums(out, gate)
        return out

    def to(self, dtype: torch.dtype, state: torch.dtype, device: str = "cpu") -> DeltaCase:
        """Return a copy in other dtypes; u, the decay and beta are fp32 unless rows are float64."""
        wide = torch.promote_types(dtype, torch.float32)
        u, k, g = self.buffer
        q, v, beta = self.tokens
        return dataclasses.replace(
            self,
            state=self.state.to(device, state, copy=True),
            buffer=DeltaRows(
                u.to(device, wide, copy=True), k.to(device, dtype, copy=True),
                g.to(device, wide, copy=True),
            ),
            tokens=DeltaTokens(q.to(device, dtype), v.to(device, dtype), beta.to(device, wide)),
            mask=self.mask.to(device),
            pending=Pending(*(tensor.to(device) for tensor in self.pending)),
            z=None if self.z is None else self.z.to(device, dtype),
        )  # fmt: skip


def _check_sums(out: Tensor, gate: Gate) -> None:
    """The sums are of o before its gate: o is the output over silu(z)."""
    z = gate.z_BTHP.double()
    squares = (out.double() / torch.nn.functional.silu(z)).square()
    sums = gate.square_sums_BTQ
    runs = squares.flatten(2).unflatten(2, (sums.shape[2], -1)).sum(3)
    # The sums are of values that are not rounded yet.
    coarse = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(out.dtype, 1e-5)
    assert_close("sums of squares", sums, runs, tolerance=coarse)


def make_case(
    tree: Tree, *, paths: Sequence[Sequence[int]] = ((), ()), kept: Sequence[int] | None = None,
    capacity: int = 4, heads: int = 2, key_heads: int | None = None, head_dim: int = 4,
    state_dim: int = 3, gated: bool = False, alike: float = 0.0,
    beta_range: tuple[float, float] = (0.0, 1.0), decay_range: tuple[float, float] = (0.0, 0.5),
    per_channel: bool = False,
) -> DeltaCase:  # fmt: skip
    """Build a case in float64, buffers time-major, with buffered rows and a path per sequence.

    Keys are `alike` when they share a direction: 1 is all the same.
    """
    random = np.random.default_rng(tree.num_tokens)
    batch = len(paths)
    kept = kept or [0] * batch
    key_heads = key_heads or heads
    num_previous = 1 + max((row for path in paths for row in path), default=0)
    previous, current = MAX_BUFFERED, MAX_BUFFERED + num_previous + 1
    num_rows = current + tree.num_tokens + 1

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
        return torch.from_numpy(random.uniform(*bounds, shape))

    def unit(*shape: int) -> Tensor:
        x = alike * normal(*shape[2:]) + (1 - alike) * normal(*shape)
        return x / x.norm(dim=-1, keepdim=True)

    u = normal(num_rows, batch, heads, head_dim).transpose(0, 1)
    k = unit(num_rows, batch, key_heads, state_dim).transpose(0, 1)
    channels = (state_dim,) if per_channel else ()
    g = -uniform(decay_range, num_rows, batch, heads, *channels).transpose(0, 1)
    for tensor in (u, k, g):
        tensor[:, [current - 1, num_rows - 1]] = torch.nan
        for sequence, count in enumerate(kept):
            tensor[sequence, count:MAX_BUFFERED] = torch.nan
    u[:, current:] = torch.nan
    # What stands after a path is any row of the block, also one that nothing has written.
    path_BL = torch.full((batch, capacity), num_previous, dtype=torch.int32)
    for sequence, path in enumerate(paths):
        path_BL[sequence, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    size = (batch, tree.num_tokens)
    return DeltaCase(
        state=normal(batch, heads, head_dim, state_dim),
        buffer=DeltaRows(u, k, g),
        previous=previous,
        current=current,
        tokens=DeltaTokens(
            unit(*size, key_heads, state_dim),
            normal(*size, heads, head_dim),
            uniform(beta_range, *size, heads),
        ),
        mask=torch.from_numpy(np.pad(tree.mask, ((0, 0), (0, -tree.num_tokens % MASK_MULTIPLE)))),
        pending=Pending(path_BL, length_B, torch.tensor(kept, dtype=torch.int32)),
        z=away_from_zero(normal(*size, heads, head_dim)) if gated else None,
    )


def away_from_zero(z: Tensor) -> Tensor:
    """A gate that an output may be divided by."""
    return z + 0.5 * z.sign()


def numpy_rows(case: DeltaCase, sequence: int, row: int) -> tuple[Any, Any, Any]:
    """u [H, P], k [H, N] and the decay's factor [H, 1 or N] of a row of the buffer."""
    u, k, g = (tensor[sequence, row].double().cpu().numpy() for tensor in case.buffer)
    factor = np.exp(g if g.ndim == 2 else g[:, None])
    return u, np.repeat(k, len(u) // len(k), axis=0), factor


def by_recurrence(case: DeltaCase, parents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after all accepted rows, o and u of all rows, node after node."""
    states, outs, solved = case.state.double().cpu().numpy().copy(), [], []
    path_BL, length_B, num_buffered_B = (tensor.cpu() for tensor in case.pending)
    num_heads = states.shape[1]
    for sequence, committed in enumerate(states):
        path = path_BL[sequence, : length_B[sequence]].tolist()
        for row in (*range(num_buffered_B[sequence]), *(case.previous + row for row in path)):
            u, k, factor = numpy_rows(case, sequence, row)
            committed[:] = committed * factor[:, None, :] + u[:, :, None] * k[:, None, :]
        after: dict[int, Any] = {-1: committed}
        for node, parent in enumerate(parents):
            _, k, factor = numpy_rows(case, sequence, case.current + node)
            q, v, beta = (tensor[sequence, node].double().cpu().numpy() for tensor in case.tokens)
            before = after[parent] * factor[:, None, :]
            u = beta[:, None] * (v - np.einsum("hpn,hn->hp", before, k))
            after[node] = before + u[:, :, None] * k[:, None, :]
            q_heads = np.repeat(q, num_heads // len(q), axis=0)
            o = np.einsum("hpn,hn->hp", after[node], q_heads) / np.sqrt(states.shape[3])
            if case.z is not None:
                z = case.z[sequence, node].double().cpu().numpy()
                o *= z / (1 + np.exp(-z))
            outs.append(o)
            solved.append(u)
    size = (len(states), len(parents), *states.shape[1:3])
    o_all, u_all = (np.stack(values).reshape(size) for values in (outs, solved))
    return torch.from_numpy(states), torch.from_numpy(o_all), torch.from_numpy(u_all)


def random_tree(random: np.random.Generator, num_tokens: int, max_depth: int) -> Tree:
    """A tree grown by hanging one node at a time under any node in reach."""
    paths: list[tuple[int, ...]] = [()]
    children: dict[tuple[int, ...], int] = {}
    while len(paths) < num_tokens:
        parent = paths[int(random.integers(len(paths)))]
        if len(parent) < max_depth:
            rank = children.get(parent, 0)
            children[parent] = rank + 1
            paths.append((*parent, rank))
    return Tree.from_paths(paths[1:])
