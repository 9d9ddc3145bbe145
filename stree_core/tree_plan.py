"""A tree's tables on the device: what draft, verify, accept and commit look up.

Rows of the target's block are the tree's nodes. Rows of the draft's block are the predecessor (the
token before the root), the root, then every other node that has children, in node order. The draft
runs the predecessor again in every step: its last accepted token may be a leaf, which it never saw,
and running one row more costs a launch-bound pass nothing.

Shape letters: T tree tokens, L path capacity (tree depth + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.row_block import RowBlock, make_block
from stree_core.tree import Tree
from stree_kernels.commit_path_ref import TreeTables

PREDECESSOR_ROW = 0
ROOT_ROW = 1


@dataclass(frozen=True, slots=True)
class DraftLevel:
    """One draft pass: which rows it runs, and which nodes their likeliest tokens become.

    `nodes` are the tree nodes whose tokens the pass reads (the root level also reads the
    predecessor), `inputs` the same, as a slice where they lie side by side. `first` is its first
    draft row, `first_inner` the first node's place among all with children. Rank c of scored row w
    becomes node `child_WC[w, c]`, -1 for none.
    """

    nodes: Tensor
    inputs: slice | Tensor
    first: int
    first_inner: int
    child_WC: Tensor


@dataclass(frozen=True, slots=True)
class TreePlan:
    """All tables of one tree.

    `node_T1` numbers the nodes. `target_path_TL` and `draft_path_TL` hold, for each last accepted
    node, the rows to replay in the next step, which are depth + 1 in both. `inner_I` are the nodes
    with children, `child_IC` these in order; behind the last it repeats the first.
    """

    tree: Tree
    target_block: RowBlock
    draft_block: RowBlock | None
    levels: tuple[DraftLevel, ...]
    tables: TreeTables
    node_T1: Tensor
    target_path_TL: Tensor
    draft_path_TL: Tensor
    inner_I: Tensor
    child_IC: Tensor


def make_plan(
    tree: Tree,
    target_conv_widths: frozenset[int],
    draft_conv_widths: frozenset[int],
    device: torch.device,
) -> TreePlan:
    """Build the tables of `tree` on `device`."""
    inner = [node for node in range(1, tree.num_tokens) if tree.children[node]]
    draft_row = {0: ROOT_ROW} | {node: ROOT_ROW + 1 + i for i, node in enumerate(inner)}
    draft_parents = [-1, PREDECESSOR_ROW] + [draft_row[tree.parents[node]] for node in inner]
    speculates = tree.num_nodes > 0

    def table(values: Sequence[Sequence[int]]) -> Tensor:
        capacity = tree.depth + 1
        padded = [[*row, *[0] * (capacity - len(row))] for row in values]
        return torch.tensor(padded, device=device)

    draft_paths = [
        [PREDECESSOR_ROW, *(draft_row[node] for node in path[:-1])] if speculates else []
        for path in tree.node_paths
    ]
    return TreePlan(
        tree,
        make_block(tree.parents, target_conv_widths, device),
        make_block(draft_parents, draft_conv_widths, device) if speculates else None,
        tuple(_levels(tree, draft_row, device)),
        TreeTables(
            torch.tensor((0, *tree.parents[1:]), device=device),
            torch.tensor(tree.depths, device=device),
        ),
        torch.arange(tree.num_tokens, device=device)[:, None],
        table(tree.node_paths),
        table(draft_paths),
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


def _levels(tree: Tree, draft_row: dict[int, int], device: torch.device) -> list[DraftLevel]:
    levels = []
    num_inner = 0
    for depth in range(tree.depth):
        nodes = [node for node in tree.levels[depth] if tree.children[node]]
        children = [tree.children[node] for node in nodes]
        most = max(map(len, children))
        table = [[*own, *[-1] * (most - len(own))] for own in children]
        nodes_W = torch.tensor(nodes, device=device)
        levels.append(
            DraftLevel(
                nodes=nodes_W,
                inputs=slice(nodes[0], nodes[-1] + 1) if _side_by_side(nodes) else nodes_W,
                first=PREDECESSOR_ROW if depth == 0 else draft_row[nodes[0]],
                first_inner=num_inner,
                child_WC=torch.tensor(table, device=device),
            )
        )
        num_inner += len(nodes)
    return levels


def _side_by_side(nodes: Sequence[int]) -> bool:
    return nodes[-1] - nodes[0] == len(nodes) - 1
