"""The scan of one layer by each implementation: checked against float64, then ready to be timed.

Shape letters: B batch, T tokens of the tree, L a leaf's path, S sequences that leaves become,
H heads, P head dim, N state dim, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_shapes import PHASES, flushing, leaf_paths
from layer_data import UNLIMITED, LayerInputs, RepeatedRows, relative_error
from torch import Tensor

from stree_kernels.launch.rows import Pending

# Bytes that a peer's states per node or per leaf may take; calls share them where all do not fit.
MAX_SCRATCH_BYTES = 24 << 30
# The least that mamba-ssm's matrix products take.
MIN_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """What call i launches, and the relative errors of its results by name.

    `state_sets` counts the sets of states per node or per leaf that its calls take turns on; after
    `cycle` calls what they do repeats.
    """

    launch: Callable[[int], object]
    errors: dict[str, float]
    state_sets: int = 0
    cycle: int = PHASES


def ours(inputs: LayerInputs, op: Callable[..., None]) -> Candidate:
    """Commit accepted rows and scan in one launch, in the phases of a running decoder."""
    return _ours(inputs, op, inputs.phases)


def ours_storing(inputs: LayerInputs, op: Callable[..., None]) -> Candidate:
    """The same in the phase that comes every few calls: the state is advanced and stored."""
    return _ours(inputs, op, [flushing(inputs.phases)])


def _ours(inputs: LayerInputs, op: Callable[..., None], phases: list[Pending]) -> Candidate:
    def launch(call: int, state: Tensor | None = None) -> None:
        buffer = inputs.buffers[call % len(inputs.buffers)]
        op(
            buffer.state_BHPN if state is None else state, buffer.rows, buffer.c_BTGN,
            inputs.block.mask_RR, inputs.heads, first=0, dt_limit=UNLIMITED,
            out_BTHP=buffer.out_BTHP, gate=None,
            past=inputs.past(buffer, phases[call % len(phases)]),
        )  # fmt: skip

    y_true, state_true = inputs.truth(phases[0])
    buffer = inputs.buffers[0]
    state = buffer.state_BHPN.clone()
    buffer.out_BTHP.fill_(torch.nan)
    launch(0, state)
    y_error = relative_error(buffer.out_BTHP, y_true)
    return Candidate(launch, {"y": y_error, "state": relative_error(state, state_true)})


def one_token(inputs: LayerInputs, op: Callable[..., Tensor]) -> Candidate:
    """mamba-ssm's `selective_state_update`: the first row alone, fp32 state, no tree."""
    constants = _expanded_heads(inputs)

    def launch(call: int, state: Tensor | None = None) -> Tensor:
        which = call % len(inputs.buffers)
        rows = firsts[which]
        return op(
            inputs.buffers[which].state_BHPN if state is None else state, rows.x_BTHP[:, 0],
            _per_dim(rows.dt_BTH, inputs)[:, 0], constants[0], rows.b_BTGN[:, 0],
            rows.c_BTGN[:, 0], constants[1], dt_bias=constants[2], dt_softplus=True,
        )  # fmt: skip

    firsts = [_first_row(rows) for rows in inputs.repeated]
    state = inputs.buffers[0].state_BHPN.clone()
    y_error = relative_error(launch(0, state), inputs.scored[:, 0])
    return Candidate(launch, {"y": y_error})


def sglang(inputs: LayerInputs, op: Callable[..., None]) -> Candidate:
    """SGLang's tree verification: one state per node, the committed one left alone.

    Its commit, a later copy of the accepted node's state, is not part of the call.
    """
    device, batch = inputs.device, inputs.batch
    num_scratch = _affordable(inputs, batch * inputs.tokens)
    state_size = inputs.buffers[0].state_BHPN.shape[1:]
    scratch = [
        torch.empty(batch, inputs.tokens, *state_size, device=device) for _ in range(num_scratch)
    ]
    a, skip, dt_bias = _expanded_heads(inputs)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    parents = torch.tensor(inputs.parents, dtype=torch.int32, device=device).repeat(batch, 1)
    outs = [torch.full_like(rows.x_BTHP, torch.nan) for rows in inputs.repeated]

    def launch(call: int) -> Tensor:
        which = call % len(inputs.buffers)
        rows = inputs.repeated[which]
        op(
            inputs.buffers[which].state_BHPN, rows.x_BTHP, _per_dim(rows.dt_BTH, inputs), a,
            rows.b_BTGN, rows.c_BTGN, skip, z=None, dt_bias=dt_bias, dt_softplus=True,
            state_batch_indices=slots, out=outs[which], disable_state_update=True,
            intermediate_states_buffer=scratch[call % num_scratch], cache_steps=inputs.tokens,
            retrieve_parent_token=parents, intermediate_state_indices=slots,
        )  # fmt: skip
        return outs[which]

    return Candidate(launch, {"y": relative_error(launch(0), inputs.scored)}, num_scratch)


def chunk_scan(inputs: LayerInputs, op: Callable[..., Tensor]) -> Candidate:
    """mamba-ssm's chunk scan with every root-to-leaf path as a sequence of its own.

    Rows and states are unrolled beforehand, and no state is advanced: neither is part of the call.
    """
    paths = leaf_paths(inputs.parents)
    longest = max(map(len, paths))
    # A shorter path is filled up with its leaf, whose further outputs nobody reads.
    index_SL = torch.tensor(
        [path + path[-1:] * (longest - len(path)) for path in paths], device=inputs.device
    )
    unrolled = [_unroll(rows, index_SL) for rows in inputs.repeated]
    num_states = _affordable(inputs, inputs.batch * len(paths))
    states = [
        buffer.state_BHPN.repeat_interleave(len(paths), dim=0)
        for buffer in inputs.buffers[:num_states]
    ]
    chunk = max(MIN_CHUNK, 1 << (longest - 1).bit_length())
    heads = inputs.heads

    def launch(call: int) -> Tensor:
        rows = unrolled[call % len(unrolled)]
        return op(
            rows.x_BTHP, rows.dt_BTH, heads.a_H, rows.b_BTGN, rows.c_BTGN, chunk, D=heads.d_H,
            dt_bias=heads.dt_bias_H, initial_states=states[call % num_states],
            dt_softplus=True,
        )  # fmt: skip

    y_SLHP = launch(0).unflatten(0, (inputs.batch, len(paths)))
    y_true = inputs.scored[:, index_SL]
    kept = torch.zeros_like(index_SL, dtype=torch.bool)
    for row, path in enumerate(paths):
        kept[row, : len(path)] = True
    error = relative_error(y_SLHP[:, kept], y_true[:, kept])
    return Candidate(launch, {"y": error}, num_states)


def _affordable(inputs: LayerInputs, num_states: int) -> int:
    """Return how many sets of `num_states` states to allocate: one for each buffer if they fit."""
    set_bytes = num_states * inputs.shape.state_bytes
    return max(1, min(len(inputs.buffers), MAX_SCRATCH_BYTES // set_bytes))


def _expanded_heads(inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, D and the bias of dt as peers take one value per head: expanded, with stride 0."""
    size = (inputs.shape.num_heads, inputs.shape.head_dim)
    a, skip, dt_bias = inputs.heads
    expanded_a = a[:, None, None].expand(*size, inputs.shape.state_dim)
    return expanded_a, skip[:, None].expand(size), dt_bias[:, None].expand(size)


def _per_dim(dt_BTH: Tensor, inputs: LayerInputs) -> Tensor:
    return dt_BTH[..., None].expand(*dt_BTH.shape, inputs.shape.head_dim)


def _first_row(rows: RepeatedRows) -> RepeatedRows:
    return RepeatedRows(
        rows.x_BTHP[:, :1].contiguous(), rows.dt_BTH[:, :1].contiguous(),
        rows.b_BTGN[:, :1].contiguous(), rows.c_BTGN[:, :1].contiguous(),
    )  # fmt: skip


def _unroll(rows: RepeatedRows, index_SL: Tensor) -> RepeatedRows:
    """Return rows [B * S, L, ...]: every path of every sequence."""

    def gather(tensor: Tensor) -> Tensor:
        return tensor[:, index_SL].flatten(0, 1)

    return RepeatedRows(
        gather(rows.x_BTHP), gather(rows.dt_BTH), gather(rows.b_BTGN), gather(rows.c_BTGN)
    )
