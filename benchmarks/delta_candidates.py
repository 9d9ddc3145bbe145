"""The gated delta scan by each implementation: checked against float64, then ready to be timed.

Shape letters: B batch, T tokens of the tree, H value heads, P value head dim, N key head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from candidates import Candidate
from delta_data import Buffer, DeltaInputs
from layer_data import relative_error
from torch import Tensor

from stree_core.models.row_block import RowBlock
from stree_kernels.delta.delta_scan import delta_scan
from stree_kernels.launch.rows import Pending

HISTORY_ROWS = 8
"""Rows of earlier steps that SGLang's replay kernel finds in its ring: the mean of our cycle."""


def ours(inputs: DeltaInputs) -> Candidate:
    """Commit accepted rows and score the tree, in the phases of a running decoder."""
    return _ours(inputs, inputs.block, inputs.phases)


def ours_storing(inputs: DeltaInputs) -> Candidate:
    """The same in the phase that stores the state."""
    return _ours(inputs, inputs.block, inputs.phases[-1:])


def ours_chain(inputs: DeltaInputs) -> Candidate:
    """The same with as many tokens in one chain, as peers without trees have them."""
    return _ours(inputs, inputs.chain, inputs.phases)


def _ours(inputs: DeltaInputs, block: RowBlock, phases: list[Pending]) -> Candidate:
    def scan(buffer: Buffer, state: Tensor, pending: Pending) -> None:
        delta_scan(
            state, buffer.rows, buffer.tokens, block.mask_RR, first=0, out_BTHP=buffer.out_BTHP,
            gate=None, past=inputs.past(buffer, pending),
        )  # fmt: skip

    def launch(call: int) -> None:
        buffer = inputs.buffers[call % len(inputs.buffers)]
        scan(buffer, buffer.state_BHPN, phases[call % len(phases)])

    # The flushing phase shows both the outputs and the state.
    o_true, state_true = inputs.truth(phases[-1], block)
    buffer = inputs.buffers[0]
    state = buffer.state_BHPN.clone()
    buffer.out_BTHP.fill_(torch.nan)
    scan(buffer, state, phases[-1])
    errors = {
        "o": relative_error(buffer.out_BTHP, o_true),
        "state": relative_error(state, state_true),
    }
    return Candidate(launch, errors)


def _packed(buffer: Buffer) -> list[Tensor]:
    """Return q, k, v, g and beta as peers take them: batch-major, without gaps."""
    q, v, beta = buffer.tokens
    return [t.contiguous() for t in (q, buffer.rows.k_BRGN, v, buffer.rows.g_BRH, beta)]


def fla(inputs: DeltaInputs, op: Callable[..., Any]) -> Candidate:
    """fla's fused recurrence over T tokens of one chain; it keeps the state of one token alone."""
    rows = [_packed(buffer) for buffer in inputs.buffers]

    def launch(call: int) -> Tensor:
        which = call % len(inputs.buffers)
        q, k, v, g, beta = rows[which]
        o: Tensor
        o, _ = op(
            q, k, v, g=g, beta=beta, scale=inputs.shape.state_dim**-0.5, state_v_first=True,
            initial_state=inputs.buffers[which].state_BHPN, output_final_state=inputs.tokens == 1,
        )  # fmt: skip
        return o

    o_true, _ = inputs.truth(inputs.nothing, inputs.chain)
    return Candidate(launch, {"o": relative_error(launch(0), o_true)})


def sglang_tree(inputs: DeltaInputs, op: Callable[..., Tensor]) -> Candidate:
    """SGLang's verification of a tree: one state per node, the committed one left alone.

    Its commit, a later copy of the accepted node's state, is not part of the call.
    """
    device, batch = inputs.device, inputs.batch
    size = inputs.buffers[0].state_BHPN.shape[1:]
    # All calls share it: it is written first, and larger than L2 where that matters.
    scratch = torch.empty(batch, inputs.tokens, *size, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    parents = torch.tensor(inputs.parents, dtype=torch.int32, device=device).repeat(batch, 1)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * inputs.tokens
    rows = [[tensor.flatten(0, 1)[None] for tensor in _packed(b)] for b in inputs.buffers]

    def launch(call: int) -> Tensor:
        which = call % len(inputs.buffers)
        q, k, v, g, beta = rows[which]
        return op(
            q=q, k=k, v=v, g=g, beta=beta, initial_state_source=inputs.buffers[which].state_BHPN,
            initial_state_indices=slots, cu_seqlens=bounds, use_qk_l2norm_in_kernel=False,
            disable_state_update=True, intermediate_states_buffer=scratch,
            intermediate_state_indices=slots, cache_steps=inputs.tokens,
            retrieve_parent_token=parents,
        )  # fmt: skip

    o_true, _ = inputs.truth(inputs.nothing, inputs.block)
    o = launch(0).view(o_true.shape)
    return Candidate(launch, {"o": relative_error(o, o_true)}, 1)


def sglang_replay(inputs: DeltaInputs, op: Callable[..., Tensor]) -> Candidate:
    """SGLang's replay kernel: a chain beside a ring of earlier rows, no state stored.

    Its folding of a full ring into the state, another launch, is not part of the call.
    """
    shape, batch, tokens, device = inputs.shape, inputs.batch, inputs.tokens, inputs.device
    ring = 1 << (HISTORY_ROWS + 2 * tokens - 1).bit_length()
    size = (batch, shape.num_heads, ring)

    def zeros(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=device)

    caches = [
        (
            zeros(*size, shape.head_dim),
            zeros(batch, shape.num_key_heads, ring, shape.state_dim),
            zeros(*size, dtype=torch.float32),
        )
        for _ in inputs.buffers
    ]
    position = torch.full((batch,), HISTORY_ROWS, dtype=torch.int32, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
    base, flags = torch.zeros_like(position), torch.zeros_like(position, dtype=torch.int8)
    rows = [
        [
            *(tensor.flatten(0, 1) for tensor in _packed(buffer)[:3]),
            *(raw.flatten(0, 1) for raw in buffer.raw_BTX.split(shape.num_heads, dim=-1)),
        ]
        for buffer in inputs.buffers
    ]
    out = torch.full_like(rows[0][2], torch.nan)
    log_a = (-inputs.heads.a_H).log()

    def launch(call: int) -> Tensor:
        which = call % len(inputs.buffers)
        q, k, v, a, b = rows[which]
        d_cache, k_cache, g_cache = caches[which]
        return op(
            q=q, k=k, v=v, a=a, b=b, A_log=log_a, dt_bias=inputs.heads.bias_H,
            checkpoint_state=inputs.buffers[which].state_BHPN, d_cache=d_cache, k_cache=k_cache,
            g_cache=g_cache, rawv_cache=None, rawk_cache=None, beta_cache=None, out=out,
            query_start_loc=bounds, ssm_state_indices=slots, replay_indices=slots,
            write_pos=position, cache_base=base, is_flush=flags, max_cache_len=ring,
            max_spec_len=tokens, use_qk_l2norm_in_kernel=False, null_block_id=-1,
            launch_mode="verify",
        )  # fmt: skip

    # The ring is empty of values and has no decay: rows of zeros beside the state.
    o_true, _ = inputs.truth(inputs.nothing, inputs.chain)
    return Candidate(launch, {"o": relative_error(launch(0).view(o_true.shape), o_true)})
