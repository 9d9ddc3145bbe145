"""Multiply an attention's output by the sigmoid of its gate, in one Triton kernel.

The work is that of `output_gate_ref`. A program owns some columns of one row.

Shape letters: M rows, X columns of all heads.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.shared_memory import match_neighbours

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _output_gate_kernel(
    # pointers
    gate_ptr, out_ptr,
    # sizes
    num_columns,
    # strides
    stride_gate_m,
    # meta
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns_X = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns_X < num_columns
    wait_for_previous(PDL)
    gate_X = tl.load(gate_ptr + row * stride_gate_m + columns_X, mask=valid, other=0.0)
    out_ptrs = out_ptr + row * num_columns + columns_X
    out_X = tl.load(out_ptrs, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptrs, out_X / (1.0 + tl.exp(-gate_X.to(tl.float32))), mask=valid)


def gate_output(gate_MX: Tensor, out_MX: Tensor) -> None:
    """Multiply `out_MX` by sigmoid(`gate_MX`), in place; rows of the gate may be apart.

    The contract is that of `output_gate_ref.gate_output`, in one dtype of `FLOATS`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    require_dtypes("the gate and the output", (gate_MX, out_MX), FLOATS)
    require_packed("a row of the gate", (gate_MX,), 1)
    require_packed("the output", (out_MX,), 2)
    if gate_MX.shape != out_MX.shape:
        raise ValueError(
            f"an output has a gate for each value, got {tuple(gate_MX.shape)} for "
            f"{tuple(out_MX.shape)}; pass one layer's"
        )
    num_rows, num_columns = out_MX.shape
    kernel = _output_gate_kernel[num_rows, triton.cdiv(num_columns, BLOCK)](
        gate_MX, out_MX, num_columns, gate_MX.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
        num_stages=1, **launch_options(out_MX.device),
    )  # fmt: skip
    match_neighbours(kernel, out_MX.device, num_rows)
