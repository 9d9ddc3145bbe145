"""A token by a row's distribution, and multi-step speculative sampling, as Triton kernels.

A program owns a row of scores and passes over it a few times: it stays in the L2 cache. After k
rejections p and q of a token are made anew from its scores and k pairs of totals, so no
distribution is ever stored.

Shape letters: V vocabulary, C children.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.launch.pdl import wait_for_previous
from stree_kernels.sampling.top_tokens import score_key
from stree_kernels.sampling.top_tokens_ref import HIGHEST

_HIGHEST = tl.constexpr(HIGHEST)
_ID_MASK = tl.constexpr(0xFFFFFFFF)
_LOWEST_KEY = tl.constexpr(-(2**63))
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def sample_tokens_kernel(
    # pointers
    scores_ptr, temperature_ptr, uniform_ptr, out_ptr,
    # sizes
    batch, num_scores,
    # meta
    BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write a token of one row; arguments as in `sampling.sample_tokens`."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    scores_ptr += row * num_scores
    temperature = tl.load(temperature_ptr + row % batch)
    best, largest = _likeliest(scores_ptr, num_scores, BLOCK_V)
    token = best
    # A score that is not finite is returned, so that it shows.
    if (temperature > 0) & (tl.abs(largest) < float("inf")):
        scale = 1.0 / temperature
        total = _total(scores_ptr, num_scores, largest, scale, BLOCK_V)
        distribution = (scores_ptr, largest, total, scale)
        point = tl.load(uniform_ptr + row)
        before, found, last = point * 0.0, best * 0 + _NOWHERE, best
        for start in range(0, num_scores, BLOCK_V):
            here = start + tl.arange(0, BLOCK_V)
            p = _probabilities(distribution, here, here < num_scores)
            before, found, last = _look(p, here, point, before, found, last)
        token = tl.where(found == _NOWHERE, last, found)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def try_children_kernel(
    # pointers
    p_ptr, q_ptr, temperature_ptr, inner_ptr, child_ptr, tokens_ptr, tries_ptr, uniform_ptr,
    chosen_ptr,
    # sizes
    batch, num_scores,
    # meta
    NUM_CHILDREN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Try one node's children in one slot; arguments as in `sampling.try_children`."""
    row = tl.program_id(0).to(tl.int64)
    slot = row % batch
    node = tl.load(inner_ptr + row // batch)
    c = tl.arange(0, BLOCK_C)
    child_C = tl.load(child_ptr + row // batch * NUM_CHILDREN + c, mask=c < NUM_CHILDREN, other=0)
    wait_for_previous(PDL)
    temperature = tl.load(temperature_ptr + slot)
    p_ptr += (node * batch + slot) * num_scores
    q_ptr += row * num_scores
    best, largest_p = _likeliest(p_ptr, num_scores, BLOCK_V)
    # A greedy slot, or one that breaks down, keeps its likeliest token.
    if (temperature > 0) & (tl.abs(largest_p) < float("inf")):
        largest_q = _likeliest(q_ptr, num_scores, BLOCK_V)[1]
        scale = 1.0 / temperature
        p_row = (p_ptr, largest_p, _total(p_ptr, num_scores, largest_p, scale, BLOCK_V), scale)
        q_row = (q_ptr, largest_q, _total(q_ptr, num_scores, largest_q, scale, BLOCK_V), scale)
        child_C = tl.load(tokens_ptr + child_C * batch + slot, mask=c < NUM_CHILDREN, other=0)
        # Of every rejection: what was left of p, and of q without the child; -1 before it.
        left_p_C = tl.full((BLOCK_C,), -1.0, tl.float32)
        left_q_C = tl.full((BLOCK_C,), -1.0, tl.float32)
        taken = best * 0 - 1
        for rank in range(NUM_CHILDREN):
            child = _entry(child_C, c, rank).to(tl.int32)
            tries = (c, child_C, left_p_C, left_q_C, rank)
            p, q = _left_of(_probability(p_row, child), _probability(q_row, child), child, tries)
            tried = (taken < 0) & (q > 0)
            takes = tried & (tl.load(tries_ptr + row * NUM_CHILDREN + rank) * q < p)
            taken = tl.where(takes, child, taken)
            if tried & (takes == 0):
                left_p, left_q = _reject(p_row, q_row, tries, child, num_scores, BLOCK_V)
                left_p_C = tl.where(c == rank, left_p, left_p_C)
                left_q_C = tl.where(c == rank, left_q, left_q_C)
        if taken < 0:
            tries = (c, child_C, left_p_C, left_q_C, NUM_CHILDREN)
            point = tl.load(uniform_ptr + node * batch + slot)
            taken = _draw_rest(p_row, q_row, tries, point, best, num_scores, BLOCK_V)
        tl.store(chosen_ptr + node * batch + slot, taken.to(tl.int64))


@triton.jit
def _reject(p_row, q_row, tries, child, num_scores, BLOCK_V: tl.constexpr):
    """Return the sum of what a rejection leaves of p, and that of q without the child."""
    left_p_V = tl.full((BLOCK_V,), 0.0, tl.float32)
    left_q_V = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, num_scores, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)
        inside = token < num_scores
        p, q = _probabilities(p_row, token, inside), _probabilities(q_row, token, inside)
        p, q = _left_of(p, q, token, tries)
        left_p_V += tl.maximum(p - q, 0.0)
        left_q_V += tl.where(token == child, 0.0, q)
    return tl.sum(left_p_V, axis=0), tl.sum(left_q_V, axis=0)


@triton.jit
def _draw_rest(p_row, q_row, tries, point, best, num_scores, BLOCK_V: tl.constexpr):
    """Return the token that `point` in [0, 1) points to in what all rejections leave of p."""
    before, found, last = point * 0.0, best * 0 + _NOWHERE, best
    for start in range(0, num_scores, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)
        inside = token < num_scores
        p, q = _probabilities(p_row, token, inside), _probabilities(q_row, token, inside)
        p = _left_of(p, q, token, tries)[0]
        before, found, last = _look(p, token, point, before, found, last)
    return tl.where(found == _NOWHERE, last, found)


@triton.jit
def _left_of(p, q, token, tries):
    """Return what the rejections so far leave of p and q at some tokens."""
    c, child_C, left_p_C, left_q_C, num_tried = tries
    for rank in range(num_tried):
        left_p, left_q = _entry(left_p_C, c, rank), _entry(left_q_C, c, rank)
        # Where rounding leaves nothing of p it stays, and an empty q is not divided.
        less_p = tl.maximum(p - q, 0.0) / tl.where(left_p > 0, left_p, 1.0)
        less_q = tl.where(token == _entry(child_C, c, rank), 0.0, q)
        less_q /= tl.where(left_q > 0, left_q, 1.0)
        p = tl.where(left_p > 0, less_p, p)
        q = tl.where(left_p >= 0, less_q, q)
    return p, q


@triton.jit
def _probability(distribution, token):
    scores_ptr, largest, total, scale = distribution
    return tl.exp((tl.load(scores_ptr + token) - largest) * scale) / total


@triton.jit
def _probabilities(distribution, token, inside):
    scores_ptr, largest, total, scale = distribution
    score = tl.load(scores_ptr + token, mask=inside, other=float("-inf"))
    return tl.exp((score - largest) * scale) / total


@triton.jit
def _entry(value_C, c, rank):
    return tl.sum(tl.where(c == rank, value_C, 0), axis=0)


@triton.jit
def _likeliest(scores_ptr, num_scores, BLOCK_V: tl.constexpr):
    """Return a row's likeliest token and its score, NaN before all others."""
    id_V = tl.arange(0, BLOCK_V)
    largest = tl.max(tl.full((BLOCK_V,), _LOWEST_KEY, tl.int64), axis=0)
    for start in range(0, num_scores, BLOCK_V):
        token = start + id_V
        score = tl.load(scores_ptr + token, mask=token < num_scores, other=0.0)
        key = tl.where(token < num_scores, score_key(score, token), _LOWEST_KEY)
        largest = tl.maximum(largest, tl.max(key, axis=0))
    bits = (largest >> 32).to(tl.int32)
    score = tl.where(bits >= 0, bits, bits ^ _HIGHEST).to(tl.float32, bitcast=True)
    return ((largest & _ID_MASK) ^ _ID_MASK).to(tl.int32), score


@triton.jit
def _total(scores_ptr, num_scores, largest, scale, BLOCK_V: tl.constexpr):
    """Return the sum of a row's unnormalised distribution."""
    total_V = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, num_scores, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)
        total_V += _probabilities((scores_ptr, largest, 1.0, scale), token, token < num_scores)
    return tl.sum(total_V, axis=0)


@triton.jit
def _look(weight, token, point, before, found, last):
    """Look for the first token whose cumulated weight is above `point`, in one block.

    Also returned are the weight up to the block's end, and the last token that has any.
    """
    above = (before + tl.cumsum(weight, axis=0) > point) & (weight > 0)
    found = tl.minimum(found, tl.min(tl.where(above, token, _NOWHERE), axis=0))
    last = tl.maximum(last, tl.max(tl.where(weight > 0, token, -1), axis=0))
    return before + tl.sum(weight, axis=0), found, last
