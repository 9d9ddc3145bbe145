"""A tree's tables on the device: what draft, verify, accept and commit look up.

Rows of the target's block are the tree's nodes; those of the draft's are in the order of its layout
(stree_core.draft_rows).

Shape letters: T tree tokens, L path capacity (tree depth + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.draft_rows import DraftLayout
from stree_core.row_block import RowBlock, make_block
from stree_core.tree import Tree
from stree_kernels.commit_path_ref import TreeTables


@dataclass(frozen=True, slots=True)
class DraftLevel:
    """One draft pass: which rows it runs, and which nodes their likeliest tokens become.

    `nodes` are the tree nodes whose tokens the pass reads, `inputs` the same, as a slice where they
    lie side by side. `first` is its first draft row, `first_inner` the first node's place among all
    with children. A head reads features (stree_core.cache) number `source_W1` besides. Rank c of
    scored row w becomes node `child_WC[w, c]`, -1 for none.
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
