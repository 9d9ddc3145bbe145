"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs.

Every kernel calls `wait_for_previous` once, before it touches memory that an earlier kernel may
still write, and before it writes what an earlier kernel may still read. A projection lets its
successor start when its own wait is over; the conv and the scan, which follow it, let theirs start
at once (`release_next`). So no kernel runs beside one from before the last projection, and what it
loads before its wait must not be written by that projection or a kernel since.
Source: CUDA programming guide, programmatic dependent launch (compute capability 9.0 and later).
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def release_next(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel's writes are visible, then let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device) -> dict[str, bool]:
    """Return the arguments, PDL among them, that a launch on `device` takes."""
    return dict(_options(device.type, device.index))


@functools.cache
def _options(device_type: str, index: int | None) -> tuple[tuple[str, bool], ...]:
    if device_type == "cuda" and torch.cuda.get_device_capability(index) >= (9, 0):
        return (("PDL", True), ("launch_pdl", True))
    return (("PDL", False),)
