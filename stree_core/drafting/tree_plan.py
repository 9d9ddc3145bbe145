"""A tree's tables on the device: what draft, verify, accept and commit look up.

Rows of the target's block are the tree's nodes; those of the draft's are in the order of its layout
(stree_core.drafting.tree_plan).

Shape letters: T tree tokens, L path capacity (tree depth + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stree_core.models import RowBlock, make_block
from stree_core.tree import Tree
from stree_kernels.sampling.commit_path_ref import TreeTables


@dataclass(frozen=True, slots=True)
class DraftLevel:
    """One draft pass: which rows it runs, and which nodes their likeliest tokens become.

    `nodes` are the tree nodes whose tokens the pass reads, `inputs` the same, as a slice where they
    lie side by side. `first` is its first draft row, `first_inner` the first node's place among all
    with children. A head reads features (stree_core.models.cache) number `source_W1` besides. Rank
    c of scored row w becomes node `child_WC[w, c]`, -1 for none.
    """

    nodes: Tensor
    inputs: slice | Tensor
    source_W1: Tensor
    first: int
    first_inner: int
    child_WC: Tensor


@dataclass(frozen=True, slots=True)
class TreePlan:
    """All tables of one tree.

    `node_T1` numbers the nodes. `target_path_TL` and `draft_path_TL` hold, for each last accepted
    node, the rows to replay in the next step, which are depth + 1 in both; the latter is None where
    the draft takes no part in the step. `entry_L` (int32) numbers a path's entries. `inner_I` are
    the nodes with children, `child_IC` these in order; behind the last it repeats the first.
    """

    tree: Tree
    target_block: RowBlock
    draft_block: RowBlock | None
    levels: tuple[DraftLevel, ...]
    tables: TreeTables
    node_T1: Tensor
    target_path_TL: Tensor
    draft_path_TL: Tensor | None
    entry_L: Tensor
    inner_I: Tensor
    child_IC: Tensor


def make_plan(
    tree: Tree, target_conv_widths: frozenset[int], layout: DraftLayout, device: torch.device
) -> TreePlan:
    """Build the tables of `tree` on `device` for a draft with this layout."""
    rows = layout.rows(tree)
    capacity = tree.depth + 1

    def table(values: Sequence[Sequence[int]]) -> Tensor:
        padded = [[*row, *[0] * (capacity - len(row))] for row in values]
        return torch.tensor(padded, device=device)

    return TreePlan(
        tree,
        make_block(tree.parents, target_conv_widths, device),
        make_block(rows.parents, layout.conv_widths, device) if rows.parents else None,
        tuple(_levels(tree, rows.row_of, device)),
        TreeTables(
            torch.tensor((0, *tree.parents[1:]), device=device),
            torch.tensor(tree.depths, device=device),
        ),
        torch.arange(tree.num_tokens, device=device)[:, None],
        table(tree.node_paths),
        table(rows.paths) if rows.paths else None,
        torch.arange(capacity, dtype=torch.int32, device=device),
        *_children(tree, device),
    )


def _children(tree: Tree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the nodes with children and, for each, its children filled up with the first."""
    inner = [node for node in range(tree.num_tokens) if tree.children[node]]
    most = max((len(tree.children[node]) for node in inner), default=0)
    rows = [
        [*tree.children[n], *[tree.children[n][0]] * (most - len(tree.children[n]))] for n in inner
    ]
    return (
        torch.tensor(inner, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device).view(len(inner), most),
    )


def _levels(tree: Tree, row_of: dict[int, int], device: torch.device) -> list[DraftLevel]:
    levels = []
    num_inner = 0
    for depth in range(tree.depth):
        nodes = [node for node in tree.levels[depth] if tree.children[node]]
        children = [tree.children[node] for node in nodes]
        most = max(map(len, children))
        table = [[*own, *[-1] * (most - len(own))] for own in children]
        nodes_W = torch.tensor(nodes, device=device)
        sources = [row_of[tree.parents[node]] + 1 if depth else 0 for node in nodes]
        levels.append(
            DraftLevel(
                nodes=nodes_W,
                inputs=slice(nodes[0], nodes[-1] + 1) if _side_by_side(nodes) else nodes_W,
                source_W1=torch.tensor(sources, device=device)[:, None],
                first=0 if depth == 0 else row_of[nodes[0]],
                first_inner=num_inner,
                child_WC=torch.tensor(table, device=device),
            )
        )
        num_inner += len(nodes)
    return levels


def _side_by_side(nodes: Sequence[int]) -> bool:
    return nodes[-1] - nodes[0] == len(nodes) - 1


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of one tree.

    `parents` are those of the rows' block, `row_of` names the row of every node with children, and
    `paths` has for each node the rows that are replayed when it is the last accepted. Where a tree
    has no nodes, and the draft takes no part in its steps, all are empty.
    """

    parents: list[int]
    row_of: dict[int, int]
    paths: list[list[int]]


class DraftLayout(Protocol):
    """How a draft orders its rows."""

    @property
    def conv_widths(self) -> frozenset[int]:
        """Widths of the convolutions that its rows pass."""

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree; the root is in the first level's pass, whose row 0 is."""


@dataclass(frozen=True, slots=True)
class ModelRows:
    """Rows of a model: the token before the root, the root, every other node with children.

    The model runs the token before the root again in every step: its last accepted token may be a
    leaf, which it never saw, and running one row more costs a launch-bound pass nothing.
    """

    conv_widths: frozenset[int]

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree."""
        if not tree.num_nodes:
            return DraftRows([], {}, [])
        inner = _inner_nodes(tree)
        row_of = {node: 1 + i for i, node in enumerate(inner)}
        parents = [-1, 0, *(row_of[tree.parents[node]] for node in inner[1:])]
        paths = [[0, *(row_of[node] for node in path[:-1])] for path in tree.node_paths]
        return DraftRows(parents, row_of, paths)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of an MTP head: a row is a token and what came before it, the root's is the first.

    What an accepted path leaves behind is filed anew, in order, so it is replayed from row 0 on:
    the last row is there for an accepted leaf. Steps without speculation file the root's row.
    """

    conv_widths: frozenset[int] = frozenset()

    def rows(self, tree: Tree) -> DraftRows:
        """Return the rows for a tree."""
        inner = _inner_nodes(tree) or [0]
        row_of = {node: i for i, node in enumerate(inner)}
        parents = [-1, *(row_of[tree.parents[node]] for node in inner[1:]), 0]
        return DraftRows(parents, row_of, [list(range(depth + 1)) for depth in tree.depths])


def _inner_nodes(tree: Tree) -> list[int]:
    return [node for node in range(tree.num_tokens) if tree.children[node]]
