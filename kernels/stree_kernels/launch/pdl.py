"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs.

Every kernel calls `wait_for_previous` once, before it touches memory that an earlier kernel may
still write, and before it writes what an earlier kernel may still read. Its wait ends when the
kernel before it has ended, whose own wait was over then: all earlier ones have ended too.

Most kernels let their successor start when their own wait is over; the conv, the scan and short
projections let it start at once (`release_next`). So a kernel may run beside several before it, but
never beside one from before the start of its pass: `start_residual` and `join_rows` release after
their wait. What a conv or a scan loads or stores before its wait must not be touched by any other
kernel of the same pass; what a kernel behind a streamed projection loads before its wait, by that
projection.
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
    if capability(device) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def capability(device: torch.device) -> int:
    """Return the compute capability of `device`, 90 for 9.0; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
