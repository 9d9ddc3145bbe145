"""End a step: walk the accepted path, emit its tokens, make it pending, in one Triton kernel.

The work is that of `commit_path_ref`. One program of one warp owns a slot: its tables are small,
and what counts is that nothing waits for the host or for another launch.

Shape letters: T tree tokens, B slots, V vocabulary, L tree depth + 1, R rows of a token buffer, X
rows of a result.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import MAX_BUFFERED, require_dtypes, require_packed
from stree_kernels.sampling.commit_path_ref import FIRST_TOKEN, PathMemory, TreeTables

_FIRST_TOKEN = tl.constexpr(FIRST_TOKEN)
_MAX_BUFFERED = tl.constexpr(MAX_BUFFERED)


@triton.jit
def _commit_path_kernel(
    # pointers
    tokens_ptr, chosen_ptr, logits_ptr, parents_ptr, depths_ptr, active_ptr, result_ptr, path_ptr,
    pending_ptrs, draft_path_ptr, draft_pending_ptrs,
    # sizes
    batch, num_tokens, num_entries, num_scores,
    # strides
    stride_pending_b, stride_draft_pending_b,
    # meta
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, HAS_DRAFT: tl.constexpr, ADVANCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    parent = tl.load(parents_ptr + t, mask=t < num_tokens, other=0)
    wait_for_previous(PDL)
    token = tl.load(tokens_ptr + (t + 1) * batch + slot, mask=t < num_tokens, other=0)
    chosen = tl.load(chosen_ptr + t * batch + slot, mask=t < num_tokens, other=0)
    wanted = tl.load(chosen_ptr + parent * batch + slot, mask=t < num_tokens, other=0)
    row = (t * batch + slot) * num_scores
    score = tl.load(logits_ptr + row + chosen, mask=t < num_tokens, other=0.0)
    healthy = tl.min((tl.abs(score) < float("inf")).to(tl.int64), axis=0)
    active = tl.load(active_ptr + slot)

    matches = (t > 0) & (t < num_tokens) & (token == wanted)
    last = tl.max(tl.zeros_like(t), axis=0)
    for _ in range(num_entries - 1):
        last = tl.maximum(last, tl.max(tl.where(matches & (parent == last), t, 0), axis=0))

    end = last if ADVANCE else last * 0
    accepted = tl.load(depths_ptr + end)
    length = (accepted + 1) * active
    entry = tl.arange(0, BLOCK_L)
    node = tl.load(path_ptr + end * num_entries + entry, mask=entry < num_entries, other=0)
    emitted = tl.load(chosen_ptr + node * batch + slot, mask=entry < num_entries, other=0)
    root = tl.load(tokens_ptr + batch + slot)
    newest = tl.sum(tl.where(entry == accepted, emitted, 0), axis=0)
    before = tl.sum(tl.where(entry == accepted - 1, emitted, 0), axis=0)
    before = tl.where(accepted == 0, root, before)
    # The root is overwritten below.
    tl.debug_barrier()
    tl.store(tokens_ptr + slot, before)
    tl.store(tokens_ptr + batch + slot, newest)
    tl.store(result_ptr + slot, length)
    tl.store(result_ptr + batch + slot, last)
    tl.store(result_ptr + 2 * batch + slot, healthy)
    tl.store(result_ptr + (_FIRST_TOKEN + entry) * batch + slot, emitted, mask=entry < num_entries)
    _make_pending(path_ptr, pending_ptrs, stride_pending_b, slot, end, num_entries, length, BLOCK_L)
    if HAS_DRAFT:
        _make_pending(
            draft_path_ptr, draft_pending_ptrs, stride_draft_pending_b, slot, end, num_entries,
            length, BLOCK_L,
        )  # fmt: skip


@triton.jit
def _make_pending(
    path_ptr, pending_ptrs, stride_pending_b, slot, end, num_entries, length,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Tell a model to replay the path to node `end`; pointers are those of a PathMemory."""
    rows_ptr, length_ptr, num_buffered_ptr, committed_ptr = pending_ptrs
    entry = tl.arange(0, BLOCK_L)
    row = tl.load(path_ptr + end * num_entries + entry, mask=entry < num_entries, other=0)
    total = tl.load(num_buffered_ptr + slot) + tl.load(length_ptr + slot)
    committed = tl.load(committed_ptr + slot)
    tl.debug_barrier()
    tl.store(num_buffered_ptr + slot, tl.where(total <= _MAX_BUFFERED, total, 0))
    tl.store(length_ptr + slot, length.to(tl.int32))
    tl.store(committed_ptr + slot, committed + length.to(tl.int32))
    tl.store(rows_ptr + slot * stride_pending_b + entry, row.to(tl.int32), mask=entry < num_entries)


def commit_path(
    tokens_RB: Tensor, chosen_TB: Tensor, logits_TBV: Tensor, tree: TreeTables, active_B: Tensor,
    result_XB: Tensor, memories: Sequence[PathMemory], *, advance: bool = True,
) -> None:  # fmt: skip
    """Accept a path of every slot and leave everything ready for the next step.

    The contract is that of `commit_path_ref.commit_path`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    _check(tokens_RB, chosen_TB, logits_TBV, tree, active_B, result_XB, memories)
    num_tokens, batch = chosen_TB.shape
    target, draft = memories[0], memories[-1]
    num_entries = target.path_TL.shape[1]
    _commit_path_kernel[(batch,)](
        tokens_RB, chosen_TB, logits_TBV, *tree, active_B, result_XB, target.path_TL,
        (*target.pending, target.committed_B), draft.path_TL, (*draft.pending, draft.committed_B),
        batch, num_tokens, num_entries, logits_TBV.shape[-1],
        target.pending.path_BL.stride(0), draft.pending.path_BL.stride(0),
        BLOCK_T=triton.next_power_of_2(num_tokens), BLOCK_L=triton.next_power_of_2(num_entries),
        HAS_DRAFT=len(memories) > 1, ADVANCE=advance, num_warps=1,
        **launch_options(chosen_TB.device),
    )  # fmt: skip


def _check(
    tokens_RB: Tensor, chosen_TB: Tensor, logits_TBV: Tensor, tree: TreeTables, active_B: Tensor,
    result_XB: Tensor, memories: Sequence[PathMemory],
) -> None:  # fmt: skip
    """Raise ValueError unless all buffers are of one step, as the kernel relies on."""
    paths = [memory.path_TL for memory in memories]
    counts = [t for memory in memories for t in (*memory.pending, memory.committed_B)]
    buffers = (tokens_RB, chosen_TB, result_XB, *tree, *paths)
    require_dtypes("tokens, tables and results", buffers, (torch.int64,))
    require_dtypes("logits", (logits_TBV,), (torch.float32,))
    require_dtypes("lengths and active slots", (active_B, *counts), (torch.int32,))
    require_packed("tokens, results or paths", (tokens_RB, chosen_TB, result_XB, *paths), 2)
    require_packed("the logits", (logits_TBV,), 3)
    require_packed("a table or a count", (*tree, active_B, *counts), 1)
    num_tokens, batch = chosen_TB.shape
    num_entries = paths[0].shape[1]
    capacity = min(memory.pending.path_BL.shape[1] for memory in memories)
    fits = (
        len(tokens_RB) > num_tokens
        and {t.shape[1] for t in (tokens_RB, result_XB)} == {batch}
        and logits_TBV.shape[:2] == chosen_TB.shape
        and {path.shape for path in paths} == {(num_tokens, num_entries)}
        and len(result_XB) >= FIRST_TOKEN + num_entries
        and num_entries <= capacity
    )
    if not fits:
        raise ValueError(
            f"a step of {num_tokens} tokens, {batch} slots and paths of {num_entries} takes "
            f"buffers of these sizes, got tokens {tuple(tokens_RB.shape)}, logits "
            f"{tuple(logits_TBV.shape)}, a result {tuple(result_XB.shape)} and pending paths of "
            f"{capacity}; pass the buffers of one step"
        )
