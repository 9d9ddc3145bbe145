"""Read prompts with a gated delta layer's scan, many side by side, in two Triton kernels.

The work is that of `delta_chunk_scan_ref`. The first kernel has a program for every chunk and head:
it leaves the inverse of the chunk's system, made by blocks. In the second one a program owns a tile
of one head's state and takes a sequence's chunks in turn.
Source: Gated DeltaNet (arXiv:2412.06464) sec. 3.3.

Shape letters: M packed tokens, S sequences, B slots, H value heads, P value head dim, N key head
dim, G key heads, T rows of a chunk, J rows before them.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.delta.delta_chunk_scan_ref import PackedTokens
from stree_kernels.delta.device_functions import (
    dot_parts,
    dot_state,
    gate_and_store,
    invert,
    pair_decays,
    split_state,
)
from stree_kernels.delta.rows import check_decay, check_heads
from stree_kernels.launch import pdl
from stree_kernels.launch.packing import Packing, check_packing
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, Gate, gate_width, require_dtypes, require_packed
from stree_kernels.launch.shared_memory import prefer_shared
from stree_kernels.ssm.device_functions import (
    dot_wide,
    halves,
    load_columns,
    load_rows,
    load_vector,
)

HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Rows of a chunk, warps of 32 threads of both kernels."""

    chunk: int
    solve_warps: int
    num_warps: int


# Never autotuned: the kernel updates the state in place, and the order of sums is the chunk's.
# Larger chunks keep more beside the state than there are registers (docs/log.md).
CONFIG = ChunkConfig(16, 4, 4)
# fp32, and other compute capabilities than 9.0: where nothing was timed, what does not spill.
WIDE_CONFIG = ChunkConfig(16, 4, 8)


@triton.jit
def _at(source, begin):
    """A source from row `begin` on: what is added to it then are small numbers."""
    return source[0] + begin * source[1], source[1]


@triton.jit
def _load_gates(g, beta, begin, within, own_T):
    """c of a chunk's rows, and beta."""
    path_T = tl.cumsum(load_vector(_at(g, begin), own_T, within), axis=0)
    return path_T, load_vector(_at(beta, begin), own_T, within)


@triton.jit
def _causal(CHUNK: tl.constexpr):
    """The mask [J, T] of rows that follow one another."""
    rows = tl.arange(0, CHUNK)
    return rows[:, None] <= rows[None, :]


@triton.jit
def _delta_chunk_solve_kernel(
    # pointers
    k_ptr, g_ptr, beta_ptr, offsets_ptr, solved_ptr,
    # sizes
    num_sequences,
    # strides
    stride_k_m, stride_g_m, stride_beta_m,
    # meta
    HEADS_PER_K: tl.constexpr, STATE_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    slot = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    # Sequence s has the slots from offset // CHUNK + s on; no two share one.
    sequences_S = tl.arange(0, BLOCK_S)
    exists = sequences_S < num_sequences
    offsets_S = tl.load(offsets_ptr + sequences_S, mask=exists, other=0)
    begins_S = exists & (offsets_S // CHUNK + sequences_S <= slot)
    sequence = tl.sum(begins_S.to(tl.int32), axis=0) - 1
    start = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    begin = start + (slot - start // CHUNK - sequence) * CHUNK
    if begin < end:
        dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
        k = _at((k_ptr + head // HEADS_PER_K * STATE_DIM, stride_k_m), begin)
        g, beta = (g_ptr + head, stride_g_m), (beta_ptr + head, stride_beta_m)
        within = own_T < end - begin
        k_NT = load_columns(k, own_T, within, dims_N)
        path_T, beta_T = _load_gates(g, beta, begin, within, own_T)
        decay_JT = pair_decays(path_T, path_T, _causal(CHUNK)) * beta_T[None, :]
        system_JT = tl.dot(tl.trans(k_NT), k_NT, input_precision="ieee") * decay_JT
        system_JT = tl.where(own_T[:, None] == own_T[None, :], 0.0, system_JT)
        inverse_JT = invert(system_JT, own_T, CHUNK - 1, CHUNK, True)
        solved_ptr += (slot * tl.num_programs(1) + head) * (CHUNK * CHUNK)
        tl.store(solved_ptr + own_T[:, None] * CHUNK + own_T[None, :], inverse_JT)


@triton.jit
def _thirds(wide):
    """Three bf16 numbers whose sum an fp32 one is."""
    high, rest = halves(wide)
    low = (wide - high.to(tl.float32) - rest.to(tl.float32)).to(tl.bfloat16)
    return high, rest, low


@triton.jit
def _dot_thirds(left, right, EXACT: tl.constexpr):
    """left @ right, both fp32: in three bf16 parts each, but for products below fp32's digits.

    What u of one chunk is rounded by, reflections carry on through a prompt.
    """
    if EXACT:
        total = tl.dot(left, right, input_precision="ieee")
    else:
        left_high, left_mid, left_low = _thirds(left)
        right_high, right_mid, right_low = _thirds(right)
        total = tl.dot(left_mid, right_mid, tl.dot(left_low, right_high))
        total = tl.dot(left_high, right_low, total)
        total = tl.dot(left_high, right_mid, tl.dot(left_mid, right_high, total))
        total = tl.dot(left_high, right_high, total)
    return total


@triton.jit
def _add_rows(state, weighted_PT, k_TN):
    """The state with rows added: beside bf16 u enters in three parts, beside fp16 in two."""
    if k_TN.dtype == tl.bfloat16:
        high, mid, low = _thirds(weighted_PT)
        state = tl.dot(mid, k_TN, tl.dot(low, k_TN, state))
        state = tl.dot(high, k_TN, state)
    else:
        state = dot_wide(weighted_PT, k_TN, state)
    return state


@triton.jit
def _delta_chunk_scan_kernel(
    # pointers
    state_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, offsets_ptr, slots_ptr, starts_ptr, out_ptr,
    z_ptr, sums_ptr, solved_ptr,
    # sizes
    scale,
    # strides
    stride_state_b, stride_q_m, stride_k_m, stride_v_m, stride_g_m, stride_beta_m, stride_out_m,
    stride_z_m, stride_sums_m,
    # meta
    HEADS_PER_K: tl.constexpr, HEAD_DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dims_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims_N, own_T = tl.arange(0, STATE_DIM), tl.arange(0, CHUNK)
    k_base, v_base = head // HEADS_PER_K * STATE_DIM, head * HEAD_DIM
    wait_for_previous(PDL)
    start = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    chunk = start // CHUNK + sequence
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    # A sequence without tokens touches nothing: its slot may be another one's.
    if start < end:
        goes_on = tl.load(starts_ptr + sequence) > 0
        state_ptr += slot * stride_state_b + v_base * STATE_DIM
        state_ptrs = state_ptr + dims_P[:, None] * STATE_DIM + dims_N[None, :]
        state = tl.load(state_ptrs, mask=goes_on, other=0.0).to(tl.float32)
        q, v = (q_ptr + k_base, stride_q_m), (v_ptr + v_base, stride_v_m)
        k = (k_ptr + k_base, stride_k_m)
        g, beta = (g_ptr + head, stride_g_m), (beta_ptr + head, stride_beta_m)
        out = (out_ptr + v_base, stride_out_m)
        part = head * (HEAD_DIM // BLOCK_P) + tl.program_id(0)
        for begin in range(start, end, CHUNK):
            within = own_T < end - begin
            path_T, beta_T = _load_gates(g, beta, begin, within, own_T)
            k_NT = load_columns(_at(k, begin), own_T, within, dims_N)
            q_NT = load_columns(_at(q, begin), own_T, within, dims_N)
            k_TN = load_rows(_at(k, begin), own_T, within, dims_N)
            decay_T = tl.exp(path_T)
            parts = split_state(state, EXACT)
            key_PT = dot_state(parts, k_NT)
            o_PT = dot_state(parts, q_NT) * (decay_T * scale)[None, :]
            v_PT = load_columns(_at(v, begin), own_T, within, dims_P).to(tl.float32)
            right_PT = beta_T[None, :] * (v_PT - decay_T[None, :] * key_PT)
            here_ptr = solved_ptr + (chunk * tl.num_programs(1) + head) * (CHUNK * CHUNK)
            inverse_JT = tl.load(here_ptr + own_T[:, None] * CHUNK + own_T[None, :])
            u_PT = _dot_thirds(right_PT, inverse_JT, EXACT)
            weight_JT = tl.dot(k_TN, q_NT, input_precision="ieee")
            weight_JT *= pair_decays(path_T, path_T, _causal(CHUNK)) * scale
            o_PT = dot_parts(u_PT, weight_JT, o_PT, EXACT)
            if z_ptr is None:
                gate_and_store(o_PT, _at(out, begin), None, None, own_T, within, dims_P)
            else:
                z = _at((z_ptr + v_base, stride_z_m), begin)
                sums = _at((sums_ptr + part, stride_sums_m), begin)
                gate_and_store(o_PT, _at(out, begin), z, sums, own_T, within, dims_P)
            # c of rows that are not there is that of the last one.
            total = tl.min(path_T, axis=0)
            state = _add_rows(state * tl.exp(total), u_PT * tl.exp(total - path_T)[None, :], k_TN)
            chunk += 1
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty))


def delta_chunk_scan(
    state_BHPN: Tensor, tokens: PackedTokens, packing: Packing, *, out_MHP: Tensor,
    gate: Gate | None,
) -> None:  # fmt: skip
    """Advance the states of the slots that sequences go on with, and write o of each token.

    The contract is that of `delta_chunk_scan_ref.delta_chunk_scan`, with q, k, v, z and o in one
    dtype of `FLOATS` and g, beta and sums in fp32. Allocates the chunks' inverses.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    block_p = _check(state_BHPN, tokens, packing, out_MHP, gate)
    num_sequences, (num_heads, head_dim, state_dim) = len(packing.slots_S), state_BHPN.shape[1:]
    device, exact = state_BHPN.device, out_MHP.dtype == torch.float32
    config = CONFIG if not exact and pdl.capability(device) == 90 else WIDE_CONFIG
    size, num_slots = config.chunk, len(out_MHP) // config.chunk + num_sequences
    solved = torch.empty(num_slots, num_heads, size, size, device=device)
    q, k, v, g, beta = tokens
    options = {"num_stages": 1, **launch_options(device)}
    heads_per_k = num_heads // k.shape[1]
    kernel = _delta_chunk_solve_kernel[num_slots, num_heads](
        k, g, beta, packing.offsets_S1, solved, num_sequences,
        k.stride(0), g.stride(0), beta.stride(0),
        HEADS_PER_K=heads_per_k, STATE_DIM=state_dim, CHUNK=size,
        BLOCK_S=triton.next_power_of_2(num_sequences), num_warps=config.solve_warps, **options,
    )  # fmt: skip
    prefer_shared(kernel, device, num_slots * num_heads)
    z, sums = gate or (None, None)
    moved = (*tokens, out_MHP, z, sums)
    grid = (head_dim // block_p, num_heads, num_sequences)
    kernel = _delta_chunk_scan_kernel[grid](
        state_BHPN, q, k, v, g, beta, *packing, out_MHP, z, sums, solved, state_dim**-0.5,
        state_BHPN.stride(0), *(0 if tensor is None else tensor.stride(0) for tensor in moved),
        HEADS_PER_K=heads_per_k, HEAD_DIM=head_dim, STATE_DIM=state_dim, BLOCK_P=block_p,
        CHUNK=size, EXACT=exact, num_warps=config.num_warps, **options,
    )  # fmt: skip
    prefer_shared(kernel, device, grid[0] * num_heads * num_sequences)


def _check(
    state: Tensor, tokens: PackedTokens, packing: Packing, out: Tensor, gate: Gate | None
) -> int:
    """Return a program's columns of v; raise ValueError for what the kernels cannot take."""
    check_decay(tokens.g_MH, 2)
    check_heads(state, tokens.k_MGN, tokens.q_MGN)
    num_heads, head_dim, state_dim = state.shape[1:]
    check_packing(packing)
    if head_dim not in HEAD_DIMS or state_dim not in HEAD_DIMS:
        raise ValueError(
            f"the delta chunk scan takes head dims {HEAD_DIMS}, got {head_dim} of v and "
            f"{state_dim} of k; use the torch backend"
        )
    q, k, v, g, beta = tokens
    blocks = [q, k, v, out] if gate is None else [q, k, v, out, gate.z_BTHP]
    sums = [] if gate is None else [gate.square_sums_BTQ]
    require_dtypes("q, k, v, z and the output", blocks, FLOATS)
    require_dtypes("the state", (state,), FLOATS)
    require_dtypes("the decay, beta and sums", (g, beta, *sums), (torch.float32,))
    require_packed("the state", (state,), 3)
    require_packed("a row of q, k, v, z or the output", blocks, 2)
    require_packed("a row of the decay, beta or sums", (g, beta, *sums), 1)
    if any(len(tensor) != len(out) for tensor in (*tokens, *blocks, *sums)):
        raise ValueError(
            f"packed rows are as many as those of the output, {len(out)}, got "
            f"{sorted({len(tensor) for tensor in (*tokens, *blocks, *sums)})}; pass whole buffers"
        )
    block_p = gate_width(head_dim, state_dim, out.dtype)
    num_parts = num_heads * head_dim // block_p
    if sums and sums[0].shape[1] != num_parts:
        raise ValueError(
            f"the kernel adds the squares of {block_p} columns at a time, {num_parts} sums a row, "
            f"got {sums[0].shape[1]}; take `gate_width` columns for each"
        )
    return block_p
