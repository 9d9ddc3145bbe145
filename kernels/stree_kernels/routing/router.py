"""Which experts a row goes to, and with what share, in two Triton kernels.

The work is that of `router_ref`, tie for tie. A program of the first kernel owns a few rows of the
router's weight, loaded before the previous kernel ends, and multiplies some rows of the input by
them; it applies the norm to these itself, and each stores what it has made of one or more of them
for the experts. Products are fp32 on the CUDA cores; many rows take cuBLAS instead. A program of
the second kernel chooses for one row: scores become integers that order like them, and the largest
is taken once for each choice.

Shape letters: M rows, D columns, X rows of the weight, N of them in a program, K columns of a step,
T threads, Q partial sums of a row, E experts, G groups of experts, Z experts of a row.
"""

# The Triton DSL annotates its constants only and grows tuples in loops.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import require_dtypes, require_packed
from stree_kernels.launch.shared_memory import match_neighbours
from stree_kernels.linear.deferred_norm import DeferredNorm, check_rows
from stree_kernels.linear.residual import row_scale, scale_rows
from stree_kernels.routing.router_ref import Router

MOST_ROWS = 32
"""Above, the weight would be read from the cache so often that cuBLAS is faster."""
BLOCK_ROWS = (1, 2, 4)
"""Rows of the input in a program: as many as there are, at most the last."""
FEW_ROWS = 8
BLOCK_N = (2, 4)
"""Rows of the weight in a program, up to FEW_ROWS and above: a program or two for each
multiprocessor of an H200, then fewer that read the rows."""
NUM_WARPS = 4
VECTOR = 4
"""Neighbouring columns of a thread: what it loads of the weight at a time."""
DEPTH, ROWS_DEPTH = 8, 4
"""Steps of the weight, and of the rows, that are loaded ahead."""
MAX_EXPERTS = 1024

_FP32 = torch.float32
_HIGHEST = tl.constexpr(0x7FFFFFFF)
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _load_step(ptrs, columns_K, step, INNER: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns of some rows [., K]."""
    if (step + 1) * BLOCK_K <= INNER:
        return tl.load(ptrs + step * BLOCK_K)
    valid_K = (columns_K + step * BLOCK_K < INNER)[None, :]
    return tl.load(ptrs + step * BLOCK_K, mask=valid_K, other=0.0)


@triton.jit
def _load_rows(
    values_ptr, first, num_rows, step,
    INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns [1, K] of each row: its threads then have the columns that they multiply."""
    columns_K = tl.arange(0, BLOCK_K)
    rows: tl.tuple = ()
    for m in tl.static_range(BLOCK_M):
        row = tl.minimum(first + m, num_rows - 1).to(tl.int64)
        ptrs = values_ptr + row * INNER + columns_K[None, :]
        rows = rows + (_load_step(ptrs, columns_K, step, INNER, BLOCK_K),)
    return rows


@triton.jit
def _add_up(sums, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The threads' sums [N, T] of every row added up [N, M], and which row stands where."""
    row_M = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        total_NM = tl.reshape(tl.sum(sums[0], axis=1), [BLOCK_N, 1])
    elif BLOCK_M == 2:
        total_NM = tl.sum(tl.join(sums[0], sums[1]), axis=1)
    else:
        joined = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
        total_NM = tl.reshape(tl.sum(joined, axis=1), [BLOCK_N, 4])
        row_M = row_M // 2 + row_M % 2 * 2
    return total_NM, row_M


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(
    # pointers
    values_ptr, sums_ptr, norm_ptr, weight_ptr, hidden_ptr, logits_ptr,
    # sizes
    num_rows, num_weight_rows, eps,
    # meta
    INNER: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, DEPTH: tl.constexpr,
    ROWS_DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, times their norm, times BLOCK_N rows of the weight."""
    BLOCK_K: tl.constexpr = THREADS * VECTOR
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_M
    columns_K = tl.arange(0, BLOCK_K)
    rows_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the last row the last one is read again, so that these loads need no mask.
    weight_N = tl.minimum(rows_N, num_weight_rows - 1).to(tl.int64)
    weight_ptrs = weight_ptr + weight_N[:, None] * INNER + columns_K[None, :]
    weights: tl.tuple = ()
    for step in tl.static_range(DEPTH if DEPTH < STEPS else STEPS):
        weights = weights + (_load_step(weight_ptrs, columns_K, step, INNER, BLOCK_K),)
    wait_for_previous(PDL)
    tiles: tl.tuple = ()
    for step in tl.static_range(ROWS_DEPTH if ROWS_DEPTH < STEPS else STEPS):
        tiles = tiles + (_load_rows(values_ptr, first, num_rows, step, INNER, BLOCK_M, BLOCK_K),)
    scales, sums = (), ()
    for m in tl.static_range(BLOCK_M):
        scale = 1.0
        if SUMS > 0:
            row = tl.minimum(first + m, num_rows - 1).to(tl.int64)
            scale = row_scale(sums_ptr + row * SUMS, SUMS, INNER, eps, BLOCK_Q)
        scales = scales + (scale,)
        sums = sums + (tl.full([BLOCK_N, THREADS], 0.0, tl.float32),)
    for step in tl.static_range(STEPS):
        norm_1K = _load_step(norm_ptr + columns_K[None, :], columns_K, step, INNER, BLOCK_K)
        weight = tl.reshape(weights[step], [BLOCK_N, THREADS, VECTOR])
        added = ()
        for m in tl.static_range(BLOCK_M):
            hidden_1K = tiles[step][m].to(tl.float32) * scales[m] * norm_1K
            hidden_1K = hidden_1K.to(hidden_ptr.dtype.element_ty)
            # Programs take turns in storing the rows.
            if (first + m < num_rows) & ((first + m) % tl.num_programs(0) == block):
                ptrs = hidden_ptr + (first + m).to(tl.int64) * INNER + columns_K[None, :]
                valid_1K = (columns_K + step * BLOCK_K < INNER)[None, :]
                tl.store(ptrs + step * BLOCK_K, hidden_1K, mask=valid_1K)
            row_1TV = tl.reshape(hidden_1K.to(tl.float32), [1, THREADS, VECTOR])
            added = added + (sums[m] + tl.sum(weight * row_1TV, axis=2),)
        sums = added
        if step + DEPTH < STEPS:
            ahead = step + DEPTH
            weights = weights + (_load_step(weight_ptrs, columns_K, ahead, INNER, BLOCK_K),)
        if step + ROWS_DEPTH < STEPS:
            ahead = step + ROWS_DEPTH
            tile = _load_rows(values_ptr, first, num_rows, ahead, INNER, BLOCK_M, BLOCK_K)
            tiles = tiles + (tile,)
    logits_NM, row_M = _add_up(sums, BLOCK_N, BLOCK_M)
    row_M += first
    ptrs = logits_ptr + row_M.to(tl.int64)[None, :] * num_weight_rows + rows_N[:, None]
    valid_NM = (row_M < num_rows)[None, :] & (rows_N < num_weight_rows)[:, None]
    tl.store(ptrs, logits_NM, mask=valid_NM)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _order_key(score):
    """An integer that orders as the score does, NaN above all; -0.0 is 0.0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ _HIGHEST)
    return tl.where(score != score, _HIGHEST, key)


@triton.jit
def _score_of(key):
    """The score that a key was made of."""
    return tl.where(key >= 0, key, key ^ _HIGHEST).to(tl.float32, bitcast=True)


@triton.jit
def _first_largest(keys_E, index_E):
    """The largest key, and the lowest index that has it."""
    largest = tl.max(keys_E, axis=0)
    return largest, tl.min(tl.where(keys_E == largest, index_E, _HIGHEST), axis=0)


@triton.jit
def _close_groups(
    keys_E, expert_E, NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, NUM_OPEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The keys with those outside the groups whose two best sum highest at minus infinity's."""
    group_E = expert_E // (NUM_EXPERTS // NUM_GROUPS)
    group_G = tl.arange(0, BLOCK_G)
    sums_G = tl.full([BLOCK_G], _LOWEST, tl.int32)
    for group in range(NUM_GROUPS):
        own_E = tl.where(group_E == group, keys_E, _LOWEST)
        best, place = _first_largest(own_E, expert_E)
        second = tl.max(tl.where(expert_E == place, _LOWEST, own_E), axis=0)
        sums_G = tl.where(group_G == group, _order_key(_score_of(best) + _score_of(second)), sums_G)
    open_E = expert_E < 0
    for _ in range(NUM_OPEN):
        _, group = _first_largest(sums_G, group_G)
        open_E = open_E | (group_E == group)
        sums_G = tl.where(group_G == group, _LOWEST, sums_G)
    closed = _order_key(tl.full(keys_E.shape, float("-inf"), tl.float32))
    return tl.where(open_E | (expert_E >= NUM_EXPERTS), keys_E, closed)


@triton.jit
def _choose_kernel(
    # pointers
    logits_ptr, bias_ptr, choice_ptr, share_ptr,
    # sizes
    num_logits, scale,
    # meta
    NUM_EXPERTS: tl.constexpr, NUM_CHOSEN: tl.constexpr, NUM_SHARED: tl.constexpr,
    NUM_GROUPS: tl.constexpr, NUM_OPEN: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALISED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The experts of one row and their shares."""
    row = tl.program_id(0).to(tl.int64)
    expert_E = tl.arange(0, BLOCK_E)
    exists_E = expert_E < NUM_EXPERTS
    place_Z = tl.arange(0, BLOCK_Z)
    chosen_Z = place_Z < NUM_CHOSEN
    if bias_ptr is not None:
        bias_E = tl.load(bias_ptr + expert_E, mask=exists_E, other=0.0)
    wait_for_previous(PDL)
    logits_ptr += row * num_logits
    logits_E = tl.load(logits_ptr + expert_E, mask=exists_E, other=float("-inf"))
    if NUM_SHARED > 0:
        shared_share = _sigmoid(tl.load(logits_ptr + NUM_EXPERTS))
    ranked_E = logits_E
    if not SOFTMAX:
        ranked_E = _sigmoid(logits_E)
        if bias_ptr is not None:
            ranked_E += bias_E
    keys_E = tl.where(exists_E, _order_key(ranked_E), _LOWEST)
    if NUM_OPEN < NUM_GROUPS:
        keys_E = _close_groups(keys_E, expert_E, NUM_EXPERTS, NUM_GROUPS, NUM_OPEN, BLOCK_G)
    choice_Z = NUM_EXPERTS + place_Z - NUM_CHOSEN
    largest = 0.0
    for rank in tl.static_range(NUM_CHOSEN):
        key, expert = _first_largest(keys_E, expert_E)
        if SOFTMAX and rank == 0:
            largest = _score_of(key)
        choice_Z = tl.where(place_Z == rank, expert, choice_Z)
        keys_E = tl.where(expert_E == expert, _LOWEST, keys_E)
    # These lie in the nearest cache.
    logits_Z = tl.load(logits_ptr + choice_Z, mask=chosen_Z, other=float("-inf"))
    if SOFTMAX:
        share_Z = tl.where(chosen_Z, tl.exp(logits_Z - largest), 0.0)
        if NORMALISED:
            share_Z /= tl.sum(share_Z, axis=0)
        else:
            share_Z /= tl.sum(tl.where(exists_E, tl.exp(logits_E - largest), 0.0), axis=0)
    else:
        share_Z = tl.where(chosen_Z, _sigmoid(logits_Z), 0.0)
        if NORMALISED:
            share_Z /= tl.sum(share_Z, axis=0) + 1e-20
        share_Z *= scale
    if NUM_SHARED > 0:
        share_Z = tl.where(chosen_Z, share_Z, shared_share)
    NUM_ALL: tl.constexpr = NUM_CHOSEN + NUM_SHARED
    offsets_Z = row * NUM_ALL + place_Z
    tl.store(choice_ptr + offsets_Z, choice_Z.to(tl.int64), mask=place_Z < NUM_ALL)
    tl.store(share_ptr + offsets_Z, share_Z, mask=place_Z < NUM_ALL)


def route(rows: DeferredNorm, router: Router, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Write norm(rows) to `hidden_MD`; return experts [M, Z] (int64) and shares [M, Z] of it.

    The contract is that of `router_ref.route`; the router is in fp32. Allocates logits and what it
    returns.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    _check(rows, router, hidden_MD)
    num_rows = len(rows.values_MK)
    if num_rows > MOST_ROWS:
        scale_rows(rows, router.norm_D, hidden_MD)
        return choose(hidden_MD.float() @ router.weight_XD.T, router)
    logits_MX = hidden_MD.new_empty(num_rows, len(router.weight_XD), dtype=torch.float32)
    _multiply(rows, router, hidden_MD, logits_MX)
    return choose(logits_MX, router)


def _multiply(rows: DeferredNorm, router: Router, hidden_MD: Tensor, logits_MX: Tensor) -> None:
    """Write the norm of some rows, and their logits."""
    values, sums, _, eps = rows
    num_rows, num_columns = values.shape
    num_sums = 0 if sums is None else sums.shape[1]
    block_m = next((b for b in BLOCK_ROWS if num_rows <= b), BLOCK_ROWS[-1])
    block_n = BLOCK_N[num_rows > FEW_ROWS]
    grid = triton.cdiv(len(router.weight_XD), block_n), triton.cdiv(num_rows, block_m)
    kernel = _logits_kernel[grid](
        values, sums, router.norm_D, router.weight_XD, hidden_MD, logits_MX, num_rows,
        len(router.weight_XD), eps, INNER=num_columns, SUMS=num_sums, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_Q=triton.next_power_of_2(max(1, num_sums)),
        THREADS=32 * NUM_WARPS, VECTOR=VECTOR, DEPTH=DEPTH, ROWS_DEPTH=ROWS_DEPTH,
        num_warps=NUM_WARPS, num_stages=1, **launch_options(values.device),
    )  # fmt: skip
    match_neighbours(kernel, values.device, num_rows, num_columns)


def choose(logits_MX: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Return the experts [M, Z] (int64) and shares [M, Z] that a router's logits say.

    The contract is that of `router_ref.choose`. Raises ValueError for what the kernel cannot take.
    """
    _check_routing(router)
    require_dtypes("a router's logits and bias", _present(logits_MX, router.bias_E), (_FP32,))
    require_packed("a router's logits", (logits_MX,), 2)
    routing, num_all = router.routing, router.routing.num_chosen + router.num_shared
    choice_MZ = logits_MX.new_empty(len(logits_MX), num_all, dtype=torch.int64)
    share_MZ = logits_MX.new_empty(len(logits_MX), num_all)
    block_e = triton.next_power_of_2(router.num_experts)
    kernel = _choose_kernel[(len(logits_MX),)](
        logits_MX, router.bias_E, choice_MZ, share_MZ, logits_MX.shape[1], float(routing.scale),
        NUM_EXPERTS=router.num_experts, NUM_CHOSEN=routing.num_chosen,
        NUM_SHARED=router.num_shared, NUM_GROUPS=routing.num_groups,
        NUM_OPEN=routing.num_open_groups, SOFTMAX=routing.kind == "softmax",
        NORMALISED=routing.normalised, BLOCK_E=block_e,
        BLOCK_Z=triton.next_power_of_2(num_all),
        BLOCK_G=triton.next_power_of_2(routing.num_groups), num_warps=1,
        **launch_options(logits_MX.device),
    )  # fmt: skip
    match_neighbours(kernel, logits_MX.device, len(logits_MX), router.weight_XD.shape[1])
    return choice_MZ, share_MZ


def _present(*tensors: Tensor | None) -> list[Tensor]:
    """Return the tensors that there are."""
    return [tensor for tensor in tensors if tensor is not None]


def _check(rows: DeferredNorm, router: Router, hidden: Tensor) -> None:
    """Raise ValueError for what the kernels cannot take."""
    check_rows(rows)
    require_dtypes("the router", _present(router.norm_D, router.weight_XD), (_FP32,))
    require_dtypes("the rows and their norm", (rows.values_MK, hidden), (hidden.dtype,))
    require_packed("the router's weight or the rows", (router.weight_XD, hidden), 2)
    num_columns = rows.values_MK.shape[1]
    shapes = (tuple(router.norm_D.shape), router.weight_XD.shape[1], tuple(hidden.shape))
    if shapes != ((num_columns,), num_columns, tuple(rows.values_MK.shape)):
        raise ValueError(
            f"a router has a column, and the norm's output one, for each of the {num_columns} of "
            f"the rows, got {', '.join(map(str, shapes))}; pass one layer's"
        )
    if rows.num_groups != 1 or num_columns % 16:
        raise ValueError(
            f"a router's rows have one norm and a multiple of 16 columns, got {rows.num_groups} "
            f"and {num_columns}; use the torch backend"
        )


def _check_routing(router: Router) -> None:
    """Raise ValueError for a choice that the kernel cannot make."""
    routing, num_experts = router.routing, router.num_experts
    per_group, over = divmod(num_experts, routing.num_groups)
    least = 2 if routing.num_open_groups < routing.num_groups else 1
    if num_experts > MAX_EXPERTS or over or per_group < least:
        raise ValueError(
            f"a router has up to {MAX_EXPERTS} experts in equal groups of two or more, got "
            f"{num_experts} in {routing.num_groups}; check the model's config"
        )
    if not 1 <= routing.num_chosen <= num_experts:
        raise ValueError(
            f"a row chooses among {num_experts} experts, got {routing.num_chosen}; check the "
            "model's config"
        )
