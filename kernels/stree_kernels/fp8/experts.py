"""Mixture-of-experts MLPs of a few rows whose weights are in FP8, in two Triton kernels.

The work is that of `experts_ref`, the kernels' plan that of `linear.experts`: codes become fp32
numbers in registers, and each step of a thread's columns takes the scale of its block.

Shape letters: M rows, C chosen experts of a row, E experts, D columns in and out, F expert inner,
X = 2 F if gated, else F; N rows of a weight, K columns in, R rows of one warp, W warps across the
rows, T threads across the columns.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.fp8.decode import code_values, has_native
from stree_kernels.fp8.rows_kernel import VECTOR
from stree_kernels.fp8.scaled_weight import Projection, ScaledWeight
from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear import experts as tensors
from stree_kernels.linear.device_functions import activate_tile, weight_rows
from stree_kernels.linear.gemv_kernel import GemvConfig

UP_CONFIG = GemvConfig(8, 4, 1, depth=4)
DOWN_CONFIG = GemvConfig(4, 2, 1, depth=4)


@triton.jit
def _half_columns(BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """The columns [K / 2] of a step that are in the first half of a thread's VECTOR."""
    half_K = tl.arange(0, BLOCK_K // 2)
    return half_K // (VECTOR // 2) * VECTOR + half_K % (VECTOR // 2)


@triton.jit
def _multiply_halves(
    codes_NK, first_WK, second_WK, BLOCK_R: tl.constexpr, WARPS_N: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The sums [R, W, T] of a step's codes times both halves of its row."""
    HALF: tl.constexpr = VECTOR // 2
    codes = tl.reshape(codes_NK, [BLOCK_R, WARPS_N, THREADS, 2, HALF])
    first, second = tl.split(tl.permute(codes, (0, 1, 2, 4, 3)))
    first_row = tl.reshape(first_WK, [1, WARPS_N, THREADS, HALF])
    second_row = tl.reshape(second_WK, [1, WARPS_N, THREADS, HALF])
    products = code_values(first, NATIVE) * first_row + code_values(second, NATIVE) * second_row
    return tl.sum(products, axis=3)


@triton.jit
def _load_codes(
    weight_ptr, choice_ptr, rows_N, step,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight's tile of one step; steps go through an expert's columns, then the next one's."""
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    place = step // STEPS
    columns_K = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.load(choice_ptr + place, mask=place < NUM_CHOSEN, other=0).to(tl.int64)
    ptrs = weight_ptr + expert * (NUM_ROWS * INNER) + rows_N[:, None] * INNER + columns_K[None, :]
    valid_K = (columns_K < INNER) & (place < NUM_CHOSEN)
    return tl.load(ptrs, mask=valid_K[None, :], other=0)


@triton.jit
def _load_scales(
    scale_ptr, choice_ptr, rows_RW, step,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
    ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The scales [R, W, T] of a step, one for the columns of each thread."""
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    ROW_GROUPS: tl.constexpr = (NUM_ROWS + ROW_GROUP - 1) // ROW_GROUP
    place = step // STEPS
    expert = tl.load(choice_ptr + place, mask=place < NUM_CHOSEN, other=0).to(tl.int64)
    columns_T = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K // VECTOR) * VECTOR
    groups_RW = expert * ROW_GROUPS + rows_RW // ROW_GROUP
    ptrs = scale_ptr + groups_RW[:, :, None] * BLOCKS + (columns_T // COLUMN_BLOCK)[None, None, :]
    valid_T = (columns_T < INNER) & (place < NUM_CHOSEN)
    return tl.load(ptrs, mask=valid_T[None, None, :], other=0.0)


@triton.jit
def _load_half(
    values_ptr, half_K, step,
    NUM_CHOSEN: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr, WARPS_N: tl.constexpr,
):  # fmt: skip
    """Half the columns [W, K / 2] that a step multiplies, a copy for every warp."""
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    place = step // STEPS
    columns_K = step % STEPS * BLOCK_K + half_K
    ptrs = values_ptr + place * INNER + columns_K[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    valid_K = (columns_K < INNER) & (place < NUM_CHOSEN)
    return tl.load(ptrs, mask=valid_K[None, :], other=0.0)


@triton.jit
def _first_codes(
    weight_ptr, choice_ptr, rows_N,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The tiles of the first DEPTH steps."""
    codes: tl.tuple = ()
    for step in tl.static_range(DEPTH):
        tile = _load_codes(
            weight_ptr, choice_ptr, rows_N, step, NUM_CHOSEN, NUM_ROWS, INNER, BLOCK_K
        )
        codes = codes + (tile,)
    return codes


@triton.jit
def _multiply(
    codes, values_ptr, weight_ptr, scale_ptr, choice_ptr, share_ptr, rows_N, rows_RW,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr,
    ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The products [N] with all chosen experts, times their shares if any, added up.

    `codes` are the tiles of the first steps; the next ones are always under way.
    """
    THREADS: tl.constexpr = WARPS_K * 32
    BLOCK_K: tl.constexpr = THREADS * VECTOR
    BLOCK_R: tl.constexpr = rows_N.shape[0] // WARPS_N
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    HALF: tl.constexpr = VECTOR // 2
    half_K = _half_columns(BLOCK_K, VECTOR)
    acc_RWT = tl.full([BLOCK_R, WARPS_N, THREADS], 0.0, tl.float32)
    for begin in range(0, NUM_CHOSEN * STEPS, DEPTH):
        values: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            at = begin + ahead
            values = values + (
                _load_half(values_ptr, half_K, at, NUM_CHOSEN, INNER, BLOCK_K, WARPS_N),
                _load_half(values_ptr, half_K + HALF, at, NUM_CHOSEN, INNER, BLOCK_K, WARPS_N),
            )
        following: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            step = begin + ahead
            part_RWT = _multiply_halves(
                codes[ahead], values[2 * ahead].to(tl.float32),
                values[2 * ahead + 1].to(tl.float32), BLOCK_R, WARPS_N, THREADS, VECTOR, NATIVE,
            )  # fmt: skip
            part_RWT *= _load_scales(
                scale_ptr, choice_ptr, rows_RW, step, NUM_CHOSEN, NUM_ROWS, INNER, BLOCK_K,
                ROW_GROUP, COLUMN_BLOCK, VECTOR,
            )  # fmt: skip
            if share_ptr is not None:
                place = step // STEPS
                share = tl.load(share_ptr + place, mask=place < NUM_CHOSEN, other=0.0)
                part_RWT *= share.to(tl.float32)
            acc_RWT += part_RWT
            tile = _load_codes(
                weight_ptr, choice_ptr, rows_N, step + DEPTH, NUM_CHOSEN, NUM_ROWS, INNER, BLOCK_K
            )
            following = following + (tile,)
        codes = following
    return tl.reshape(tl.sum(acc_RWT, axis=2), [rows_N.shape[0]])


@triton.jit
def _up_kernel(
    # pointers
    inputs_ptr, choice_ptr, weight_ptr, scale_ptr, inner_ptr,
    # meta
    NUM_CHOSEN: tl.constexpr, NUM_COLUMNS: tl.constexpr, NUM_INNER: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROW_GROUP: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr,
    WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr, NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some inner columns of one row's expert."""
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    BLOCK_R: tl.constexpr = BLOCK_N // WARPS_N
    NUM_ROWS: tl.constexpr = 2 * NUM_INNER if GATED else NUM_INNER
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), block, NUM_INNER, BLOCK_N, GATED)
    # Row n of a program is row n // W of warp n % W.
    tile_RW = tl.arange(0, BLOCK_R)[:, None] * WARPS_N + tl.arange(0, WARPS_N)[None, :]
    rows_RW = weight_rows(tile_RW, block, NUM_INNER, BLOCK_N, GATED)
    wait_for_previous(PDL)
    codes = _first_codes(
        weight_ptr, choice_ptr + pair, rows_N, 1, NUM_ROWS, NUM_COLUMNS, WARPS_K * 32 * VECTOR,
        DEPTH,
    )  # fmt: skip
    acc_N = _multiply(
        codes, inputs_ptr + pair // NUM_CHOSEN * NUM_COLUMNS, weight_ptr, scale_ptr,
        choice_ptr + pair, None, rows_N, rows_RW, 1, NUM_ROWS, NUM_COLUMNS, ROW_GROUP,
        COLUMN_BLOCK, VECTOR, WARPS_N, WARPS_K, DEPTH, NATIVE,
    )  # fmt: skip
    acc_MN = tl.reshape(acc_N, [1, BLOCK_N])
    inner_F = tl.reshape(activate_tile(acc_MN, 1, BLOCK_N, GATED, ACTIVATION), [BLOCK_F])
    columns_F = block * BLOCK_F + tl.arange(0, BLOCK_F)
    ptrs = inner_ptr + pair * NUM_INNER + columns_F
    tl.store(ptrs, inner_F.to(inner_ptr.dtype.element_ty), mask=columns_F < NUM_INNER)


@triton.jit
def _down_kernel(
    # pointers
    inner_ptr, choice_ptr, share_ptr, weight_ptr, scale_ptr, out_ptr,
    # meta
    NUM_CHOSEN: tl.constexpr, NUM_COLUMNS: tl.constexpr, NUM_INNER: tl.constexpr,
    ROW_GROUP: tl.constexpr, COLUMN_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr, WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr,
    NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one row, of all its experts."""
    BLOCK_R: tl.constexpr = BLOCK_N // WARPS_N
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), block, NUM_COLUMNS, BLOCK_N, False)
    tile_RW = tl.arange(0, BLOCK_R)[:, None] * WARPS_N + tl.arange(0, WARPS_N)[None, :]
    rows_RW = weight_rows(tile_RW, block, NUM_COLUMNS, BLOCK_N, False)
    # The choice is older than the first kernel, whose wait is over.
    choice_ptr += row * NUM_CHOSEN
    codes = _first_codes(
        weight_ptr, choice_ptr, rows_N, NUM_CHOSEN, NUM_COLUMNS, NUM_INNER, WARPS_K * 32 * VECTOR,
        DEPTH,
    )  # fmt: skip
    wait_for_previous(PDL)
    acc_N = _multiply(
        codes, inner_ptr + row * NUM_CHOSEN * NUM_INNER, weight_ptr, scale_ptr, choice_ptr,
        share_ptr + row * NUM_CHOSEN, rows_N, rows_RW, NUM_CHOSEN, NUM_COLUMNS, NUM_INNER,
        ROW_GROUP, COLUMN_BLOCK, VECTOR, WARPS_N, WARPS_K, DEPTH, NATIVE,
    )  # fmt: skip
    columns_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = out_ptr + row * NUM_COLUMNS + columns_N
    tl.store(ptrs, acc_N.to(out_ptr.dtype.element_ty), mask=columns_N < NUM_COLUMNS)


def expert_mlps(
    inputs_MD: Tensor, choice_MC: Tensor, share_MC: Tensor, up_EXD: Projection,
    down_EDF: Projection, out_MD: Tensor, *, activation: Activation,
) -> None:  # fmt: skip
    """Write the sum of each row's chosen MLPs (`choice_MC`, int64), times `share_MC`, to `out_MD`.

    The contract is that of `experts_ref.expert_mlps`; both weights are tensors or both are in FP8.
    Experts are not checked: they are below E. Allocates the inner values, in the rows' dtype.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    if isinstance(up_EXD, Tensor) and isinstance(down_EDF, Tensor):
        tensors.expert_mlps(
            inputs_MD, choice_MC, share_MC, up_EXD, down_EDF, out_MD, activation=activation
        )
        return
    if isinstance(up_EXD, Tensor) or isinstance(down_EDF, Tensor):
        raise ValueError(
            "the first and the second weights of experts are in FP8 or neither is, got one of "
            "each; use the torch backend"
        )
    _check(inputs_MD, choice_MC, share_MC, up_EXD, down_EDF, out_MD, activation)
    num_rows, num_chosen = choice_MC.shape
    num_columns, num_inner = down_EDF.shape[1:]
    gated = activation in GATED
    inner = inputs_MD.new_empty(num_rows * num_chosen, num_inner)
    sizes = {
        "NUM_CHOSEN": num_chosen, "NUM_COLUMNS": num_columns, "NUM_INNER": num_inner,
        "VECTOR": VECTOR, "NATIVE": has_native(inputs_MD.device), "num_stages": 1,
        **launch_options(inputs_MD.device),
    }  # fmt: skip
    block_f = UP_CONFIG.block_n // 2 if gated else UP_CONFIG.block_n
    _up_kernel[len(inner), triton.cdiv(num_inner, block_f)](
        inputs_MD, choice_MC, up_EXD.bytes, up_EXD.scales, inner, GATED=gated,
        ACTIVATION=activation, **sizes, **_cut(UP_CONFIG, up_EXD, 1),
    )  # fmt: skip
    _down_kernel[num_rows, triton.cdiv(num_columns, DOWN_CONFIG.block_n)](
        inner, choice_MC, share_MC, down_EDF.bytes, down_EDF.scales, out_MD, **sizes,
        **_cut(DOWN_CONFIG, down_EDF, num_chosen),
    )  # fmt: skip


def _cut(config: GemvConfig, weight: ScaledWeight, num_experts: int) -> dict[str, int]:
    """Return the arguments that a config makes of a weight and a program's experts."""
    block_k = config.warps_k * 32 * VECTOR
    num_steps = num_experts * triton.cdiv(weight.shape[-1], block_k)
    return {
        "ROW_GROUP": weight.row_group, "COLUMN_BLOCK": weight.column_block,
        "BLOCK_N": config.block_n, "WARPS_N": config.warps_n, "WARPS_K": config.warps_k,
        "DEPTH": tensors.steps_ahead(config.depth, num_steps),
        "num_warps": config.warps_n * config.warps_k,
    }  # fmt: skip


def _check(
    inputs: Tensor, choice: Tensor, share: Tensor, up: ScaledWeight, down: ScaledWeight,
    out: Tensor, activation: Activation,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernels cannot take."""
    require_dtypes("the rows", (inputs,), FLOATS)
    require_dtypes("the output", (out,), (inputs.dtype, torch.float32))
    require_dtypes("the chosen experts", (choice,), (torch.int64,))
    require_dtypes("the shares", (share,), FLOATS)
    require_dtypes("the scales", (up.scales, down.scales), (torch.float32,))
    require_packed(
        "the rows, their experts and shares or the output", (inputs, choice, share, out), 2
    )
    require_packed("experts' codes and scales", (up.codes, down.codes, up.scales, down.scales), 3)
    num_experts, num_columns, num_inner = down.shape
    num_products = 2 * num_inner if activation in GATED else num_inner
    if up.shape != (num_experts, num_products, num_columns):
        raise ValueError(
            f"the first weights of {num_experts} experts are {num_products} x {num_columns}, as "
            f"the second ones and {activation} say, got {tuple(up.shape)}; check the model's config"
        )
    if any(
        block % VECTOR for block in (num_columns, num_inner, up.column_block, down.column_block)
    ):
        raise ValueError(
            f"an expert's columns and their blocks are multiples of {VECTOR}, got {num_columns} "
            f"and {num_inner}, {up.column_block} and {down.column_block}; use the torch backend"
        )
    if up.column_factor_K is not None or down.column_factor_K is not None:
        raise ValueError(
            "experts' weights have no factor of the columns, got one; apply the norm to the rows"
        )
    shapes = [tuple(tensor.shape) for tensor in (inputs, out, choice, share)]
    if shapes != [(len(inputs), num_columns)] * 2 + [(len(inputs), choice.shape[1])] * 2:
        raise ValueError(
            f"rows and output have {num_columns} columns, and each row's experts a share each, got "
            f"{', '.join(map(str, shapes))}; pass one layer's"
        )
