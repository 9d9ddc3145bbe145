"""Uniform numbers against published answers and statistics, and the kernel against the reference.

Shape letters: B batch, N rows of numbers of a sequence, X numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from stree_kernels.sampling import uniforms as kernel, uniforms_ref as reference
from stree_kernels.testing import poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")

SEEDS = (0, 7 << 32 | 5, 2**63 - 1)
STEPS = (2**31 + 1, 0, 3 << 32 | 2)

ANSWERS = {
    "00000000 00000000 00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
}
"""Counter and key, and the output, of Philox4x32-10: kat_vectors of Random123."""


def philox(asked: Sequence[int]) -> list[int]:
    """Return the output for a counter of four words and a key of two."""
    c0, c1, c2, c3, key_0, key_1 = map(torch.tensor, asked)
    return [int(word) for word in reference.philox((c0, c1, c2, c3), (key_0, key_1))]


def fill(
    op: Any, num_rows: int, num_columns: int, *, seeds: tuple[int, ...] = SEEDS,
    steps: tuple[int, ...] = STEPS, stream: int = 0, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """Return uniform numbers; nothing behind the buffer is written."""
    shape = (num_rows, len(seeds), num_columns)
    count = num_rows * len(seeds) * num_columns
    buffer = poisoned(count + 5, dtype=dtype, device=device)
    seed_B, step_B = torch.tensor([seeds, steps], device=device)
    op.fill_uniforms(seed_B, step_B, buffer[:count].view(shape), stream=stream)
    assert buffer[count:].isnan().all()
    return buffer[:count].view(shape)


@pytest.mark.parametrize("question", ANSWERS)
def test_philox_gives_the_published_answers(question: str) -> None:
    asked = [int(word, 16) for word in question.split()]
    assert philox(asked) == [int(word, 16) for word in ANSWERS[question].split()]


def test_a_number_depends_on_its_position_alone() -> None:
    numbers = fill(reference, 2, 5, stream=2**32 - 1)
    for n, b, x in ((0, 0, 0), (1, 1, 4), (0, 2, 3), (1, 0, 2)):
        position = (x, n, STEPS[b] % 2**32, 2**32 - 1, SEEDS[b] % 2**32, SEEDS[b] >> 32)
        word = philox(position)[0]
        kept = word if word < 1 << 24 else word & 0xFFFFFF00
        assert numbers[n, b, x].item() == kept * 2.0**-32
    assert torch.equal(numbers[:1, :, :3], fill(reference, 1, 3, stream=2**32 - 1))


def test_each_part_of_a_position_changes_the_numbers() -> None:
    variants = [
        fill(reference, 2, 4, seeds=(seed,), steps=(step,), stream=stream)
        for seed, step, stream in (
            (1, 1, 1), (2, 1, 1), (1 | 1 << 32, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1 | 1 << 31),
        )
    ]  # fmt: skip
    numbers = torch.stack(variants)
    assert len(numbers.unique()) == numbers.numel(), "rows, columns and all else differ"
    # Of a step the low 32 bits count.
    assert torch.equal(
        variants[0], fill(reference, 2, 4, seeds=(1,), steps=(1 | 1 << 32,), stream=1)
    )


def test_numbers_are_uniform() -> None:
    numbers = fill(reference, 16, 1 << 12, seeds=(1234,), steps=(0,), dtype=torch.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Four standard errors of 2 ** 16 numbers each.
    assert abs(numbers.mean().item() - 1 / 2) < 4 * (1 / 12) ** 0.5 / 256
    assert abs(numbers.var().item() - 1 / 12) < 4 * (1 / 180) ** 0.5 / 256
    counts = numbers.flatten().histc(bins=64, min=0, max=1)
    assert 1e-3 < stats.chisquare(counts.numpy()).pvalue < 1 - 1e-3
    pairs = (numbers[:, 0, 1:] * 8).long() * 8 + (numbers[:, 0, :-1] * 8).long()
    pair_counts = pairs.flatten().bincount(minlength=64)
    assert stats.chisquare(pair_counts.numpy()).pvalue > 1e-3, "neighbours are independent"


def test_a_wider_dtype_holds_the_same_numbers() -> None:
    wide = fill(reference, 2, 5, dtype=torch.float64)
    assert torch.equal(wide, fill(reference, 2, 5).double())


@interpreted
@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 1])
def test_interpreted_kernel_equals_the_reference(stream: int) -> None:
    assert torch.equal(fill(kernel, 2, 5, stream=stream), fill(reference, 2, 5, stream=stream))


@interpreted
@pytest.mark.parametrize("num_columns", [1, 1024, 1030])
def test_interpreted_kernel_fills_whole_rows(num_columns: int) -> None:
    assert torch.equal(fill(kernel, 2, num_columns), fill(reference, 2, num_columns))


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("sizes", [(5, 50000), (3, 1), (2, 1030)], ids=str)
def test_kernel_equals_the_reference(sizes: tuple[int, int], stream: int) -> None:
    numbers = fill(kernel, *sizes, stream=stream, device="cuda")
    assert torch.equal(numbers.cpu(), fill(reference, *sizes, stream=stream))


@pytest.mark.parametrize("op", [kernel, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("stream", [-1, 2**32])
def test_a_stream_beyond_a_word_is_refused(op: Any, stream: int) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 4294967295, got {stream}; number"):
        fill(op, 1, 1, stream=stream)


def test_buffers_beyond_the_kernel_are_refused() -> None:
    seed, step = torch.zeros(2, 3, dtype=torch.int64)
    out = torch.empty(2, 3, 4)
    with pytest.raises(ValueError, match=r"^seeds and steps: one dtype of torch.int64, got .*;"):
        kernel.fill_uniforms(seed, step.int(), out, stream=0)
    with pytest.raises(ValueError, match=r"^uniform numbers: one dtype of torch.float32, got"):
        kernel.fill_uniforms(seed, step, out.double(), stream=0)
    with pytest.raises(ValueError, match=r"^seeds or steps lies without gaps, got strides \(2,\)"):
        kernel.fill_uniforms(torch.zeros(6, dtype=torch.int64)[::2], step, out, stream=0)
    with pytest.raises(ValueError, match=r"^the uniform numbers lies without gaps, got strides"):
        kernel.fill_uniforms(seed, step, torch.empty(3, 2, 4).transpose(0, 1), stream=0)
    with pytest.raises(ValueError, match=r"^a batch of 3 takes one seed .* got \(3,\) and \(2,\);"):
        kernel.fill_uniforms(seed, step[:2], out, stream=0)
