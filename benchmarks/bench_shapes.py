"""What is benchmarked: layers, the shipped shapes of whole models, and balanced trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stree_autotune.store.library import Library, shipped_root
from stree_core.families.model_shape import ModelShape
from stree_core.models.source import spec_source
from stree_kernels.launch.rows import MAX_BUFFERED, Pending, next_num_buffered

ACCEPTED_ROWS = 3
# Three times around for paths of three rows, once for single ones.
PHASES = 18


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A Mamba2 layer's scan; heads may share x, and groups of B and C may differ in number."""

    name: str
    num_heads: int
    head_dim: int
    state_dim: int
    num_x_heads: int
    num_b_groups: int
    num_c_groups: int

    @property
    def conv_dims(self) -> tuple[int, int, int]:
        """Columns of x, B and C."""
        x = self.num_x_heads * self.head_dim
        return x, self.num_b_groups * self.state_dim, self.num_c_groups * self.state_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in fp32."""
        return 4 * self.num_heads * self.head_dim * self.state_dim

    def floor_bytes(self, batch: int, tokens: int, path_rows: int) -> int:
        """Return the bytes that a replay and a scan cannot avoid.

        The state is read and written once; x, dt, B, C and y of the tokens, and x, dt and B of the
        replayed rows, are in bf16.
        """
        x, b, c = self.conv_dims
        replayed = x + self.num_heads + b
        scored = replayed + c + self.num_heads * self.head_dim
        return batch * (2 * self.state_bytes + 2 * (tokens * scored + path_rows * replayed))


LAYERS = {
    shape.name: shape
    for shape in (
        LayerShape("mamba2-2.7b", 80, 64, 128, 80, 1, 1),
        LayerShape("nemotron-3-nano", 64, 64, 128, 64, 8, 8),
        LayerShape("mamba-in-llama-8b", 32, 128, 128, 8, 8, 32),
    )
}


def balanced_tree(num_tokens: int) -> list[int]:
    """Return the parents of a tree whose nodes have two children each, level by level."""
    return [-1, *((node - 1) // 2 for node in range(1, num_tokens))]


def leaf_paths(parents: Sequence[int]) -> list[list[int]]:
    """Return the path from the root to every leaf."""
    leaves = sorted(set(range(len(parents))) - set(parents))
    paths = []
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


def accepted_path(num_tokens: int) -> list[int]:
    """Return rows of the balanced tree that a step may have accepted: first children."""
    path = [0]
    while len(path) < ACCEPTED_ROWS and 2 * path[-1] + 1 < num_tokens:
        path.append(2 * path[-1] + 1)
    return path


def pending_phases(num_tokens: int, batch: int, device: torch.device) -> list[Pending]:
    """Return what is pending in PHASES calls after one another, for every sequence alike.

    A step accepts `accepted_path` rows, one without a tree, and buffered rows gather until the
    state is advanced by all of them, as in a decoder.
    """
    accepted = accepted_path(num_tokens)
    path = torch.tensor([accepted] * batch, dtype=torch.int32, device=device)
    length = torch.full((batch,), len(accepted), dtype=torch.int32, device=device)
    phases = [Pending(path, length, torch.zeros_like(length))]
    while len(phases) < PHASES:
        phases.append(Pending(path, length, next_num_buffered(phases[-1])))
    return phases


def flushing(phases: list[Pending]) -> Pending:
    """Return a pending path that does not fit, so that a call advances and stores the state."""
    path, length, num_buffered = phases[0]
    return Pending(path, length, torch.full_like(num_buffered, MAX_BUFFERED))


def model_shape(name: str) -> ModelShape:
    """Return the shape of a shipped spec."""
    return spec_source(Library.open().find_shape(name)).shape


def shape_names() -> list[str]:
    """Return the names of all shipped specs."""
    return sorted(path.stem for path in (shipped_root() / "shapes").glob("*.yaml"))
