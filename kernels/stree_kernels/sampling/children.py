"""Draw children and pick what the target picks after a node, on the GPU.

The work is that of `sampling_ref`, with the same numbers; sums are made in another order. The
kernels are those of `sampling_kernel`; children are drawn by that of `top_tokens`.

Shape letters: T tree tokens, I nodes with children, B slots, V vocabulary, C children, N rows of
any kind, R rows of a token buffer.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from stree_kernels.launch.pdl import launch_options
from stree_kernels.launch.rows import require_dtypes, require_packed
from stree_kernels.sampling.children_kernel import sample_tokens_kernel, try_children_kernel
from stree_kernels.sampling.top_tokens import Race, find_and_place
from stree_kernels.sampling.uniforms_ref import check_stream

BLOCK = 2048
"""Scores of a row that a program takes at once: with more, two distributions do not fit the
registers."""
NUM_WARPS = 8


def place_drawn_tokens(
    scores_NBV: Tensor, temperature_B: Tensor, seed_B: Tensor, step_B: Tensor, row_NC: Tensor,
    out_RB: Tensor, *, stream: int,
) -> None:  # fmt: skip
    """Draw tokens of every row without replacement; write draw c to row `row_NC[n, c]` of `out_RB`.

    The contract is that of `sampling_ref.place_drawn_tokens`.
    Raises ValueError when a size, dtype or stride is beyond what the kernels take.
    """
    check_stream(stream)
    require_dtypes("temperatures", (temperature_B,), (torch.float32,))
    require_dtypes("seeds and steps", (seed_B, step_B), (torch.int64,))
    require_packed("temperatures, seeds or steps", (temperature_B, seed_B, step_B), 1)
    # The same 32 bits as a signed number: a larger argument would have another type.
    race = Race(temperature_B, seed_B, step_B, stream - (stream >> 31 << 32))
    find_and_place(scores_NBV, row_NC, out_RB, race)


def sample_tokens(
    scores_NBV: Tensor, temperature_B: Tensor, uniform_NB: Tensor, out_NB: Tensor
) -> None:
    """Write a token of every row's distribution, decided by one number in [0, 1) each.

    The contract is that of `sampling_ref.sample_tokens`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    floats = (scores_NBV, temperature_B, uniform_NB)
    require_dtypes("scores, temperatures and numbers", floats, (torch.float32,))
    require_dtypes("tokens", (out_NB,), (torch.int64,))
    require_packed("the scores", (scores_NBV,), 3)
    require_packed("numbers or tokens", (uniform_NB, out_NB), 2)
    num_rows, batch, num_scores = scores_NBV.shape
    _require_shapes(
        {"numbers": uniform_NB, "tokens": out_NB, "temperatures": temperature_B},
        {"numbers": (num_rows, batch), "tokens": (num_rows, batch), "temperatures": (batch,)},
    )
    sample_tokens_kernel[(num_rows * batch,)](
        scores_NBV, temperature_B, uniform_NB, out_NB, batch, num_scores,
        BLOCK_V=_block(num_scores), num_warps=NUM_WARPS, **launch_options(out_NB.device),
    )  # fmt: skip


def try_children(
    p_TBV: Tensor, q_IBV: Tensor, temperature_B: Tensor, inner_I: Tensor, child_IC: Tensor,
    tokens_TB: Tensor, uniform_IBC: Tensor, uniform_TB: Tensor, chosen_TB: Tensor,
) -> None:  # fmt: skip
    """Replace the tokens after nodes with children by those of multi-step speculative sampling.

    The contract is that of `sampling_ref.try_children`.
    Raises ValueError when a size, dtype or stride is beyond what the kernel takes.
    """
    floats = (p_TBV, q_IBV, temperature_B, uniform_IBC, uniform_TB)
    require_dtypes("scores, temperatures and numbers", floats, (torch.float32,))
    tables = (inner_I, child_IC, tokens_TB, chosen_TB)
    require_dtypes("tokens and tables", tables, (torch.int64,))
    require_packed("scores or numbers of tries", (p_TBV, q_IBV, uniform_IBC), 3)
    require_packed("numbers, tokens or children", (uniform_TB, tokens_TB, chosen_TB, child_IC), 2)
    require_packed("temperatures or nodes", (temperature_B, inner_I), 1)
    num_tokens, batch, num_scores = p_TBV.shape
    num_inner, num_children = child_IC.shape
    of_all = (num_tokens, batch)
    _require_shapes(
        {
            "draft scores": q_IBV, "numbers of tries": uniform_IBC, "nodes": inner_I,
            "numbers": uniform_TB, "tokens": tokens_TB, "chosen tokens": chosen_TB,
            "temperatures": temperature_B,
        },
        {
            "draft scores": (num_inner, batch, num_scores), "nodes": (num_inner,),
            "numbers of tries": (num_inner, batch, num_children), "numbers": of_all,
            "tokens": of_all, "chosen tokens": of_all, "temperatures": (batch,),
        },
    )  # fmt: skip
    try_children_kernel[(num_inner * batch,)](
        p_TBV, q_IBV, temperature_B, inner_I, child_IC, tokens_TB, uniform_IBC, uniform_TB,
        chosen_TB, batch, num_scores,
        NUM_CHILDREN=num_children, BLOCK_C=triton.next_power_of_2(num_children),
        BLOCK_V=_block(num_scores), num_warps=NUM_WARPS, **launch_options(chosen_TB.device),
    )  # fmt: skip


def _block(num_scores: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(num_scores)))


def _require_shapes(given: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless every tensor has its shape."""
    for name, tensor in given.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} of this step have the shape {expected[name]}, got {tuple(tensor.shape)}; "
                "pass the buffers of one step"
            )
