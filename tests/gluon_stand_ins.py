"""Stand-ins for Gluon's functions, which run the kernels of both `stream_kernel`s on the CPU.

A bulk copy may land at any time between its start and the wait for its barrier, and a product may
read its tiles at any time until the wait for it. `eager` copies and lazy products find a slot that
is filled too early; lazy copies and eager products one that is read too early.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.fp8 import stream_kernel as fp8_module
from stree_kernels.fp8.scaled_weight import CODES
from stree_kernels.fp8.stream_plan import CODE_BOX_K
from stree_kernels.linear import stream_kernel as module
from stree_kernels.linear.stream_plan import BOX_K, TILE_N

KERNELS = (module.stream_kernel, fp8_module.fp8_stream_kernel)
VALUES = torch.arange(256, dtype=torch.uint8).view(CODES).double()


class Pointer:
    """A pointer, or a tensor of them, into a flat tensor."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)


class Tile:
    """A view of shared memory from an element on, its rows behind each other.

    Rows longer than `width`, the columns of a bulk copy, are cut: all first parts come first.
    """

    def __init__(
        self, memory: Tensor, shape: list[int], width: int, offset: int = 0, flip: bool = False
    ) -> None:
        self.memory, self.shape, self.layout = memory, shape, width
        self.offset, self.flip, self.dtype = offset, flip, None

    def index(self, at: Any) -> Tile:
        assert 0 <= int(at) < self.shape[0], "outside the allocation"
        rows, columns = self.shape[1:]
        return Tile(
            self.memory, [rows, columns], self.layout, self.offset + int(at) * rows * columns
        )

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Tile:
        return Tile(self.memory, shape, self.layout, self.offset)

    def permute(self, order: tuple[int, int]) -> Tile:
        return Tile(self.memory, self.shape, self.layout, self.offset, flip=True)

    def _parts(self) -> Tensor:
        """Return the memory as [rows of all boxes, parts, columns of a part]."""
        columns, size = self.shape[-1], math.prod(self.shape)
        assert self.offset + size <= len(self.memory), "beyond the allocation"
        memory = self.memory[self.offset : self.offset + size]
        width = min(columns, self.layout)
        return memory.view(columns // width, size // columns, width).transpose(0, 1)

    def load(self, layout: Any = None) -> Tensor:
        return self._parts().reshape(self.shape).clone()

    def store(self, values: Tensor) -> None:
        parts = self._parts()
        parts.copy_(values.reshape(parts.shape))

    def values(self) -> Tensor:
        tile = self.load()
        return tile.T if self.flip else tile


class Barrier:
    """Expects bytes once a phase; the copies that are on their way."""

    def __init__(self) -> None:
        self.phase, self.expected, self.bytes = 0, 0, 0
        self.copies: list[Callable[[], None]] = []


class Descriptor:
    """A tensor [rows, columns], or of more dimensions, copied in boxes; zeros outside of it."""

    def __init__(self, tensor: Tensor, box: list[int]) -> None:
        self.tensor, self.box = tensor, box

    @classmethod
    def from_tensor(cls, tensor: Tensor, box: list[int], layout: Any) -> Descriptor:
        return cls(tensor, box)

    def read(self, at: Sequence[int]) -> Tensor:
        out = torch.zeros(self.box, dtype=torch.float64)
        ends = zip(at, self.box, strict=True)
        part = self.tensor[tuple(slice(first, first + size) for first, size in ends)]
        out[tuple(slice(size) for size in part.shape)] = part
        return out


class Machine:
    """One program's shared memory, copies and products, under the names the kernel uses."""

    def __init__(self, kernel: Any, pid: int, weight: Descriptor, *, eager: bool) -> None:
        self.kernel, self.pid, self.weight, self.eager = kernel, pid, weight, eager
        self.waited = False
        self.products: list[Callable[[], None]] = []

    def run(self, *args: Any, **meta: Any) -> None:
        """Run the kernel as this program."""
        types.FunctionType(self.kernel.fn.__code__, self.names())(*args, **meta)
        assert not self.products, "a product that nothing waits for"

    def names(self) -> dict[str, Any]:
        """Return what stands for the names of the kernel's module."""

        def nothing(*_: Any, **__: Any) -> None:
            return None

        names = types.SimpleNamespace
        gl = names(
            program_id=lambda _: torch.tensor(self.pid), allocate_shared_memory=self.allocate,
            static_range=range, minimum=minimum, where=lambda chosen, a, b: a if chosen else b,
            arange=lambda a, b, layout: torch.arange(a, b), load=load, store=store,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=torch.float64),
            sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, layout: x,
            reshape=torch.reshape, permute=torch.permute, split=lambda x: x.unbind(-1),
            int64=torch.int64, float32=torch.float64, uint8=torch.uint8, SliceLayout=nothing,
            BlockedLayout=nothing, DotOperandLayout=nothing, NVMMADistributedLayout=nothing,
            NVMMASharedLayout=lambda swizzle, bits, rank: 8 * swizzle // bits,
        )  # fmt: skip
        cuda = names(gdc_wait=self.wait_for_previous, gdc_launch_dependents=nothing)
        replaced = {
            "gl": gl, "tl": names(extra=names(cuda=cuda)), "barrier": nothing,
            "fence_async_shared": nothing, "_BOX_K": BOX_K, "_TILE_N": TILE_N,
            "_STEP_K": CODE_BOX_K, "native_factors": lambda codes, dtype: VALUES[codes.long()],
            "mbarrier": names(
                init=nothing, MBarrierLayout=nothing, expect=self.expect, wait=self.wait
            ),
            "tma": names(async_copy_global_to_shared=self.copy), "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_for_products, "gate": gate, "square_relu": square_relu,
            "scale_factor": lambda total, columns, eps: torch.rsqrt(total / columns + eps),
        }  # fmt: skip
        own = self.kernel.fn.__globals__
        scope = {**own, **replaced}
        for name, value in own.items():
            if hasattr(value, "fn") and name not in replaced:
                scope[name] = types.FunctionType(value.fn.__code__, scope, name)
        return scope

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype is torch.int64:
            bars = [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=lambda at: bars[int(at)])
        rows = shape[0] * shape[1] * shape[2]
        # Codes are looked up: what is not a number has none.
        unset = 255.0 if dtype is torch.uint8 else torch.nan
        return Tile(torch.full((rows,), unset, dtype=torch.float64), shape, layout)

    def wait_for_previous(self) -> None:
        self.waited = True

    def expect(self, bar: Barrier, num_bytes: int, pred: Any = True) -> None:
        if pred:
            assert not bar.expected, "a slot is filled before it was read"
            bar.expected = num_bytes

    def copy(self, source: Descriptor, at: list[Any], bar: Barrier, to: Tile, pred: Any) -> None:
        if not pred:
            return
        assert self.waited or source is self.weight, "read before the wait"
        first = [int(index) for index in at]
        assert to.shape == source.box

        def land() -> None:
            to.store(source.read(first))

        bar.bytes += source.tensor.element_size() * math.prod(source.box)
        if self.eager:
            land()
        else:
            bar.copies.append(land)

    def wait(self, bar: Barrier, parity: Any) -> None:
        assert bar.expected == bar.bytes > 0, "a wait that would not end"
        assert int(parity) == bar.phase % 2, "a wait for another phase"
        for land in bar.copies:
            land()
        bar.phase, bar.expected, bar.bytes, bar.copies = bar.phase + 1, 0, 0, []

    def multiply(
        self, a: Tile | Tensor, b: Tile, acc: Tensor, is_async: bool, use_acc: bool = True
    ) -> Tensor:  # fmt: skip
        def product() -> None:
            first = a if isinstance(a, Tensor) else a.values()
            acc.copy_(first @ b.values() + (acc if use_acc else 0))

        if self.eager:
            self.products.append(product)
        else:
            product()
        return acc

    def wait_for_products(self, num_outstanding: int, deps: tuple[Tensor, ...]) -> Any:
        while len(self.products) > num_outstanding:
            self.products.pop(0)()
        return deps if len(deps) > 1 else deps[0]


def minimum(a: Any, b: Any) -> Any:
    """The smaller one of two numbers, or of each of a tensor's and a number."""
    return a.clamp(max=b) if isinstance(a, Tensor) and a.ndim else min(a, b)


def load(ptr: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    """Read where the mask says so."""
    if mask is None:
        return ptr.memory[ptr.offset].double()
    offset, mask = torch.broadcast_tensors(ptr.offset, mask)
    values = ptr.memory[torch.where(mask, offset, 0)].double()
    return torch.where(mask, values, other)


def store(ptr: Pointer, value: Tensor, mask: Tensor) -> None:
    """Write where the mask says so; no element twice."""
    offset, mask, value = torch.broadcast_tensors(ptr.offset, mask, value)
    assert len(offset[mask].unique()) == int(mask.sum())
    assert ptr.memory[offset[mask]].isnan().all(), "an element is written twice"
    ptr.memory[offset[mask]] = value[mask].to(ptr.memory.dtype)


def gate(gate_MC: Tensor, up_MC: Tensor, activation: str) -> Tensor:
    """The activation of a gated MLP."""
    factor = functional.silu if activation == "swiglu" else functional.gelu
    return factor(gate_MC) * up_MC


def square_relu(up: Tensor) -> Tensor:
    """The activation of an MLP without a gate."""
    return functional.relu(up).square()


class Launcher:
    """Takes the place of a kernel: all programs of a launch, one after the other."""

    def __init__(self, kernel: Any, *, eager: bool) -> None:
        assert kernel in KERNELS
        self.kernel, self.eager = kernel, eager

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            w_desc: Descriptor, x_desc: Descriptor, *args: Any, num_warps: int, maxnreg: int = 0,
            **meta: Any,
        ) -> None:  # fmt: skip
            # What is a tensor is passed as a pointer.
            pointed = [Pointer(flat(arg)) if isinstance(arg, Tensor) else arg for arg in args]
            for pid in range(grid[0]):
                machine = Machine(self.kernel, pid, w_desc, eager=self.eager)
                machine.run(w_desc, x_desc, *pointed, **{**meta, "PDL": True})

        return launch


def flat(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor from its first element to its last one."""
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((size,), (1,), tensor.storage_offset())
