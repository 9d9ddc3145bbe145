"""What the kernels of gated delta layers share: products, replay, and the triangular system.

A source is a pair (pointer at this sequence and head, row stride), as in `ssm.device_functions`.
Rows lie in columns, so the system is u (I + W) = r with W [J, T] strictly upper: rows J before
rows T.

Shape letters: T rows, J their ancestors, L accepted rows that are not in the state, P value head
dim, N key head dim.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.ssm.device_functions import (
    dot_wide,
    halves,
    keep_rows,
    load_columns,
    load_past,
    load_rows,
)


@triton.jit
def dot_parts(left, right, total, EXACT: tl.constexpr):
    """total + left @ right, both fp32: as two bf16 parts each, all but the product of low parts.

    Among alike keys u and its weights cancel, so one part of either would not do.
    """
    if EXACT:
        total = tl.dot(left, right, total, input_precision="ieee")
    else:
        left_high, left_low = halves(left)
        right_high, right_low = halves(right)
        total = tl.dot(left_high, right_high, total)
        total = tl.dot(left_high, right_low, tl.dot(left_low, right_high, total))
    return total


@triton.jit
def split_state(state, EXACT: tl.constexpr):
    """The state as `dot_state` takes it: two bf16 parts, or beside fp32 rows as it is."""
    parts = (state, state)
    if not EXACT:
        parts = halves(state)
    return parts


@triton.jit
def dot_state(parts, right):
    """state @ right, of both parts; fp16 on the right is taken apart as well."""
    if right.dtype == tl.float32:
        total = tl.dot(parts[0], right, input_precision="ieee")
    elif right.dtype == tl.float16:
        right_high, right_low = halves(right.to(tl.float32))
        total = tl.dot(parts[1], right_high, tl.dot(parts[0], right_high))
        total = tl.dot(parts[0], right_low, total)
    else:
        total = tl.dot(parts[1], right, tl.dot(parts[0], right))
    return total


@triton.jit
def load_keys(k, q, first, num_rows, dims_N, BLOCK_T: tl.constexpr, PAIR: tl.constexpr):
    """k of the rows from `first` on and q, which begins there, as columns; k as rows too.

    With PAIR the columns are one block [N, 2 T], given twice: one product serves both.
    """
    row = tl.arange(0, BLOCK_T)
    within = first + row < num_rows
    if PAIR:
        column = tl.arange(0, 2 * BLOCK_T)
        of_row = column % BLOCK_T
        k_ptrs = k[0] + (first + of_row)[None, :] * k[1] + dims_N[:, None]
        q_ptrs = q[0] + of_row[None, :] * q[1] + dims_N[:, None]
        ptrs = tl.where((column < BLOCK_T)[None, :], k_ptrs, q_ptrs)
        k_NT = tl.load(ptrs, mask=(first + of_row < num_rows)[None, :], other=0.0)
        q_NT = k_NT
        k_JN = load_rows(k, first + row, within, dims_N)
    else:
        k_NT = load_columns(k, first + row, within, dims_N)
        q_NT = load_columns(q, row, within, dims_N)
        k_JN = tl.trans(k_NT)
    return k_NT, q_NT, k_JN


@triton.jit
def dot_keys(rows, keys, PAIR: tl.constexpr):
    """rows @ k and rows @ q of what `load_keys` has loaded."""
    if PAIR:
        of_k, of_q = _split_pair(tl.dot(rows, keys[0], input_precision="ieee"))
    else:
        of_k = tl.dot(rows, keys[0], input_precision="ieee")
        of_q = tl.dot(rows, keys[1], input_precision="ieee")
    return of_k, of_q


@triton.jit
def dot_state_keys(parts, keys, PAIR: tl.constexpr):
    """state @ k and state @ q [P, T], with both parts of the state."""
    if PAIR:
        of_k, of_q = _split_pair(dot_state(parts, keys[0]))
    else:
        of_k = dot_state(parts, keys[0])
        of_q = dot_state(parts, keys[1])
    return of_k, of_q


@triton.jit
def _split_pair(product):
    """The two halves of a product's columns."""
    rows: tl.constexpr = product.shape[0]
    columns: tl.constexpr = product.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(product, [rows, 2, columns]), [0, 2, 1]))


@triton.jit
def pair_decays(path_J, path_T, mask_JT):
    """exp(c_T - c_J), 0 outside the mask, where the exponent may be positive and overflow."""
    return tl.exp(tl.where(mask_JT, path_T[None, :] - path_J[:, None], float("-inf")))


@triton.jit
def advance_delta(
    state, past, counts, total, dims_P, dims_N, owns, saves, BLOCK_L: tl.constexpr
):  # fmt: skip
    """The state tile [P, N] after the first `total` accepted rows, BLOCK_L at a time.

    With `saves` the path's rows are stored behind the buffered ones.
    """
    for begin in range(0, tl.maximum(total, 1), BLOCK_L):
        position = begin + tl.arange(0, BLOCK_L)
        u_PL, g_L, k_LN, in_path = load_past(position, past, counts, dims_P, dims_N)
        keep_rows(position, past, u_PL, g_L, k_LN, in_path & saves, dims_P, dims_N, owns)
        u_PL, after_L, decay = weigh_delta(position, total, u_PL, g_L)
        state = dot_wide(u_PL * tl.exp(after_L)[None, :], k_LN, state * tl.exp(decay))
    return state


@triton.jit
def advance_ahead(
    state_ptrs, past, counts, total, dims_P, dims_N, owns, saves, BLOCK_L: tl.constexpr
):  # fmt: skip
    """`advance_delta`, with rows loaded before the state and a block ahead of their use."""
    position = tl.arange(0, BLOCK_L)
    u_PL, g_L, k_LN, in_path = load_past(position, past, counts, dims_P, dims_N)
    state = tl.load(state_ptrs, eviction_policy="evict_first").to(tl.float32)
    for begin in range(0, tl.maximum(total, 1), BLOCK_L):
        here = begin + position
        keep_rows(here, past, u_PL, g_L, k_LN, in_path & saves, dims_P, dims_N, owns)
        u_PL, after_L, decay = weigh_delta(here, total, u_PL, g_L)
        state = dot_wide(u_PL * tl.exp(after_L)[None, :], k_LN, state * tl.exp(decay))
        u_PL, g_L, k_LN, in_path = load_past(here + BLOCK_L, past, counts, dims_P, dims_N)
    return state


@triton.jit
def weigh_delta(position, total, u_PL, g_L):
    """u, 0 past the last of `total` rows, the log decay after each row, and all decay."""
    u_PL = tl.where((position < total)[None, :], u_PL, 0.0)
    g_L = tl.where(position < total, g_L, 0.0)
    # A suffix sum, not a difference of prefix sums, which loses digits on long paths.
    later = position[:, None] > position[None, :]
    return u_PL, tl.sum(tl.where(later, g_L[:, None], 0.0), axis=0), tl.sum(g_L, axis=0)


@triton.jit
def count_rounds(mask_JT, rows):
    """Rounds of substitution until all rows of a tile are final: its longest path."""
    strict_JT = mask_JT & (rows[:, None] < rows[None, :])
    return tl.max(tl.sum(strict_JT.to(tl.int32), axis=0), axis=0)


@triton.jit
def substitute(right, weight, rounds, EXACT: tl.constexpr):
    """u of u (I + W) = r after `rounds` of u <- r - u W, each of which makes a level final.

    Never by powers of W or by doubling: they reach 1e16 among alike keys.
    """
    u = right
    if EXACT:
        for _ in range(rounds):
            u = right - tl.dot(u, weight, input_precision="ieee")
    else:
        # Split once, not in every round.
        weight_high, weight_low = halves(weight)
        for _ in range(rounds):
            high, low = halves(u)
            product = tl.dot(low, weight_high, tl.dot(high, weight_high))
            u = right - tl.dot(high, weight_low, product)
    return u


@triton.jit
def _invert_levels(weight, unit, rounds):
    """(I + W)^-1 by levels in one bf16 part, then one step of Newton, which squares their error.

    The step starts from the inverse itself, so there is nothing large to cancel.
    """
    weight_high = weight.to(tl.bfloat16)
    inverse = unit - weight
    for _ in range(1, rounds):
        inverse = unit - tl.dot(inverse.to(tl.bfloat16), weight_high)
    rest = unit - dot_parts(inverse, weight, inverse, False)
    return inverse + tl.dot(rest.to(tl.bfloat16), inverse.to(tl.bfloat16))


@triton.jit
def _invert_blocks(weight, unit, rows, BLOCK_T: tl.constexpr, EXACT: tl.constexpr):
    """(I + W)^-1 by blocks of 4 rows, of 16, and all.

    The inverse X of the diagonal blocks is known; with W' the rest of W within larger blocks, that
    of these is Y <- X - Y W' X, substituted block by block: 3 rounds for 4 blocks.
    """
    inner = tl.where(rows[:, None] // 4 == rows[None, :] // 4, weight, 0.0)
    inverse = substitute(unit, inner, 3, EXACT)
    same_JT = rows[:, None] // 16 == rows[None, :] // 16
    between = tl.where(same_JT & (rows[:, None] // 4 != rows[None, :] // 4), weight, 0.0)
    inverse = substitute(inverse, dot_parts(between, inverse, None, EXACT), 3, EXACT)
    if BLOCK_T > 16:
        between = tl.where(same_JT, 0.0, weight)
        scaled = dot_parts(between, inverse, None, EXACT)
        inverse = substitute(inverse, scaled, BLOCK_T // 16 - 1, EXACT)
    return inverse


@triton.jit
def invert(weight, rows, rounds, BLOCK_T: tl.constexpr, EXACT: tl.constexpr):
    """(I + W)^-1 [J, T]: by levels, or for long paths, where errors grow, by blocks."""
    unit = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    if EXACT:
        inverse = _invert_blocks(weight, unit, rows, BLOCK_T, True)
    elif rounds <= 12:
        inverse = _invert_levels(weight, unit, rounds)
    else:
        inverse = _invert_blocks(weight, unit, rows, BLOCK_T, False)
    return inverse


@triton.jit
def gate_and_store(o_PT, out, z, sums, row, scored, dims_P):
    """Store o; with z its sums of squares, and o times silu(z)."""
    if z is not None:
        tl.store(sums[0] + row * sums[1], tl.sum(o_PT * o_PT, axis=0), mask=scored)
        z_PT = tl.load(
            z[0] + row[None, :] * z[1] + dims_P[:, None], mask=scored[None, :], other=0.0
        ).to(tl.float32)
        o_PT *= z_PT / (1.0 + tl.exp(-z_PT))
    out_ptrs = out[0] + row[None, :] * out[1] + dims_P[:, None]
    tl.store(out_ptrs, o_PT, mask=scored[None, :])
