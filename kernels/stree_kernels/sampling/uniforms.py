"""Uniform numbers that depend on a seed and a position alone, in one Triton kernel.

The work is that of `uniforms_ref`, bit for bit. One program owns a block of one row's numbers.

Shape letters: B batch, N rows of numbers of a sequence, X numbers of a row.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import require_dtypes, require_packed
from stree_kernels.sampling.uniforms_ref import check_stream

BLOCK = 1024
"""Numbers that a program makes at most: eight for each of its threads."""
NUM_WARPS = 4


@triton.jit
def uniform_number(seed, x, n, step, stream):
    """Return the numbers at some positions; all but the 64-bit seed are 32-bit words."""
    word, _, _, _ = tl.philox(seed, x, n, step, stream)
    # Signed numbers of 24 bits, exact in float32.
    coarse = (word >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))
    fine = (word & 0xFFFFFF).to(tl.int32).to(tl.float32) * (1.0 / (1 << 32))
    return tl.where((word >> 24) == 0, fine, coarse)


@triton.jit(do_not_specialize=["stream"])
def _fill_uniforms_kernel(
    # pointers
    seed_ptr, step_ptr, out_ptr,
    # sizes
    batch, num_columns, stream,
    # meta
    BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sequence = row % batch
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    # The step is written by an earlier kernel, and the output may still be read by one.
    wait_for_previous(PDL)
    seed = tl.load(seed_ptr + sequence)
    step = tl.load(step_ptr + sequence).to(tl.int32)
    number = uniform_number(seed, x, row // batch, step, stream)
    tl.store(out_ptr + row.to(tl.int64) * num_columns + x, number, mask=x < num_columns)


def fill_uniforms(seed_B: Tensor, step_B: Tensor, out_NBX: Tensor, *, stream: int) -> None:
    """Write a number in [0, 1) to every element of `out_NBX`, which is float32 and packed.

    The contract is that of `uniforms_ref.fill_uniforms`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    check_stream(stream)
    require_dtypes("seeds and steps", (seed_B, step_B), (torch.int64,))
    require_dtypes("uniform numbers", (out_NBX,), (torch.float32,))
    require_packed("seeds or steps", (seed_B, step_B), 1)
    require_packed("the uniform numbers", (out_NBX,), 3)
    num_rows, batch, num_columns = out_NBX.shape
    if seed_B.shape != (batch,) or step_B.shape != (batch,):
        raise ValueError(
            f"a batch of {batch} takes one seed and one step each, got "
            f"{tuple(seed_B.shape)} and {tuple(step_B.shape)}; pass buffers of one batch"
        )
    block = min(BLOCK, triton.next_power_of_2(num_columns))
    _fill_uniforms_kernel[num_rows * batch, triton.cdiv(num_columns, block)](
        # The same 32 bits as a signed number: a larger argument would have another type.
        seed_B, step_B, out_NBX, batch, num_columns, stream - (stream >> 31 << 32),
        BLOCK_X=block, num_warps=NUM_WARPS, **launch_options(out_NBX.device),
    )  # fmt: skip
