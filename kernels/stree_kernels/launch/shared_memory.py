"""How a multiprocessor's memory is split between L1 cache and shared memory while a kernel runs.

A kernel that says nothing runs with the split that it finds: its time then depends on what ran
before it, another engine's kernels among them. One that streams a weight through registers wants
cache, where its loads are under way; one that keeps tiles wants shared memory for all programs that
a multiprocessor could run at once. Programs of neighbours overlap only where the split suits both.
Source: CUDA driver API, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from stree_kernels.launch.pdl import capability

MEASURED_CAPABILITY = 90
"""What is preferred is known from there alone; elsewhere the driver decides."""

NEIGHBOURS_PERCENT = 58
"""What a multiprocessor full of the scan's programs takes on an H200: 132 of 228 KiB."""
STREAMED_ROWS = range(2, 65)
LEAST_ONE_TOKEN_ROWS = 9
"""With one token a slot fewer rows are faster without a ring, on an H200 with 8 slots."""
NARROW, NARROW_ROWS = 2048, 16
"""Columns of the input, and rows, below which a weight ends before a ring would pay."""
H200_MULTIPROCESSORS = 132
_PREFERRED_CARVEOUT = 9
_REGISTERS, _RESERVED_BYTES = 1 << 16, 1024
_preferred: dict[int, int] = {}


def prefer_cache(kernel: Any, device: torch.device) -> None:
    """Let later launches of a compiled kernel find as much cache as its own shared memory allows.

    `kernel` is what a launch returned; nothing happens where kernels are interpreted.
    """
    if capability(device) == MEASURED_CAPABILITY:
        _prefer(kernel.function, 0)


def is_streamed(num_rows: int, num_columns: int, *, one_token: bool = False) -> bool:
    """Say whether weights of `num_columns` pass through a ring in shared memory for these rows.

    With `one_token` every row is another slot's.

    All kernels of such a pass ask for the largest carveout: what the rings leave of it lets the
    next kernel start early.
    """
    least = LEAST_ONE_TOKEN_ROWS if one_token else STREAMED_ROWS.start
    wide = num_columns >= NARROW or num_rows > NARROW_ROWS
    return least <= num_rows < STREAMED_ROWS.stop and wide


def prefer_shared(
    kernel: Any, device: torch.device, num_programs: int, *, streamed: bool = False
) -> None:
    """Let later launches of `num_programs` find shared memory for a multiprocessor's part of them.

    That is for no more than its registers allow at once, what remains is cache; in a pass whose
    weights are `streamed` it is all.
    `kernel` is what a launch returned; nothing happens where kernels are interpreted.
    """
    if capability(device) != MEASURED_CAPABILITY:
        return
    threads = 32 * kernel.metadata.num_warps
    by_registers = max(1, _REGISTERS // (max(1, kernel.n_regs) * threads))
    properties = _properties(device)
    at_once = min(by_registers, -(-num_programs // properties.multi_processor_count))
    needed = at_once * (kernel.metadata.shared + _RESERVED_BYTES)
    percent = -(-100 * needed // properties.shared_memory_per_multiprocessor)
    _prefer(kernel.function, 100 if streamed else min(100, percent))


def match_neighbours(
    kernel: Any, device: torch.device, num_rows: int, num_columns: int = NARROW, *,
    one_token: bool = False,
) -> None:  # fmt: skip
    """Let later launches of a kernel on `num_rows` find the carveout of those before and after it.

    `num_columns` and `one_token` are as in `is_streamed`. The kernel needs little of either. With
    one row every neighbour streams through registers; with more, projections keep rings or the scan
    keeps tiles.
    Nothing happens where kernels are interpreted.
    """
    if capability(device) != MEASURED_CAPABILITY:
        return
    streamed = is_streamed(num_rows, num_columns, one_token=one_token)
    many = 100 if streamed else NEIGHBOURS_PERCENT
    _prefer(kernel.function, 0 if num_rows == 1 else many)


def num_multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of `device`, an H200's where kernels are only compiled."""
    if device.type != "cuda":
        return H200_MULTIPROCESSORS
    count: int = _properties(device).multi_processor_count
    return count


def _prefer(function: int, percent: int) -> None:
    """Set the share of shared memory that a function prefers, unless it does already."""
    if _preferred.get(function) == percent:
        return
    code = _driver().cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, percent)
    if code:
        raise RuntimeError(f"CUDA driver error {code} while preferring {percent} % shared memory")
    _preferred[function] = percent


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)
