"""The scan of packed prompts, in Triton kernels.

Time steps and sums of log decays are made once, as are the scores C B^T, which heads share. Then a
program takes a sequence's chunks in turn for a tile of one head's state, and stores the state
before each; with these, all chunks of all heads are scored in parallel. A sequence of more than a
segment is cut: the segments' own contributions come first, from them the state before each. In
registers the state is transposed ([N, P]), so that rows enter all products as they lie in memory.
Source: Mamba-2 (arXiv:2405.21060) sec. 6.

Shape letters: T rows of a chunk, J the rows before them, P head dim, N state dim.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from stree_kernels.launch.pdl import wait_for_previous
from stree_kernels.launch.tiles import find_tile
from stree_kernels.ssm.device_functions import (
    dot_rounded,
    halves,
    load_rows,
    time_steps,
)


@triton.jit
def _at(source, begin):
    """A source from row `begin` on: what is added to it then are small numbers."""
    return source[0] + begin.to(tl.int64) * source[1], source[1]


@triton.jit
def decays_kernel(
    # pointers
    dt_ptr, a_ptr, dt_bias_ptr, offsets_ptr, decays_ptr,
    # sizes and limits
    dt_min, dt_max, num_sequences, num_heads, num_tokens,
    # strides
    stride_dt_m,
    # meta
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """d of a chunk's rows, their log decay from the chunk's start on, and to its end [3, H, M]."""
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = head_H < num_heads
    rate_H = tl.load(a_ptr + head_H, mask=exists, other=0.0)[None, :]
    bias_H = tl.load(dt_bias_ptr + head_H, mask=exists, other=0.0)[None, :]
    wait_for_previous(PDL)
    _, _, first, end = find_tile(offsets_ptr, num_sequences, tl.program_id(0), CHUNK, BLOCK_S)
    if first < end:
        row_T = first + tl.arange(0, CHUNK)
        valid = (row_T < end)[:, None] & exists[None, :]
        offsets = row_T.to(tl.int64)[:, None] * stride_dt_m + head_H[None, :]
        raw_TH = tl.load(dt_ptr + offsets, mask=valid, other=0.0)
        d_TH = tl.where(valid, time_steps(raw_TH, (rate_H, bias_H, dt_min, dt_max)), 0.0)
        log_TH = d_TH * rate_H
        array = num_heads * tl.cast(num_tokens, tl.int64)
        ptrs = decays_ptr + head_H.to(tl.int64)[None, :] * num_tokens + row_T[:, None]
        tl.store(ptrs, d_TH, mask=valid)
        tl.store(ptrs + array, tl.cumsum(log_TH, axis=0), mask=valid)
        # A sum from the far end, not a difference of sums from the near one, which loses digits.
        after_TH = tl.cumsum(log_TH, axis=0, reverse=True) - log_TH
        tl.store(ptrs + 2 * array, after_TH, mask=valid)


@triton.jit
def scores_kernel(
    # pointers
    b_ptr, c_ptr, offsets_ptr, scores_ptr,
    # sizes
    num_sequences,
    # strides
    stride_b_m, stride_c_m,
    # meta
    GROUPS_PER_B: tl.constexpr, GROUPS_PER_C: tl.constexpr, STATE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C B^T of a chunk and a group of heads [T, J]."""
    number, group = tl.program_id(0), tl.program_id(1)
    dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
    wait_for_previous(PDL)
    _, _, first, end = find_tile(offsets_ptr, num_sequences, number, CHUNK, BLOCK_S)
    if first < end:
        within = own_T < end - first
        b = (b_ptr + group // GROUPS_PER_B * STATE_DIM, stride_b_m)
        c = (c_ptr + group // GROUPS_PER_C * STATE_DIM, stride_c_m)
        b_TN = load_rows(_at(b, first), own_T, within, dims_N)
        c_TN = load_rows(_at(c, first), own_T, within, dims_N)
        score_TJ = tl.dot(c_TN, tl.trans(b_TN), input_precision="ieee")
        scores_ptr += (number * tl.num_programs(1) + group).to(tl.int64) * (CHUNK * CHUNK)
        tl.store(scores_ptr + own_T[:, None] * CHUNK + own_T[None, :], score_TJ)


@triton.jit
def _tile(base, dims_P, dims_N, STATE_DIM: tl.constexpr):
    """The pointers [N, P] of a tile of a head's state.

    Made anew where they are used: kept through a loop they would take a quarter of the registers.
    """
    return base + (dims_P[None, :] * STATE_DIM + dims_N[:, None])


@triton.jit
def _dot_wide(left, wide, total):
    """total + left @ wide for an fp32 `wide`: with 16 bits on the left, as two bf16 parts.

    Parts of fp16 would overflow or lose their digits, so fp16 on the left is taken apart too.
    """
    if left.dtype == tl.float32:
        total = tl.dot(left, wide, total, input_precision="ieee")
    else:
        high, low = halves(wide)
        if left.dtype == tl.float16:
            left, left_low = halves(left.to(tl.float32))
            total = tl.dot(left_low, high, total)
        total = tl.dot(left, low, tl.dot(left, high, total))
    return total


@triton.jit
def _advance(state_NP, x_TP, b_TN, d_T, after_T, total):
    """The state after a chunk, whose log decay is `total`."""
    weighted_TP = x_TP.to(tl.float32) * (tl.exp(after_T) * d_T)[:, None]
    decayed_NP = state_NP * tl.exp(total)
    return _dot_wide(tl.trans(b_TN), weighted_TP, decayed_NP)


@triton.jit
def segment_states_kernel(
    # pointers
    x_ptr, b_ptr, decays_ptr, offsets_ptr, added_ptr, decay_ptr,
    # sizes
    num_sequences, num_tokens,
    # strides
    stride_x_m: tl.constexpr, stride_b_m: tl.constexpr,
    # meta
    HEADS_PER_X: tl.constexpr, HEADS_PER_B: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE_DIM: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What a segment that another one follows adds to the state, and its log decay."""
    head, tile = tl.program_id(1), tl.program_id(2)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
    wait_for_previous(PDL)
    _, _, first, end = find_tile(offsets_ptr, num_sequences, tile, SEGMENT, BLOCK_S)
    if first + SEGMENT < end:
        x = (x_ptr + head // HEADS_PER_X * HEAD_DIM, stride_x_m)
        array = tl.num_programs(1) * tl.cast(num_tokens, tl.int64)
        decays_ptr += head * tl.cast(num_tokens, tl.int64)
        b = (b_ptr + head // HEADS_PER_B * STATE_DIM, stride_b_m)
        state_NP = tl.full((STATE_DIM, BLOCK_P), 0.0, tl.float32)
        decay = 0.0
        within = own_T >= 0
        for chunk in tl.range(0, SEGMENT // CHUNK, num_stages=NUM_STAGES):
            begin = first + chunk * CHUNK
            x_TP = load_rows(_at(x, begin), own_T, within, dims_P)
            b_TN = load_rows(_at(b, begin), own_T, within, dims_N)
            here = decays_ptr + begin
            d_T, after_T = tl.load(here + own_T), tl.load(here + 2 * array + own_T)
            total = tl.load(here + array + CHUNK - 1)
            state_NP = _advance(state_NP, x_TP, b_TN, d_T, after_T, total)
            decay += total
        place = (tile * tl.num_programs(1) + head).to(tl.int64)
        added_ptr += place * (HEAD_DIM * STATE_DIM)
        tl.store(_tile(added_ptr, dims_P, dims_N, STATE_DIM), state_NP)
        if tl.program_id(0) == 0:
            tl.store(decay_ptr + place, decay)


@triton.jit
def pass_states_kernel(
    # pointers
    state_ptr, added_ptr, decay_ptr, offsets_ptr, slots_ptr, starts_ptr,
    # strides
    stride_state_b,
    # meta
    STATE_SIZE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put the state before each segment in place of what the segment adds."""
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    part_X = block * BLOCK_X + tl.arange(0, BLOCK_X)
    wait_for_previous(PDL)
    start = tl.load(offsets_ptr + sequence)
    count = tl.cdiv(tl.load(offsets_ptr + sequence + 1) - start, SEGMENT)
    if count > 1:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(starts_ptr + sequence) > 0
        state_ptrs = state_ptr + slot * stride_state_b + head * STATE_SIZE + part_X
        state_X = tl.load(state_ptrs, mask=goes_on & (part_X < STATE_SIZE), other=0.0)
        state_X = state_X.to(tl.float32)
        place = ((start // SEGMENT + sequence) * num_heads + head).to(tl.int64)
        for _ in range(0, count - 1):
            added_ptrs = added_ptr + place * STATE_SIZE + part_X
            added_X = tl.load(added_ptrs)
            decay = tl.load(decay_ptr + place)
            tl.store(added_ptrs, state_X)
            state_X = state_X * tl.exp(decay) + added_X
            place += num_heads
        tl.store(added_ptr + place * STATE_SIZE + part_X, state_X)


@triton.jit
def advance_states_kernel(
    # pointers
    state_ptr, x_ptr, b_ptr, decays_ptr, offsets_ptr, slots_ptr, starts_ptr, before_ptr,
    carried_ptr,
    # sizes
    num_sequences, num_tokens,
    # strides
    stride_state_b, stride_x_m: tl.constexpr, stride_b_m: tl.constexpr,
    # meta
    HEADS_PER_X: tl.constexpr, HEADS_PER_B: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE_DIM: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store the state before each chunk of a segment; the sequence's last one stores its state."""
    head, tile = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
    size: tl.constexpr = HEAD_DIM * STATE_DIM
    wait_for_previous(PDL)
    sequence, start, first, end = find_tile(offsets_ptr, num_sequences, tile, SEGMENT, BLOCK_S)
    if first < end:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        state_ptr += slot * stride_state_b + head * size
        state_NP = tl.full((STATE_DIM, BLOCK_P), 0.0, tl.float32)
        if before_ptr is None or end - start <= SEGMENT:
            if tl.load(starts_ptr + sequence) > 0:
                state_NP = tl.load(_tile(state_ptr, dims_P, dims_N, STATE_DIM)).to(tl.float32)
        else:
            place = (tile * num_heads + head).to(tl.int64)
            state_NP = tl.load(_tile(before_ptr + place * size, dims_P, dims_N, STATE_DIM))
        x = (x_ptr + head // HEADS_PER_X * HEAD_DIM, stride_x_m)
        b = (b_ptr + head // HEADS_PER_B * STATE_DIM, stride_b_m)
        array = num_heads * tl.cast(num_tokens, tl.int64)
        decays_ptr += head * tl.cast(num_tokens, tl.int64)
        stop = tl.minimum(first + SEGMENT, end)
        # Chunks are counted as tiles of CHUNK tokens are.
        number = start // CHUNK + sequence + (first - start) // CHUNK
        for chunk in tl.range(0, tl.cdiv(stop - first, CHUNK), num_stages=NUM_STAGES):
            place = ((number + chunk) * num_heads + head).to(tl.int64)
            carried_ptrs = carried_ptr + place * size + dims_N[:, None] * HEAD_DIM
            carried_ptrs += dims_P[None, :]
            tl.store(carried_ptrs, state_NP.to(carried_ptr.dtype.element_ty))
            begin = first + chunk * CHUNK
            within = own_T < stop - begin
            x_TP = load_rows(_at(x, begin), own_T, within, dims_P)
            b_TN = load_rows(_at(b, begin), own_T, within, dims_N)
            here = decays_ptr + begin
            d_T = tl.load(here + own_T, mask=within, other=0.0)
            after_T = tl.load(here + 2 * array + own_T, mask=within, other=0.0)
            total = tl.load(here + array + tl.minimum(CHUNK, stop - begin) - 1)
            state_NP = _advance(state_NP, x_TP, b_TN, d_T, after_T, total)
        if stop == end:
            state_ptrs = _tile(state_ptr, dims_P, dims_N, STATE_DIM)
            tl.store(state_ptrs, state_NP.to(state_ptr.dtype.element_ty))


@triton.jit
def prompt_scan_kernel(
    # pointers
    x_ptr, c_ptr, out_ptr, z_ptr, sums_ptr, skip_ptr, decays_ptr, scores_ptr, carried_ptr,
    offsets_ptr,
    # sizes
    num_sequences, num_tokens,
    # strides
    stride_skip_h, stride_skip_p, stride_x_m: tl.constexpr, stride_c_m: tl.constexpr,
    stride_out_m: tl.constexpr, stride_z_m: tl.constexpr, stride_sums_m: tl.constexpr,
    # meta
    HEADS_PER_X: tl.constexpr, HEADS_PER_C: tl.constexpr, HEADS_PER_SCORE: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Score the tokens of a chunk against the state before it and against each other."""
    head, number = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
    skip_P = tl.load(skip_ptr + head * stride_skip_h + dims_P * stride_skip_p)
    wait_for_previous(PDL)
    _, _, first, end = find_tile(offsets_ptr, num_sequences, number, CHUNK, BLOCK_S)
    if first < end:
        within = own_T < end - first
        c = (c_ptr + head // HEADS_PER_C * STATE_DIM, stride_c_m)
        c_TN = load_rows(_at(c, first), own_T, within, dims_N)
        place = (number * num_heads + head).to(tl.int64)
        carried_ptr += place * (HEAD_DIM * STATE_DIM)
        carried_NP = tl.load(carried_ptr + dims_N[:, None] * HEAD_DIM + dims_P[None, :])
        array = num_heads * tl.cast(num_tokens, tl.int64)
        here = decays_ptr + head * tl.cast(num_tokens, tl.int64) + first
        d_T = tl.load(here + own_T, mask=within, other=0.0)
        path_T = tl.load(here + array + own_T, mask=within, other=0.0)
        y_TP = dot_rounded(c_TN, carried_NP, None, c_TN.dtype) * tl.exp(path_T)[:, None]
        group = number * (num_heads // HEADS_PER_SCORE) + head // HEADS_PER_SCORE
        scores_ptr += group.to(tl.int64) * (CHUNK * CHUNK)
        weight_TJ = tl.load(scores_ptr + own_T[:, None] * CHUNK + own_T[None, :])
        # The exponent may be positive and overflow above the diagonal: mask, then exp.
        exponent_TJ = path_T[:, None] - path_T[None, :]
        causal_TJ = own_T[:, None] >= own_T[None, :]
        exponent_TJ = tl.where(causal_TJ, exponent_TJ, float("-inf"))
        weight_TJ *= tl.exp(exponent_TJ) * d_T[None, :]
        x = (x_ptr + head // HEADS_PER_X * HEAD_DIM, stride_x_m)
        x_TP = load_rows(_at(x, first), own_T, within, dims_P)
        y_TP = dot_rounded(weight_TJ, x_TP, y_TP, x_TP.dtype)
        y_TP += skip_P[None, :] * x_TP.to(tl.float32)
        z = _at((z_ptr + head * HEAD_DIM, stride_z_m), first)
        z_TP = load_rows(z, own_T, within, dims_P).to(tl.float32)
        y_TP *= z_TP / (1.0 + tl.exp(-z_TP))
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        sums = _at((sums_ptr + part, stride_sums_m), first)
        tl.store(sums[0] + own_T * sums[1], tl.sum(y_TP * y_TP, axis=1), mask=within)
        out = _at((out_ptr + head * HEAD_DIM, stride_out_m), first)
        out_ptrs = out[0] + own_T[:, None] * out[1] + dims_P[None, :]
        tl.store(out_ptrs, y_TP.to(out_ptr.dtype.element_ty), mask=within[:, None])
