"""What a model remembers between passes: states, buffered rows, keys, values, two blocks' rows.

Shape letters: B slots, R rows of a block, S committed positions, L path capacity, E columns of a
row after the conv (x, B, C, dt; of a delta layer q, k, v), X fp32 columns of a delta layer's row
(u, log decay, beta), others as in stree_kernels.launch.rows. Row buffers are time-major
(R, B, ...), so that a range of rows is contiguous. Two sets of row buffers take turns: a pass reads
the accepted rows of the previous step's set while it fills its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stree_core.families import AttentionShape, DeltaShape, Mamba2Shape, ModelShape
from stree_kernels.attention.rope_kv_write_ref import KeyValues
from stree_kernels.delta.delta_conv_ref import DeltaConvOutput, DeltaProjection
from stree_kernels.delta.rows import DeltaRows, DeltaTokens
from stree_kernels.launch.rows import MAX_BUFFERED, Pending, ScanRows


class RowSet(NamedTuple):
    """Views of one set's rows, made once: `start` is its first among the rows after the conv.

    Rows enter the conv with dt behind its channels, and leave it so; the scan reads parts of them.
    """

    start: int
    conv_inputs_BRE: Tensor
    conv_outputs_BRE: Tensor
    scan_rows: ScanRows
    c_BRGN: Tensor


@dataclass(frozen=True, slots=True)
class Mamba2Cache:
    """One Mamba2 mixer: committed states, per set the projected rows, and the conv's rows.

    `rows_RBE` begins with the MAX_BUFFERED buffered rows; the rows of both sets follow. `sets` and
    `all_rows` are views.
    """

    conv_BCK: Tensor
    ssm_BHPN: Tensor
    proj_RB: tuple[Tensor, Tensor]
    rows_RBE: Tensor
    sets: tuple[RowSet, RowSet]
    all_rows: ScanRows


class DeltaSet(NamedTuple):
    """Views of one set's rows of a delta layer; `start` is its first among all rows."""

    start: int
    inputs: DeltaProjection
    outputs: DeltaConvOutput
    scan_rows: DeltaRows
    tokens: DeltaTokens


@dataclass(frozen=True, slots=True)
class DeltaCache:
    """One gated delta rule mixer: as a Mamba2 mixer's, with what its scan solves for beside.

    `rows_RBE` and `solved_RBX` (fp32) begin with the MAX_BUFFERED buffered rows.
    """

    conv_BCK: Tensor
    state_BHPN: Tensor
    proj_RB: tuple[Tensor, Tensor]
    rows_RBE: Tensor
    solved_RBX: Tensor
    sets: tuple[DeltaSet, DeltaSet]
    all_rows: DeltaRows


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """One attention mixer: committed keys and values [B, S, ...], and rows per set [R, B, ...]."""

    committed: KeyValues
    rows: tuple[KeyValues, KeyValues]


LayerCache = Mamba2Cache | DeltaCache | AttentionCache | None


@dataclass(slots=True)
class Cache:
    """All of a model's memory for B slots; one layer for each part, in order.

    `pending` is the accepted path of the previous step, which the next committing pass applies;
    `committed_B` counts the tokens that are committed once it is. `current` says which row set the
    running step fills.

    An MTP head's has `features_RBD`: the target's hidden state at the token before the root, then
    what the head made of each of its own rows.
    """

    layers: list[LayerCache]
    pending: Pending
    committed_B: Tensor
    current: int = 0
    features_RBD: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory in all buffers."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def reset(self) -> None:
        """Forget everything: as new."""
        for tensor in self._tensors():
            tensor.zero_()
        self.current = 0

    def _tensors(self) -> list[Tensor]:
        tensors = [self.committed_B, *self.pending]
        if self.features_RBD is not None:
            tensors.append(self.features_RBD)
        for layer in self.layers:
            tensors += _tensors(layer)
        return tensors

    def flip(self) -> None:
        """End a step: its rows become the previous ones."""
        self.current = 1 - self.current

    def hold(self, slot: int, num_tokens: int) -> None:
        """Say that a slot's states, keys and values are of so many tokens, nothing pending."""
        # Assigning numbers would wait for the step under way.
        self.committed_B[slot].fill_(num_tokens)
        for table in self.pending:
            table[slot].zero_()

    def forget(self, slot: int) -> None:
        """Make a slot as new: it holds no tokens."""
        self.hold(slot, 0)
        for layer in self.layers:
            if isinstance(layer, Mamba2Cache):
                layer.conv_BCK[slot].zero_()
                layer.ssm_BHPN[slot].zero_()
            elif isinstance(layer, DeltaCache):
                layer.conv_BCK[slot].zero_()
                layer.state_BHPN[slot].zero_()


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a cache must hold: slots, rows of a block, entries of a path, committed positions."""

    num_slots: int
    num_rows: int
    path_capacity: int
    num_positions: int


def make_cache(
    shape: ModelShape, size: CacheSize, dtype: torch.dtype, device: torch.device
) -> Cache:
    """Allocate an empty cache; scans' states are fp32, or float64 when `dtype` is."""
    layers: list[LayerCache] = []
    for part in shape.parts:
        if isinstance(part.mixer, Mamba2Shape):
            layers.append(_mamba2_cache(part.mixer, size, dtype, device))
        elif isinstance(part.mixer, DeltaShape):
            layers.append(_delta_cache(part.mixer, size, dtype, device))
        elif isinstance(part.mixer, AttentionShape):
            layers.append(_attention_cache(part.mixer, size, dtype, device))
        else:
            layers.append(None)
    slots = size.num_slots
    pending = Pending(
        torch.zeros(slots, size.path_capacity, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
    )
    return Cache(layers, pending, torch.zeros(slots, dtype=torch.int32, device=device))


def _mamba2_cache(
    m: Mamba2Shape, size: CacheSize, dtype: torch.dtype, device: torch.device
) -> Mamba2Cache:
    slots, rows = size.num_slots, size.num_rows
    state_dtype = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    proj_RB = (zeros(rows, slots, m.proj_dim), zeros(rows, slots, m.proj_dim))
    rows_RBE = zeros(MAX_BUFFERED + 2 * rows, slots, m.conv_dim + m.num_heads)
    first, second = (_row_set(m, proj_RB[which], rows_RBE, which) for which in (0, 1))
    return Mamba2Cache(
        zeros(slots, m.conv_dim, m.conv_width - 1),
        zeros(slots, m.num_heads, m.head_dim, m.state_dim, dtype=state_dtype),
        proj_RB,
        rows_RBE,
        (first, second),
        _scan_rows(m, rows_RBE.transpose(0, 1)),
    )


def _row_set(m: Mamba2Shape, proj_RBX: Tensor, rows_RBE: Tensor, which: int) -> RowSet:
    start = MAX_BUFFERED + which * len(proj_RBX)
    outputs_BRE = rows_RBE[start : start + len(proj_RBX)].transpose(0, 1)
    *_, c, _ = outputs_BRE.split((*m.conv_sections, m.num_heads), dim=-1)
    return RowSet(
        start,
        proj_RBX[..., m.inner_dim :].transpose(0, 1),
        outputs_BRE,
        _scan_rows(m, outputs_BRE),
        c.unflatten(-1, (m.num_c_groups, m.state_dim)),
    )


def _scan_rows(m: Mamba2Shape, rows_BRE: Tensor) -> ScanRows:
    x, b, _, dt = rows_BRE.split((*m.conv_sections, m.num_heads), dim=-1)
    return ScanRows(
        x.unflatten(-1, (m.num_x_heads, m.head_dim)),
        dt,
        b.unflatten(-1, (m.num_b_groups, m.state_dim)),
    )


def _delta_cache(
    m: DeltaShape, size: CacheSize, dtype: torch.dtype, device: torch.device
) -> DeltaCache:
    slots, rows = size.num_slots, size.num_rows
    wide = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    proj_RB = (zeros(rows, slots, m.proj_dim), zeros(rows, slots, m.proj_dim))
    rows_RBE = zeros(MAX_BUFFERED + 2 * rows, slots, m.conv_dim)
    solved_RBX = zeros(MAX_BUFFERED + 2 * rows, slots, m.solved_dim, dtype=wide)
    first, second = (_delta_set(m, proj_RB[w], rows_RBE, solved_RBX, w) for w in (0, 1))
    return DeltaCache(
        zeros(slots, m.conv_dim, m.conv_width - 1),
        zeros(slots, m.num_value_heads, m.value_head_dim, m.key_head_dim, dtype=wide),
        proj_RB,
        rows_RBE,
        solved_RBX,
        (first, second),
        _delta_rows(m, rows_RBE, solved_RBX)[0],
    )


def _delta_set(
    m: DeltaShape, proj_RBY: Tensor, rows_RBE: Tensor, solved_RBX: Tensor, which: int
) -> DeltaSet:
    start = MAX_BUFFERED + which * len(proj_RBY)
    here = slice(start, start + len(proj_RBY))
    _, qkv_BRE, *gates = proj_RBY.transpose(0, 1).split(m.proj_sections, dim=-1)
    rows, tokens = _delta_rows(m, rows_RBE[here], solved_RBX[here])
    outputs = DeltaConvOutput(rows_RBE[here].transpose(0, 1), rows.g_BRH, tokens.beta_BTH)
    return DeltaSet(start, DeltaProjection(qkv_BRE, *gates), outputs, rows, tokens)


def _delta_rows(
    m: DeltaShape, rows_RBE: Tensor, solved_RBX: Tensor
) -> tuple[DeltaRows, DeltaTokens]:
    """Return views of what is replayed and of what else a scan reads."""
    q, k, v = rows_RBE.transpose(0, 1).split(m.conv_sections, dim=-1)
    num_heads, keys = m.num_value_heads, (m.num_key_heads, m.key_head_dim)
    sections = (m.inner_dim, num_heads, num_heads)
    u, g_BRH, beta_BRH = solved_RBX.transpose(0, 1).split(sections, dim=-1)
    u_BRHP, v_BRHP = (x.unflatten(-1, (num_heads, m.value_head_dim)) for x in (u, v))
    q_BRGN, k_BRGN = (x.unflatten(-1, keys) for x in (q, k))
    return DeltaRows(u_BRHP, k_BRGN, g_BRH), DeltaTokens(q_BRGN, v_BRHP, beta_BRH)


def _attention_cache(
    a: AttentionShape, size: CacheSize, dtype: torch.dtype, device: torch.device
) -> AttentionCache:
    heads = (a.num_kv_heads, a.row_dim)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    def pair(*leading: int) -> KeyValues:
        return KeyValues(zeros(*leading, *heads), zeros(*leading, *heads))

    # The last step may append a whole path behind the last position that is asked for.
    positions = size.num_positions + size.path_capacity
    rows = (size.num_rows, size.num_slots)
    return AttentionCache(pair(size.num_slots, positions), (pair(*rows), pair(*rows)))


def _tensors(layer: LayerCache) -> list[Tensor]:
    if isinstance(layer, Mamba2Cache):
        return [layer.conv_BCK, layer.ssm_BHPN, *layer.proj_RB, layer.rows_RBE]
    if isinstance(layer, DeltaCache):
        return [
            layer.conv_BCK, layer.state_BHPN, *layer.proj_RB, layer.rows_RBE, layer.solved_RBX
        ]  # fmt: skip
    if isinstance(layer, AttentionCache):
        return [*layer.committed, *layer.rows[0], *layer.rows[1]]
    return []
