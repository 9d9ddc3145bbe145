"""Uniform numbers that depend on a seed and a position alone, in plain torch.

Each number is one call of Philox4x32-10 on its own position, so it is the same whatever else runs
beside it, on either backend. It is the CPU's path and what the Triton kernel is compared with.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), sec. 3.3 and 4.

Shape letters: B batch, N rows of numbers of a sequence, X numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
"""The largest 32-bit word, and the mask of one."""
LEAST_UNIFORM = 2.0**-32
"""What every number is a multiple of."""
ROUNDS = 10

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def fill_uniforms(seed_B: Tensor, step_B: Tensor, out_NBX: Tensor, *, stream: int) -> None:
    """Write a number in [0, 1) to every element of `out_NBX`, of any float dtype from fp32 up.

    Number (n, b, x) is word 0 of Philox under key `seed_B[b]` at counter (x, n, `step_B[b]`,
    `stream`), cut to its high 24 bits where these are not 0, so that small numbers are finer: all
    64 bits of a seed count, and the low 32 of a step.
    Both are int64 and not negative. Raises ValueError unless `stream` is a 32-bit word.
    """
    check_stream(stream)
    num_rows, _, num_columns = out_NBX.shape
    device = out_NBX.device
    x_X = torch.arange(num_columns, device=device)
    n_N11 = torch.arange(num_rows, device=device)[:, None, None]
    step_B1 = (step_B & WORD)[:, None]
    stream_1 = torch.full((1,), stream, device=device)
    key = ((seed_B & WORD)[:, None], (seed_B >> 32 & WORD)[:, None])
    word_NBX = philox((x_X, n_N11, step_B1, stream_1), key)[0]
    # 24 bits fit a float32, so that nothing is rounded and no number becomes 1.
    kept_NBX = torch.where(word_NBX < 1 << 24, word_NBX, word_NBX & 0xFFFFFF00)
    out_NBX.copy_(kept_NBX.to(out_NBX.dtype) * LEAST_UNIFORM)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Return the four output words of Philox4x32-10; all words are int64 and broadcast."""
    for _ in range(ROUNDS):
        counter = _round(counter, key)
        key = ((key[0] + KEY_STEPS[0]) & WORD, (key[1] + KEY_STEPS[1]) & WORD)
    return counter


def check_stream(stream: int) -> None:
    """Raise ValueError unless `stream` is a 32-bit word."""
    if not 0 <= stream <= WORD:
        raise ValueError(
            f"a stream of random numbers is from 0 to {WORD}, got {stream}; number streams from 0"
        )


def _round(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    high_0, low_0 = _multiply(counter[0], MULTIPLIERS[0])
    high_1, low_1 = _multiply(counter[2], MULTIPLIERS[1])
    return high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product, which itself may not fit int64."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
