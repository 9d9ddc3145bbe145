"""Mixture-of-experts MLPs of a few rows, in two Triton kernels.

The work is that of `experts_ref`. Each product streams the weights of the experts that the rows
have chosen, on the CUDA cores. A program of the first kernel owns some inner columns of one row's
expert; one of the second owns some columns of a row and takes its experts in order, so that the
sum of their shares is always the same. Programs of different rows at the same columns are
neighbours: rows with an expert in common find its weights in the cache of the chip.
The second kernel loads its first weights before the first one ends.

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

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import FLOATS, require_dtypes, require_packed
from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear.device_functions import activate_tile, weight_rows
from stree_kernels.linear.gemv_kernel import LOAD_BYTES, GemvConfig
from stree_kernels.linear.grouped_experts import grouped_expert_mlps, is_grouped

MULTIPLE = 16
"""What the columns of an expert's weights are multiples of: rows then begin at whole loads."""

# Sized for one row: several programs on each multiprocessor, with some 80 KiB of weights under way.
# A program of the second kernel streams several experts, so it owns fewer rows of each.
UP_CONFIG = GemvConfig(8, 2, 2, depth=4)
DOWN_CONFIG = GemvConfig(4, 1, 2, depth=4)


@triton.jit
def _load_weight(
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
    return tl.load(ptrs, mask=valid_K[None, :], other=0.0)


@triton.jit
def _load_values(
    values_ptr, step,
    NUM_CHOSEN: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr, WARPS_N: tl.constexpr,
):  # fmt: skip
    """The columns [W, K] that a step multiplies, for every warp: none then needs another's."""
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    place = step // STEPS
    columns_K = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    ptrs = values_ptr + place * INNER + columns_K[None, :] + tl.full([WARPS_N, 1], 0, tl.int32)
    valid_K = (columns_K < INNER) & (place < NUM_CHOSEN)
    return tl.load(ptrs, mask=valid_K[None, :], other=0.0)


@triton.jit
def _first_weights(
    weight_ptr, choice_ptr, rows_N,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The tiles of the first DEPTH steps."""
    weights: tl.tuple = ()
    for step in tl.static_range(DEPTH):
        tile = _load_weight(
            weight_ptr, choice_ptr, rows_N, step, NUM_CHOSEN, NUM_ROWS, INNER, BLOCK_K
        )
        weights = weights + (tile,)
    return weights


@triton.jit
def _multiply(
    weights, values_ptr, weight_ptr, choice_ptr, share_ptr, rows_N,
    NUM_CHOSEN: tl.constexpr, NUM_ROWS: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr,
    WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The products [N] with all chosen experts, times their shares if any, added up.

    `weights` are the tiles of the first steps; the next ones are always under way.
    """
    THREADS: tl.constexpr = WARPS_K * 32
    BLOCK_K: tl.constexpr = THREADS * VECTOR
    BLOCK_R: tl.constexpr = rows_N.shape[0] // WARPS_N
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    acc_RWT = tl.full([BLOCK_R, WARPS_N, THREADS], 0.0, tl.float32)
    for begin in range(0, NUM_CHOSEN * STEPS, DEPTH):
        values: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            tile = _load_values(values_ptr, begin + ahead, NUM_CHOSEN, INNER, BLOCK_K, WARPS_N)
            values = values + (tile,)
        following: tl.tuple = ()
        for ahead in tl.static_range(DEPTH):
            step = begin + ahead
            weight = tl.reshape(weights[ahead], [BLOCK_R, WARPS_N, THREADS, VECTOR])
            value = tl.reshape(values[ahead], [1, WARPS_N, THREADS, VECTOR])
            part_RWT = tl.sum(weight.to(tl.float32) * value.to(tl.float32), axis=3)
            if share_ptr is not None:
                place = step // STEPS
                share = tl.load(share_ptr + place, mask=place < NUM_CHOSEN, other=0.0)
                part_RWT *= share.to(tl.float32)
            acc_RWT += part_RWT
            tile = _load_weight(
                weight_ptr, choice_ptr, rows_N, step + DEPTH, NUM_CHOSEN, NUM_ROWS, INNER, BLOCK_K
            )
            following = following + (tile,)
        weights = following
    return tl.reshape(tl.sum(acc_RWT, axis=2), [rows_N.shape[0]])


@triton.jit
def _up_kernel(
    # pointers
    inputs_ptr, choice_ptr, weight_ptr, inner_ptr,
    # meta
    NUM_CHOSEN: tl.constexpr, NUM_COLUMNS: tl.constexpr, NUM_INNER: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr,
    WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some inner columns of one row's expert."""
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    NUM_ROWS: tl.constexpr = 2 * NUM_INNER if GATED else NUM_INNER
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), block, NUM_INNER, BLOCK_N, GATED)
    wait_for_previous(PDL)
    weights = _first_weights(
        weight_ptr, choice_ptr + pair, rows_N, 1, NUM_ROWS, NUM_COLUMNS, WARPS_K * 32 * VECTOR,
        DEPTH,
    )  # fmt: skip
    acc_N = _multiply(
        weights, inputs_ptr + pair // NUM_CHOSEN * NUM_COLUMNS, weight_ptr, choice_ptr + pair, None,
        rows_N, 1, NUM_ROWS, NUM_COLUMNS, VECTOR, WARPS_N, WARPS_K, DEPTH,
    )  # fmt: skip
    acc_MN = tl.reshape(acc_N, [1, BLOCK_N])
    inner_F = tl.reshape(activate_tile(acc_MN, 1, BLOCK_N, GATED, ACTIVATION), [BLOCK_F])
    ptrs = inner_ptr + pair * NUM_INNER + block * BLOCK_F + tl.arange(0, BLOCK_F)
    tl.store(ptrs, inner_F.to(inner_ptr.dtype.element_ty))


@triton.jit
def _down_kernel(
    # pointers
    inner_ptr, choice_ptr, share_ptr, weight_ptr, out_ptr,
    # meta
    NUM_CHOSEN: tl.constexpr, NUM_COLUMNS: tl.constexpr, NUM_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, WARPS_N: tl.constexpr, WARPS_K: tl.constexpr,
    DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one row, of all its experts."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows_N = weight_rows(tl.arange(0, BLOCK_N), block, NUM_COLUMNS, BLOCK_N, False)
    # The choice is older than the first kernel, whose wait is over.
    choice_ptr += row * NUM_CHOSEN
    weights = _first_weights(
        weight_ptr, choice_ptr, rows_N, NUM_CHOSEN, NUM_COLUMNS, NUM_INNER, WARPS_K * 32 * VECTOR,
        DEPTH,
    )  # fmt: skip
    wait_for_previous(PDL)
    acc_N = _multiply(
        weights, inner_ptr + row * NUM_CHOSEN * NUM_INNER, weight_ptr, choice_ptr,
        share_ptr + row * NUM_CHOSEN, rows_N, NUM_CHOSEN, NUM_COLUMNS, NUM_INNER, VECTOR, WARPS_N,
        WARPS_K, DEPTH,
    )  # fmt: skip
    ptrs = out_ptr + row * NUM_COLUMNS + block * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(ptrs, acc_N.to(out_ptr.dtype.element_ty))


def expert_mlps(
    inputs_MD: Tensor,
    choice_MC: Tensor,
    share_MC: Tensor,
    up_EXD: Tensor,
    down_EDF: Tensor,
    out_MD: Tensor,
    *,
    activation: Activation,
) -> None:
    """Write the sum of each row's chosen MLPs (`choice_MC`, int64), times `share_MC`, to `out_MD`.

    The contract is that of `experts_ref.expert_mlps`; `out_MD` is in the weights' dtype or fp32.
    The kernels read a weight once for every row that has chosen it; many rows take grouped products
    where these run. Experts are not checked: they are below E. Allocates the inner values, in the
    weights' dtype.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    _check(inputs_MD, choice_MC, share_MC, up_EXD, down_EDF, out_MD, activation)
    if is_grouped(len(inputs_MD), up_EXD):
        grouped_expert_mlps(
            inputs_MD, choice_MC, share_MC, up_EXD, down_EDF, out_MD, activation=activation
        )
        return
    num_rows, num_chosen = choice_MC.shape
    num_columns, num_inner = down_EDF.shape[1:]
    gated = activation in GATED
    inner = inputs_MD.new_empty(num_rows * num_chosen, num_inner)
    sizes = {
        "NUM_CHOSEN": num_chosen, "NUM_COLUMNS": num_columns, "NUM_INNER": num_inner,
        "VECTOR": LOAD_BYTES // up_EXD.element_size(), "num_stages": 1,
        **launch_options(inputs_MD.device),
    }  # fmt: skip
    num_weight_rows = up_EXD.shape[1]
    _up_kernel[len(inner), num_weight_rows // UP_CONFIG.block_n](
        inputs_MD, choice_MC, up_EXD, inner, GATED=gated, ACTIVATION=activation, **sizes,
        **_cut(UP_CONFIG, 1, num_columns, sizes["VECTOR"]),
    )  # fmt: skip
    _down_kernel[num_rows, num_columns // DOWN_CONFIG.block_n](
        inner, choice_MC, share_MC, down_EDF, out_MD, **sizes,
        **_cut(DOWN_CONFIG, num_chosen, num_inner, sizes["VECTOR"]),
    )  # fmt: skip


def _cut(config: GemvConfig, num_experts: int, num_columns: int, vector: int) -> dict[str, int]:
    """Return the arguments that a config makes of the columns of a program's experts."""
    block_k = config.warps_k * 32 * vector
    return {
        "BLOCK_N": config.block_n, "WARPS_N": config.warps_n, "WARPS_K": config.warps_k,
        "DEPTH": steps_ahead(config.depth, num_experts * triton.cdiv(num_columns, block_k)),
        "num_warps": config.warps_n * config.warps_k,
    }  # fmt: skip


def steps_ahead(most: int, num_steps: int) -> int:
    """Return how many steps are loaded ahead: `most`, or one less where fewer are then empty.

    A program takes so many steps at a time, and an empty one costs its instructions.
    """
    if num_steps <= most:
        return num_steps
    return min((most, max(1, most - 1)), key=lambda depth: -num_steps % depth)


def _check(
    inputs: Tensor, choice: Tensor, share: Tensor, up: Tensor, down: Tensor, out: Tensor,
    activation: Activation,
) -> None:  # fmt: skip
    """Raise ValueError for what the kernels cannot take."""
    require_dtypes("the rows and the experts' weights", (inputs, up, down), FLOATS)
    require_dtypes("the output", (out,), (down.dtype, torch.float32))
    require_dtypes("the chosen experts", (choice,), (torch.int64,))
    require_dtypes("the shares", (share,), FLOATS)
    require_packed(
        "the rows, their experts and shares or the output", (inputs, choice, share, out), 2
    )
    require_packed("the experts' weights", (up, down), 3)
    num_experts, num_columns, num_inner = down.shape
    num_products = 2 * num_inner if activation in GATED else num_inner
    if up.shape != (num_experts, num_products, num_columns):
        raise ValueError(
            f"the first weights of {num_experts} experts are {num_products} x {num_columns}, as "
            f"the second ones and {activation} say, got {tuple(up.shape)}; check the model's config"
        )
    if num_columns % MULTIPLE or num_inner % MULTIPLE:
        raise ValueError(
            f"an expert's columns are multiples of {MULTIPLE}, got {num_columns} and {num_inner}; "
            "use the torch backend"
        )
    shapes = [tuple(tensor.shape) for tensor in (inputs, out, choice, share)]
    if shapes != [(len(inputs), num_columns)] * 2 + [(len(inputs), choice.shape[1])] * 2:
        raise ValueError(
            f"rows and output have {num_columns} columns, and each row's experts a share each, got "
            f"{', '.join(map(str, shapes))}; pass one layer's"
        )
