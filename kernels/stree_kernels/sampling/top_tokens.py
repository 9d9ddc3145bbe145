"""The likeliest tokens of rows of scores, in two Triton kernels.

The work is that of `top_tokens_ref`, tie for tie. Every score becomes an integer that orders like
it, with the token's id below it, so that no two are equal. One program finds the largest of a part
of the vocabulary, then one program a row finds the largest of all parts and files them.

Shape letters: N rows of scores of a slot, B slots, V vocabulary, C tokens of a row, R rows of a
token buffer.
"""

# The Triton DSL annotates its constants only.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stree_kernels.launch.pdl import launch_options, wait_for_previous
from stree_kernels.launch.rows import require_dtypes, require_packed
from stree_kernels.sampling.top_tokens_ref import HIGHEST
from stree_kernels.sampling.uniforms import uniform_number
from stree_kernels.sampling.uniforms_ref import LEAST_UNIFORM

PART = 1024
"""Scores of a program: 32 for each thread of its one warp, so that a maximum needs no barrier."""
MANY_CANDIDATES = 1024
"""With more, the second kernel's programs have four warps."""

_HIGHEST = tl.constexpr(HIGHEST)
_ID_MASK = tl.constexpr(0xFFFFFFFF)
_LOWEST_KEY = tl.constexpr(-(2**63))
_HALF_STEP = tl.constexpr(LEAST_UNIFORM / 2)
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)


class Race(NamedTuple):
    """What makes draws of the likeliest tokens, for every slot; `stream` is a signed word."""

    temperature_B: Tensor
    seed_B: Tensor
    step_B: Tensor
    stream: int


@triton.jit
def score_key(score, token):
    """Return an integer that orders as the score does, equal scores by the lower id, NaN first."""
    # -0.0 and 0.0 are equal, but their bits are not.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ascending = tl.where(bits >= 0, bits, bits ^ _HIGHEST)
    ascending = tl.where(score != score, _HIGHEST, ascending)
    return (ascending.to(tl.int64) << 32) | (token.to(tl.int64) ^ _ID_MASK)


@triton.jit
def _raced(score, temperature, number):
    """Return the scores whose likeliest tokens are draws: `sampling_ref.race_scores`."""
    shifted = tl.minimum(number + _HALF_STEP, _BELOW_ONE)
    # Near 0 the difference from 1 has no digits left: there a series.
    series = shifted * (1.0 / 7 + shifted * (1.0 / 8))
    series = shifted * (1.0 / 5 + shifted * (1.0 / 6 + series))
    series = shifted * (1.0 / 3 + shifted * (1.0 / 4 + series))
    series = shifted * (1.0 + shifted * (1.0 / 2 + series))
    exponential = tl.where(shifted < 0.125, series, -tl.log(1.0 - shifted))
    return score / temperature - tl.log(exponential)


@triton.jit(do_not_specialize=["stream"])
def _find_parts_kernel(
    # pointers
    scores_ptr, keys_ptr, temperature_ptr, seed_ptr, step_ptr,
    # sizes
    batch, num_scores, stream,
    # meta
    NUM_TOKENS: tl.constexpr, PART_V: tl.constexpr, RACE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * PART_V + tl.arange(0, PART_V)
    wait_for_previous(PDL)
    score = tl.load(scores_ptr + row * num_scores + token, mask=token < num_scores, other=0.0)
    if RACE:
        slot = row % batch
        temperature = tl.load(temperature_ptr + slot)
        if temperature > 0:
            seed, step = tl.load(seed_ptr + slot), tl.load(step_ptr + slot).to(tl.int32)
            number = uniform_number(seed, token, (row // batch).to(tl.int32), step, stream)
            score = _raced(score, temperature, number)
    keys = tl.where(token < num_scores, score_key(score, token), _LOWEST_KEY)
    out_ptr = keys_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_TOKENS
    for rank in tl.static_range(NUM_TOKENS):
        largest = tl.max(keys, axis=0)
        tl.store(out_ptr + rank, largest)
        keys = tl.where(keys == largest, _LOWEST_KEY, keys)


@triton.jit
def _merge_parts_kernel(
    # pointers
    keys_ptr, row_ptr, out_ptr,
    # sizes
    batch, num_keys,
    # meta
    NUM_TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = row % batch
    k = tl.arange(0, BLOCK_K)
    wait_for_previous(PDL)
    keys_ptr += row.to(tl.int64) * num_keys
    keys = tl.load(keys_ptr + k, mask=k < num_keys, other=_LOWEST_KEY)
    for rank in tl.static_range(NUM_TOKENS):
        largest = tl.max(keys, axis=0)
        keys = tl.where(keys == largest, _LOWEST_KEY, keys)
        place = tl.load(row_ptr + row // batch * NUM_TOKENS + rank)
        token = (largest & _ID_MASK) ^ _ID_MASK
        tl.store(out_ptr + place * batch + slot, token, mask=place >= 0)


def place_top_tokens(scores_NBV: Tensor, row_NC: Tensor, out_RB: Tensor) -> None:
    """Write the c-th likeliest token of row n to row `row_NC[n, c]` of `out_RB`, -1 for nowhere.

    The contract is that of `top_tokens_ref.place_top_tokens`.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    find_and_place(scores_NBV, row_NC, out_RB, None)


def find_and_place(scores_NBV: Tensor, row_NC: Tensor, out_RB: Tensor, race: Race | None) -> None:
    """Place the likeliest tokens, or with `race` those that it makes the likeliest."""
    require_dtypes("scores", (scores_NBV,), (torch.float32,))
    require_dtypes("tokens and their rows", (row_NC, out_RB), (torch.int64,))
    require_packed("the scores", (scores_NBV,), 3)
    require_packed("tokens and their rows", (row_NC, out_RB), 2)
    num_rows, batch, num_scores = scores_NBV.shape
    num_tokens = row_NC.shape[1]
    if row_NC.shape[0] != num_rows or out_RB.shape[1] != batch or num_tokens > num_scores:
        raise ValueError(
            f"scores {tuple(scores_NBV.shape)} take a table of as many rows, at most as many "
            f"tokens as scores, and a buffer of as many slots, got {tuple(row_NC.shape)} and "
            f"{tuple(out_RB.shape)}; pass buffers of one step"
        )
    part = min(PART, max(triton.next_power_of_2(num_scores), triton.next_power_of_2(num_tokens)))
    num_parts = triton.cdiv(num_scores, part)
    num_keys = num_parts * num_tokens
    keys = torch.empty(num_rows * batch, num_keys, dtype=torch.int64, device=scores_NBV.device)
    options = launch_options(scores_NBV.device)
    drawn = race or Race(scores_NBV, scores_NBV, scores_NBV, 0)
    _find_parts_kernel[num_rows * batch, num_parts](
        scores_NBV, keys, *drawn[:3], batch, num_scores, drawn.stream,
        NUM_TOKENS=num_tokens, PART_V=part, RACE=race is not None, num_warps=1, **options,
    )  # fmt: skip
    _merge_parts_kernel[(num_rows * batch,)](
        keys, row_NC, out_RB, batch, num_keys,
        NUM_TOKENS=num_tokens, BLOCK_K=triton.next_power_of_2(num_keys),
        num_warps=1 if num_keys <= MANY_CANDIDATES else 4, **options,
    )  # fmt: skip
