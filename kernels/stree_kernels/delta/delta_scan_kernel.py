"""The gated delta scan of a token tree: one Triton kernel, or two where the system is large.

One program owns a tile of one head's state: it loads the tile once, advances it in registers by the
accepted rows that are not in it, solves for u of all rows and scores them against both. The state
is stored only when too many accepted rows have gathered. Rows lie in columns ([P, rows]): the state
is then the first operand of every product it enters. All that the previous kernels cannot have
written comes before the wait for them. With many rows or many sequences the programs of one head
would repeat the same products of k and q and substitute level by level for each tile of the state;
`delta_solve_kernel` then leaves the inverse of the system and the weights of u, once for each head.

Shape letters: T rows scored by this pass, J their ancestors, P value head dim, N key head dim.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.delta.device_functions import (
    advance_ahead,
    advance_delta,
    count_rounds,
    dot_keys,
    dot_parts,
    dot_state_keys,
    gate_and_store,
    invert,
    load_keys,
    pair_decays,
    split_state,
    substitute,
    weigh_delta,
)
from stree_kernels.launch.pdl import release_next, wait_for_previous
from stree_kernels.ssm.device_functions import (
    BUFFERED,
    halves,
    keep_rows,
    load_columns,
    load_past,
    load_rows,
    load_vector,
)
from stree_kernels.ssm.tree_scan_kernel import load_mask


@triton.jit
def _load_mask(mask, rows_J, rows_T, num_rows, EARLIER: tl.constexpr):
    """M transposed [J, T]; a tile that starts at row 0 lies within the mask's columns."""
    if EARLIER:
        valid = (rows_J < num_rows)[:, None] & (rows_T < num_rows)[None, :]
        offsets = rows_T[None, :] * mask[1] + rows_J[:, None]
        is_above = tl.load(mask[0] + offsets, mask=valid, other=0) != 0
    else:
        is_above = load_mask(mask, rows_J, rows_T, num_rows)
    return is_above


@triton.jit
def _path_sum(rows_T, stop, g, mask, num_rows, BLOCK_J: tl.constexpr):
    """The part of c that comes from ancestors in rows 0..stop - 1."""
    total_T = tl.full(rows_T.shape, 0.0, tl.float32)
    for start in range(0, stop, BLOCK_J):
        rows_J = start + tl.arange(0, BLOCK_J)
        g_J = load_vector(g, rows_J, rows_J < stop)
        mask_JT = _load_mask(mask, rows_J, rows_T, num_rows, True)
        total_T += tl.sum(tl.where(mask_JT, g_J[:, None], 0.0), axis=0)
    return total_T


@triton.jit
def _weights(keys, beta_T, path_T, mask_TT, rows_T, scale, PAIR: tl.constexpr):
    """W [J, T] of the system and the weights [J, T] of u in o, within one tile."""
    decay_JT = pair_decays(path_T, path_T, mask_TT)
    system_JT, weight_JT = dot_keys(keys[2], keys, PAIR)
    system_JT *= decay_JT * beta_T[None, :]
    system_JT = tl.where(rows_T[:, None] == rows_T[None, :], 0.0, system_JT)
    return system_JT, weight_JT * decay_JT * scale


@triton.jit
def _owe_earlier(
    rows, mask, first, num_rows, keys, beta_T, path_T, rows_T, scale, dims_P, dims_N,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What the right side and o of a tile owe to u of the rows before `first` [P, T]."""
    u, k, g = rows
    right_PT = tl.full([BLOCK_P, rows_T.shape[0]], 0.0, tl.float32)
    o_PT = tl.full([BLOCK_P, rows_T.shape[0]], 0.0, tl.float32)
    for earlier in range(0, first, BLOCK_J):
        rows_J = earlier + tl.arange(0, BLOCK_J)
        before_J = rows_J < first
        path_J = _path_sum(rows_J, tl.minimum(earlier + BLOCK_J, first), g, mask, num_rows, BLOCK_J)
        mask_JT = _load_mask(mask, rows_J, rows_T, num_rows, True) & before_J[:, None]
        decay_JT = pair_decays(path_J, path_T, mask_JT)
        k_JN = load_rows(k, rows_J, before_J, dims_N)
        u_PJ = load_columns(u, rows_J, before_J, dims_P)
        # Tiles behind the first one never pair k with q: they have no registers for it.
        system_JT, weight_JT = dot_keys(k_JN, keys, False)
        right_PT = dot_parts(u_PJ, -system_JT * decay_JT * beta_T[None, :], right_PT, EXACT)
        o_PT = dot_parts(u_PJ, weight_JT * decay_JT * scale, o_PT, EXACT)
    return right_PT, o_PT


@triton.jit
def _solved_tile(solved_ptr, right_PT, o_PT, own_T, BLOCK_T: tl.constexpr):
    """u and o of a tile, from what `delta_solve_kernel` has left for this head."""
    ptrs = solved_ptr + own_T[:, None] * BLOCK_T + own_T[None, :]
    inverse_high = tl.load(ptrs)
    inverse_low = tl.load(ptrs + BLOCK_T * BLOCK_T)
    high, low = halves(right_PT)
    u_PT = tl.dot(low, inverse_high, tl.dot(high, inverse_high))
    u_PT = tl.dot(high, inverse_low, u_PT)
    weight_high = tl.load(ptrs + 2 * BLOCK_T * BLOCK_T)
    weight_low = tl.load(ptrs + 3 * BLOCK_T * BLOCK_T)
    high, low = halves(u_PT)
    o_PT = tl.dot(low, weight_high, tl.dot(high, weight_high, o_PT))
    return u_PT, tl.dot(high, weight_low, o_PT)


@triton.jit
def _accepted_state(
    state_ptrs, past, counts, dims_P, dims_N, owns, COMMIT: tl.constexpr, BLOCK_L: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The state's tile after all accepted rows; it is stored where they do not fit."""
    total = counts[0] + counts[1]
    is_buffered = total <= BUFFERED
    saves = is_buffered & COMMIT
    if not COMMIT:
        # More rows than may be kept are in the state since this step's first pass.
        total = tl.where(is_buffered, total, 0)
    if AHEAD:
        state = advance_ahead(
            state_ptrs, past, counts, total, dims_P, dims_N, owns, saves, BLOCK_L
        )  # fmt: skip
    else:
        state = tl.load(state_ptrs).to(tl.float32)
        state = advance_delta(state, past, counts, total, dims_P, dims_N, owns, saves, BLOCK_L)
    if COMMIT and not is_buffered:
        tl.store(state_ptrs, state.to(state_ptrs.dtype.element_ty))
    return state


@triton.jit(do_not_specialize=["first", "num_rows", "past_start"])
def delta_scan_kernel(
    # pointers
    state_ptr, u_ptr, k_ptr, g_ptr, q_ptr, v_ptr, beta_ptr, out_ptr, z_ptr, sums_ptr, past_u_ptr,
    past_k_ptr, past_g_ptr, path_ptr, length_ptr, num_buffered_ptr, mask_ptr, solved_ptr,
    # sizes
    scale, past_start, first, num_rows,
    # strides
    stride_state_b, stride_u_b, stride_k_b, stride_g_b, stride_q_b, stride_v_b, stride_beta_b,
    stride_out_b, stride_z_b, stride_sums_b, stride_path_b, stride_u_r, stride_k_r, stride_g_r,
    stride_q_t, stride_v_t, stride_beta_t, stride_out_t, stride_z_t, stride_sums_t, stride_mask_r,
    # meta
    HEADS_PER_K: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, COMMIT: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr, AHEAD: tl.constexpr, PAIR: tl.constexpr,
    EARLIER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Commit accepted rows and score the tile of rows from `first` on; see `delta_scan`."""
    release_next(PDL)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    k_base, v_base = head // HEADS_PER_K * STATE_DIM, head * HEAD_DIM
    state_ptr += sequence * stride_state_b + v_base * STATE_DIM
    state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
    counts = (tl.load(num_buffered_ptr + sequence), tl.load(length_ptr + sequence))
    past = (
        (past_u_ptr + sequence * stride_u_b + v_base, stride_u_r),
        (past_g_ptr + sequence * stride_g_b + head, stride_g_r),
        (past_k_ptr + sequence * stride_k_b + k_base, stride_k_r),
        path_ptr + sequence * stride_path_b, past_start,
    )  # fmt: skip
    first_block = tl.program_id(0) == 0
    owns = (True, first_block, first_block & (head % HEADS_PER_K == 0))
    u = (u_ptr + sequence * stride_u_b + v_base, stride_u_r)
    k = (k_ptr + sequence * stride_k_b + k_base, stride_k_r)
    g = (g_ptr + sequence * stride_g_b + head, stride_g_r)
    q = (q_ptr + sequence * stride_q_b + k_base, stride_q_t)
    v = (v_ptr + sequence * stride_v_b + v_base, stride_v_t)
    beta = (beta_ptr + sequence * stride_beta_b + head, stride_beta_t)
    out = (out_ptr + sequence * stride_out_b + v_base, stride_out_t)
    z = None
    sums = None
    if z_ptr is not None:
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        z = (z_ptr + sequence * stride_z_b + v_base, stride_z_t)
        sums = (sums_ptr + sequence * stride_sums_b + part, stride_sums_t)
    mask = (mask_ptr, stride_mask_r)
    own_T = tl.arange(0, BLOCK_T)
    rows_T = own_T
    if EARLIER:
        rows_T += first
    within = rows_T < num_rows
    rounds = 0
    if solved_ptr is None:
        rounds = count_rounds(_load_mask(mask, rows_T, rows_T, num_rows, EARLIER), rows_T)
    if not EARLIER:
        state = _accepted_state(
            state_ptrs, past, counts, dims_P, dims_N, owns, COMMIT, BLOCK_L, AHEAD
        )  # fmt: skip
        if BLOCK_T <= 32:
            # Before the wait, and it frees the registers of the fp32 state.
            state = split_state(state, EXACT)
    wait_for_previous(PDL)
    keys = load_keys(k, q, first, num_rows, dims_N, BLOCK_T, PAIR)
    mask_TT = _load_mask(mask, rows_T, rows_T, num_rows, EARLIER)
    beta_T = load_vector(beta, own_T, within)
    g_T = load_vector(g, rows_T, within)
    path_T = tl.sum(tl.where(mask_TT, g_T[:, None], 0.0), axis=0)
    if EARLIER:
        # Before the state, for which there would be no registers beside it; what the launch for
        # the rows before has stored of it is visible by now.
        path_T += _path_sum(rows_T, first, g, mask, num_rows, BLOCK_J)
        owed_PT, owed_o_PT = _owe_earlier(
            (u, k, g), mask, first, num_rows, keys, beta_T, path_T, rows_T, scale, dims_P,
            dims_N, BLOCK_J, BLOCK_P, EXACT,
        )  # fmt: skip
        state = _accepted_state(
            state_ptrs, past, counts, dims_P, dims_N, owns, COMMIT, BLOCK_L, AHEAD
        )  # fmt: skip
    if EARLIER or BLOCK_T > 32:
        state = split_state(state, EXACT)
    v_PT = load_columns(v, own_T, within, dims_P).to(tl.float32)
    decay_T = tl.exp(path_T)
    key_PT, query_PT = dot_state_keys(state, keys, PAIR)
    right_PT = beta_T[None, :] * (v_PT - decay_T[None, :] * key_PT)
    o_PT = query_PT * (decay_T * scale)[None, :]
    if EARLIER:
        right_PT += owed_PT
        o_PT += owed_o_PT
    if solved_ptr is not None:
        solved_ptr += (sequence * tl.num_programs(1) + head) * (4 * BLOCK_T * BLOCK_T)
        u_PT, o_PT = _solved_tile(solved_ptr, right_PT, o_PT, own_T, BLOCK_T)
    else:
        system_JT, weight_JT = _weights(keys, beta_T, path_T, mask_TT, rows_T, scale, PAIR)
        if EXACT:
            u_PT = substitute(right_PT, system_JT, rounds, True)
        else:
            inverse_JT = invert(system_JT, own_T, rounds, BLOCK_T, False)
            u_PT = dot_parts(right_PT, inverse_JT, None, False)
        o_PT = dot_parts(u_PT, weight_JT, o_PT, EXACT)
    tl.store(u[0] + rows_T[None, :] * u[1] + dims_P[:, None], u_PT, mask=within[None, :])
    gate_and_store(o_PT, out, z, sums, own_T, within, dims_P)


@triton.jit(do_not_specialize=["first", "num_rows"])
def delta_solve_kernel(
    # pointers
    k_ptr, g_ptr, q_ptr, beta_ptr, mask_ptr, solved_ptr,
    # sizes
    scale, first, num_rows,
    # strides
    stride_k_b, stride_g_b, stride_q_b, stride_beta_b, stride_k_r, stride_g_r, stride_q_t,
    stride_beta_t, stride_mask_r,
    # meta
    HEADS_PER_K: tl.constexpr, STATE_DIM: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr,
    PAIR: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Leave (I + W)^-1 and the weights of u [J, T] of one head, each as two bf16 parts."""
    release_next(PDL)
    head = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    own_T, dims_N = tl.arange(0, BLOCK_T), tl.arange(0, STATE_DIM)
    rows_T = own_T
    if EARLIER:
        rows_T += first
    within = rows_T < num_rows
    mask_TT = _load_mask((mask_ptr, stride_mask_r), rows_T, rows_T, num_rows, EARLIER)
    rounds = count_rounds(mask_TT, rows_T)
    k_base = head // HEADS_PER_K * STATE_DIM
    wait_for_previous(PDL)
    k = (k_ptr + sequence * stride_k_b + k_base, stride_k_r)
    q = (q_ptr + sequence * stride_q_b + k_base, stride_q_t)
    g = (g_ptr + sequence * stride_g_b + head, stride_g_r)
    beta = (beta_ptr + sequence * stride_beta_b + head, stride_beta_t)
    keys = load_keys(k, q, first, num_rows, dims_N, BLOCK_T, PAIR)
    g_T = load_vector(g, rows_T, within)
    # Differences of c alone matter here, so ancestors before the tile do not.
    path_T = tl.sum(tl.where(mask_TT, g_T[:, None], 0.0), axis=0)
    system_JT, weight_JT = _weights(
        keys, load_vector(beta, own_T, within), path_T, mask_TT, rows_T, scale, PAIR
    )
    inverse_JT = invert(system_JT, own_T, rounds, BLOCK_T, False)
    solved_ptr += (sequence * tl.num_programs(0) + head) * (4 * BLOCK_T * BLOCK_T)
    ptrs = solved_ptr + own_T[:, None] * BLOCK_T + own_T[None, :]
    high, low = halves(inverse_JT)
    tl.store(ptrs, high)
    tl.store(ptrs + BLOCK_T * BLOCK_T, low)
    high, low = halves(weight_JT)
    tl.store(ptrs + 2 * BLOCK_T * BLOCK_T, high)
    tl.store(ptrs + 3 * BLOCK_T * BLOCK_T, low)


@triton.jit(do_not_specialize=["past_start"])
def delta_token_kernel(
    # pointers
    state_ptr, u_ptr, k_ptr, g_ptr, q_ptr, v_ptr, beta_ptr, out_ptr, z_ptr, sums_ptr, past_u_ptr,
    past_k_ptr, past_g_ptr, path_ptr, length_ptr, num_buffered_ptr,
    # sizes
    scale, past_start,
    # strides
    stride_state_b, stride_u_b, stride_k_b, stride_g_b, stride_q_b, stride_v_b, stride_beta_b,
    stride_out_b, stride_z_b, stride_sums_b, stride_path_b, stride_u_r, stride_k_r, stride_g_r,
    # meta
    HEADS_PER_K: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, COMMIT: tl.constexpr, PDL: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Commit accepted rows and score row 0, without tensor cores; arguments as in `delta_scan`."""
    release_next(PDL)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N = tl.arange(0, STATE_DIM)
    k_base, v_base = head // HEADS_PER_K * STATE_DIM, head * HEAD_DIM
    state_ptr += sequence * stride_state_b + v_base * STATE_DIM
    state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
    # Nothing reads it again before the next step.
    state = tl.load(state_ptrs, eviction_policy="evict_first").to(tl.float32)
    counts = (tl.load(num_buffered_ptr + sequence), tl.load(length_ptr + sequence))
    past = (
        (past_u_ptr + sequence * stride_u_b + v_base, stride_u_r),
        (past_g_ptr + sequence * stride_g_b + head, stride_g_r),
        (past_k_ptr + sequence * stride_k_b + k_base, stride_k_r),
        path_ptr + sequence * stride_path_b, past_start,
    )  # fmt: skip
    first_block = tl.program_id(0) == 0
    owns = (True, first_block, first_block & (head % HEADS_PER_K == 0))
    total = counts[0] + counts[1]
    is_buffered = total <= BUFFERED
    if COMMIT and not is_buffered:
        state = advance_delta(
            state, past, counts, total, dims_P, dims_N, owns, False, BLOCK_L
        )  # fmt: skip
        rounded = state.to(state_ptr.dtype.element_ty)
        tl.store(state_ptrs, rounded)
        state = rounded.to(tl.float32)
    # Accepted rows that are not in the state are scored as the token's ancestors.
    position = tl.arange(0, BUFFERED)
    counts = (tl.where(is_buffered, counts[0], 0), tl.where(is_buffered, counts[1], 0))
    u_PL, g_L, k_LN, in_path = load_past(position, past, counts, dims_P, dims_N)
    if COMMIT:
        keep_rows(position, past, u_PL, g_L, k_LN, in_path, dims_P, dims_N, owns)
    u_PL, after_L, decay = weigh_delta(position, counts[0] + counts[1], u_PL, g_L)
    u_PL *= tl.exp(after_L)[None, :]
    wait_for_previous(PDL)
    k_N = tl.load(k_ptr + sequence * stride_k_b + k_base + dims_N).to(tl.float32)
    q_N = tl.load(q_ptr + sequence * stride_q_b + k_base + dims_N).to(tl.float32)
    v_P = tl.load(v_ptr + sequence * stride_v_b + v_base + dims_P).to(tl.float32)
    own_decay = tl.exp(tl.load(g_ptr + sequence * stride_g_b + head))
    beta = tl.load(beta_ptr + sequence * stride_beta_b + head)
    k_LN = k_LN.to(tl.float32)
    past_key_L = tl.sum(k_LN * k_N[None, :], axis=1)
    past_query_L = tl.sum(k_LN * q_N[None, :], axis=1)
    key_P = tl.exp(decay) * tl.sum(state * k_N[None, :], axis=1)
    key_P += tl.sum(u_PL * past_key_L[None, :], axis=1)
    query_P = tl.exp(decay) * tl.sum(state * q_N[None, :], axis=1)
    query_P += tl.sum(u_PL * past_query_L[None, :], axis=1)
    u_P = beta * (v_P - own_decay * key_P)
    o_P = (own_decay * query_P + u_P * tl.sum(k_N * q_N, axis=0)) * scale
    tl.store(u_ptr + sequence * stride_u_b + v_base + dims_P, u_P)
    if z_ptr is not None:
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        tl.store(sums_ptr + sequence * stride_sums_b + part, tl.sum(o_P * o_P, axis=0))
        z_P = tl.load(z_ptr + sequence * stride_z_b + v_base + dims_P).to(tl.float32)
        o_P *= z_P / (1.0 + tl.exp(-z_P))
    tl.store(out_ptr + sequence * stride_out_b + v_base + dims_P, o_P)
