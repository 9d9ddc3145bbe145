"""What a model remembers between passes: states, keys and values, the last two blocks' rows.

Shape letters: B slots, R rows of a block, S committed positions, L path capacity, others as in
stree_kernels.rows. Row buffers are time-major (R, B, ...), so that a range of rows is contiguous.
Two sets of row buffers take turns: a pass replays the previous step's set while it fills its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.model_shape import AttentionShape, Mamba2Shape, ModelShape
from stree_kernels.rows import Pending, ScanRows

KEY_MULTIPLE = 16
"""Attention over a multiple of this many keys needs no padded copy of the mask."""


@dataclass(frozen=True, slots=True)
class Mamba2Cache:
    """One Mamba2 mixer: committed state, and per set the rows before and after the conv."""

    shape: Mamba2Shape
    conv_BCK: Tensor
    ssm_BHPN: Tensor
    proj_RB: tuple[Tensor, Tensor]
    conv_RBC: tuple[Tensor, Tensor]

    def conv_inputs_BRC(self, which: int) -> Tensor:
        """Return the rows that enter the conv."""
        inner = self.shape.inner_dim
        inputs_RBC: Tensor = self.proj_RB[which][..., inner : inner + self.shape.conv_dim]
        return inputs_RBC.transpose(0, 1)

    def scan_rows(self, which: int) -> ScanRows:
        """Return the rows that enter the scan."""
        s = self.shape
        conv = self.conv_RBC[which].transpose(0, 1)
        b_end = s.inner_dim + s.num_groups * s.state_dim
        return ScanRows(
            conv[..., : s.inner_dim].unflatten(-1, (s.num_heads, s.head_dim)),
            self.proj_RB[which][..., s.inner_dim + s.conv_dim :].transpose(0, 1),
            conv[..., s.inner_dim : b_end].unflatten(-1, (s.num_groups, s.state_dim)),
        )

    def c_BRGN(self, which: int) -> Tensor:
        """Return C of every row."""
        s = self.shape
        start = s.inner_dim + s.num_groups * s.state_dim
        conv = self.conv_RBC[which].transpose(0, 1)
        c_BRGN: Tensor = conv[..., start:].unflatten(-1, (s.num_groups, s.state_dim))
        return c_BRGN


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """One attention mixer: committed keys and values, and rows per set."""

    key_BSHD: Tensor
    value_BSHD: Tensor
    key_RBHD: tuple[Tensor, Tensor]
    value_RBHD: tuple[Tensor, Tensor]


LayerCache = Mamba2Cache | AttentionCache | None


@dataclass(slots=True)
class Cache:
    """All of a model's memory for B slots.

    `pending` is the accepted path of the previous step, which the next committing pass applies;
    `committed_B` counts the tokens in the state once it is applied. `current` says which row set
    the running step fills.
    """

    layers: list[LayerCache]
    pending: Pending
    committed_B: Tensor
    current: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory in all buffers."""
        tensors = [self.committed_B, *self.pending]
        for layer in self.layers:
            tensors += _tensors(layer)
        return sum(t.numel() * t.element_size() for t in tensors)

    def reset(self) -> None:
        """Forget everything: as new."""
        for tensor in [self.committed_B, *self.pending]:
            tensor.zero_()
        for layer in self.layers:
            for tensor in _tensors(layer):
                tensor.zero_()
        self.current = 0

    def flip(self) -> None:
        """End a step: its rows become the previous ones."""
        self.current = 1 - self.current

    def adopt(self, slot: int, other: Cache) -> None:
        """Copy slot 0 of `other`, whose pending path is at most its first row, into `slot`."""
        self.committed_B[slot] = other.committed_B[0]
        self.pending.path_BL[slot] = 0
        self.pending.length_B[slot] = other.pending.length_B[0]
        here, there = 1 - self.current, 1 - other.current
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, Mamba2Cache) and isinstance(theirs, Mamba2Cache):
                mine.conv_BCK[slot] = theirs.conv_BCK[0]
                mine.ssm_BHPN[slot] = theirs.ssm_BHPN[0]
                mine.proj_RB[here][0, slot] = theirs.proj_RB[there][0, 0]
                mine.conv_RBC[here][0, slot] = theirs.conv_RBC[there][0, 0]
            elif isinstance(mine, AttentionCache) and isinstance(theirs, AttentionCache):
                num = min(mine.key_BSHD.shape[1], theirs.key_BSHD.shape[1])
                mine.key_BSHD[slot, :num] = theirs.key_BSHD[0, :num]
                mine.value_BSHD[slot, :num] = theirs.value_BSHD[0, :num]
                mine.key_RBHD[here][0, slot] = theirs.key_RBHD[there][0, 0]
                mine.value_RBHD[here][0, slot] = theirs.value_RBHD[there][0, 0]


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
    """Allocate an empty cache; SSM states are fp32, or float64 when `dtype` is."""
    layers: list[LayerCache] = []
    for block in shape.blocks:
        if isinstance(block.mixer, Mamba2Shape):
            layers.append(_mamba2_cache(block.mixer, size, dtype, device))
        elif isinstance(block.mixer, AttentionShape):
            layers.append(_attention_cache(block.mixer, size, dtype, device))
        else:
            layers.append(None)
    slots = size.num_slots
    pending = Pending(
        torch.zeros(slots, size.path_capacity, dtype=torch.int32, device=device),
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

    return Mamba2Cache(
        m,
        zeros(slots, m.conv_dim, m.conv_width - 1),
        zeros(slots, m.num_heads, m.head_dim, m.state_dim, dtype=state_dtype),
        (zeros(rows, slots, m.proj_dim), zeros(rows, slots, m.proj_dim)),
        (zeros(rows, slots, m.conv_dim), zeros(rows, slots, m.conv_dim)),
    )


def _attention_cache(
    a: AttentionShape, size: CacheSize, dtype: torch.dtype, device: torch.device
) -> AttentionCache:
    heads = (a.num_kv_heads, a.head_dim)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    # A path's unused entries are written behind its valid ones, hence the room for one path; the
    # rest lets a pass see a number of keys that attention kernels need not pad.
    positions = size.num_positions + size.path_capacity
    positions += KEY_MULTIPLE + -positions % KEY_MULTIPLE
    rows = [zeros(size.num_rows, size.num_slots, *heads) for _ in range(4)]
    return AttentionCache(
        zeros(size.num_slots, positions, *heads),
        zeros(size.num_slots, positions, *heads),
        (rows[0], rows[1]),
        (rows[2], rows[3]),
    )


def _tensors(layer: LayerCache) -> list[Tensor]:
    if isinstance(layer, Mamba2Cache):
        return [layer.conv_BCK, layer.ssm_BHPN, *layer.proj_RB, *layer.conv_RBC]
    if isinstance(layer, AttentionCache):
        return [layer.key_BSHD, layer.value_BSHD, *layer.key_RBHD, *layer.value_RBHD]
    return []
