"""End a step: walk the accepted path, emit its tokens, make it pending, in plain torch.

It is the CPU's path and what the Triton kernel is compared with.

Shape letters: T tree tokens, B slots, V vocabulary, L tree depth + 1, R rows of a token buffer, X
rows of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stree_kernels.launch.rows import Pending, advance_pending

COUNT, LAST_NODE, HEALTHY, FIRST_TOKEN = range(4)
"""Rows of a result: see `commit_path`."""


class TreeTables(NamedTuple):
    """The parent of every node, 0 for the root, and its depth (int64)."""

    parents_T: Tensor
    depths_T: Tensor


class PathMemory(NamedTuple):
    """Where a model is told what to replay.

    `path_TL` (int64) has for each last accepted node the rows of the model's block to replay, any
    row behind them. `committed_B` (int32) counts tokens, those of `pending` included.
    """

    path_TL: Tensor
    pending: Pending
    committed_B: Tensor


def commit_path(
    tokens_RB: Tensor,
    chosen_TB: Tensor,
    logits_TBV: Tensor,
    tree: TreeTables,
    active_B: Tensor,
    result_XB: Tensor,
    memories: Sequence[PathMemory],
    *,
    advance: bool = True,
) -> None:
    """Accept a path of every slot and leave everything ready for the next step.

    `tokens_RB` holds the predecessor, then the tree's tokens. A node is accepted when its token is
    `chosen_TB` at its parent and its parent is accepted; siblings differ, so the accepted nodes
    form one path. `memories` are the target's, whose rows are the nodes, and where there is one the
    draft's. An inactive slot (`active_B` is int32, 1 or 0) computes but does not advance.

    Afterwards `tokens_RB` begins with the last two tokens; `result_XB` holds the number of emitted
    tokens, the last accepted node, whether the logits of all chosen tokens were finite (1 or 0),
    and from FIRST_TOKEN on the tokens: those chosen along the path. Without `advance` the result
    names the last accepted node, but the root alone is committed, with the token after it.
    """
    num_tokens, device = len(chosen_TB), chosen_TB.device
    matches_TB = tokens_RB[1 : num_tokens + 1] == chosen_TB[tree.parents_T]
    node_T = torch.arange(num_tokens, device=device)
    last_B = torch.zeros_like(active_B, dtype=torch.int64)
    for _ in range(memories[0].path_TL.shape[1] - 1):
        child_TB = matches_TB & (tree.parents_T[:, None] == last_B) & (node_T > 0)[:, None]
        last_B = torch.maximum(last_B, (child_TB * node_T[:, None]).amax(0))
    result_XB[LAST_NODE] = last_B
    own_TB = logits_TBV.gather(-1, chosen_TB[..., None])[..., 0]
    result_XB[HEALTHY] = own_TB.isfinite().all(0)

    end_B = last_B if advance else torch.zeros_like(last_B)
    accepted_B = tree.depths_T[end_B]
    length_B = (accepted_B + 1) * active_B
    emitted_LB = chosen_TB.gather(0, memories[0].path_TL[end_B].t())
    result_XB[COUNT] = length_B
    result_XB[FIRST_TOKEN:][: len(emitted_LB)] = emitted_LB
    history_LB = torch.cat((tokens_RB[1:2], emitted_LB))
    tokens_RB[:2] = history_LB.gather(0, torch.stack((accepted_B, accepted_B + 1)))
    for memory in memories:
        advance_pending(memory.pending, memory.path_TL[end_B], length_B)
        memory.committed_B.add_(length_B)
