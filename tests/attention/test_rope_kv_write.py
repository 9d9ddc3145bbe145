"""Filing of queries, keys and values against a loop in numpy, and the kernel against the reference.

Shape letters: B slots, R rows of a block buffer, T rows of a pass, S cache positions, L path
capacity, H heads or kv heads, D head dim, X columns of a projection or angles of a rotation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from stree_kernels.attention import rope_kv_write as kernel, rope_kv_write_ref as reference
from stree_kernels.attention.rope_kv_write_ref import HeadNorms, KeyValues
from stree_kernels.launch.rows import Pending
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

FEW = settings(max_examples=20, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclass(frozen=True)
class Case:
    """The tensors of one pass; what the op must not read is NaN."""

    num_heads: int
    qkv: Tensor
    depth: Tensor
    committed: Tensor
    inv_freq: Tensor
    cache: KeyValues
    previous: KeyValues
    pending: Pending | None
    norms: HeadNorms | None = None

    @property
    def head_dim(self) -> int:
        """Dims of one head."""
        return self.cache.key.shape[3]

    def store(self, op: Any, first: int = 0) -> tuple[Tensor, KeyValues]:
        """Return q and the row buffers; the cache changes in place when a path is pending."""
        num_tokens, num_slots = self.qkv.shape[:2]

        def new(*shape: int) -> Tensor:
            return poisoned(*shape, dtype=self.qkv.dtype, device=self.qkv.device)

        q = new(num_tokens, num_slots, self.num_heads, self.head_dim)
        kept = (len(self.depth), num_slots, *self.cache.key.shape[2:])
        rows = KeyValues(new(*kept), new(*kept))
        op.rope_kv_write(
            self.qkv, self.depth, self.committed, self.inv_freq, first=first, q_TBHD=q, rows=rows,
            cache=self.cache, previous=self.previous, pending=self.pending, norms=self.norms,
        )  # fmt: skip
        for buffer in rows:
            outside = torch.cat((buffer[:first], buffer[first + num_tokens :]))
            assert outside.isnan().all(), "only the pass's rows are written"
        return q, KeyValues(*(buffer[first : first + num_tokens] for buffer in rows))

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype, the rotation in fp32 at least."""

        def moved(tensor: Tensor, to: torch.dtype = dtype) -> Tensor:
            return tensor.to(device, to, copy=True)

        return dataclasses.replace(
            self,
            qkv=moved(self.qkv),
            depth=self.depth.to(device),
            committed=self.committed.to(device),
            inv_freq=moved(self.inv_freq, torch.promote_types(dtype, torch.float32)),
            cache=KeyValues(*map(moved, self.cache)),
            previous=KeyValues(*map(moved, self.previous)),
            pending=self.pending and Pending(*(t.to(device) for t in self.pending)),
            norms=self.norms
            and HeadNorms(
                *(moved(w, torch.promote_types(dtype, torch.float32)) for w in self.norms[:2]),
                self.norms.eps,
            ),
        )


def make_case(
    *, committed: Sequence[int], num_rows: int = 3, num_heads: int = 4, num_kv_heads: int = 2,
    head_dim: int = 16, rotary_dim: int = 16, positions: int = 24,
    paths: Sequence[Sequence[int]] | None = None, capacity: int = 4, normed: bool = False,
) -> Case:  # fmt: skip
    """Build a case in float64, one slot for each committed length, its path included."""
    random = np.random.default_rng(num_rows)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape))

    slots, heads = len(committed), (num_kv_heads, head_dim)
    num_previous = 1 + max((row for path in paths or () for row in path), default=0)
    previous = KeyValues(*(normal(num_previous + 1, slots, *heads) for _ in range(2)))
    # What stands after a path is any row of the block, also one that nothing has written.
    path_BL = torch.full((slots, capacity), num_previous, dtype=torch.int32)
    for slot, path in enumerate(paths or ()):
        path_BL[slot, : len(path)] = torch.tensor(path, dtype=torch.int32)
    length_B = torch.tensor([len(path) for path in paths or ()], dtype=torch.int32)
    cache = KeyValues(*(normal(slots, positions, *heads) for _ in range(2)))
    for buffer in previous:
        buffer[-1] = torch.nan
    for buffer in cache:
        for slot, length in enumerate(committed):
            buffer[slot, length:] = torch.nan
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    return Case(
        num_heads,
        # Columns of a wider buffer.
        qkv=normal(num_rows, slots, columns + 16)[..., :columns],
        depth=torch.from_numpy(random.integers(0, 9, num_rows + 1)).int(),
        committed=torch.tensor(committed, dtype=torch.int32),
        inv_freq=10_000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim),
        cache=cache,
        previous=previous,
        pending=None if paths is None else Pending(path_BL, length_B, torch.zeros_like(length_B)),
        norms=HeadNorms(normal(head_dim), normal(head_dim), 0.3) if normed else None,
    )


def by_rows(case: Case, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of every row and slot, each head turned as complex numbers."""
    num_heads, num_kv_heads = case.num_heads, case.cache.key.shape[2]
    heads = case.qkv.double().numpy().reshape(*case.qkv.shape[:2], -1, case.head_dim)
    inv_freq, turned = case.inv_freq.double().numpy(), heads.copy()
    num_angles = len(inv_freq)
    for row, slot in np.ndindex(heads.shape[:2]):
        position = int(case.committed[slot]) + int(case.depth[first + row])
        for head in range(num_heads + num_kv_heads):
            x = heads[row, slot, head]
            if case.norms is not None:
                weight = case.norms.q_D if head < num_heads else case.norms.k_D
                x = x / np.sqrt(np.mean(x**2) + case.norms.eps) * weight.double().numpy()
                turned[row, slot, head] = x
            pairs = x[:num_angles] + 1j * x[num_angles : 2 * num_angles]
            pairs = pairs * np.exp(1j * position * inv_freq)
            turned[row, slot, head, : 2 * num_angles] = np.concatenate((pairs.real, pairs.imag))
    parts = torch.from_numpy(turned).split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return parts[0], parts[1], parts[2]


@FEW
@given(
    rotary_dim=st.sampled_from([2, 6, 8]),
    path=st.lists(st.integers(0, 6), max_size=4),
    first=st.integers(0, 1),
    normed=st.booleans(),
)
def test_reference_turns_every_row_and_appends_the_path(
    rotary_dim: int, path: list[int], first: int, normed: bool
) -> None:
    case = make_case(
        committed=[len(path), 24], paths=[path, [3]], head_dim=8, rotary_dim=rotary_dim,
        normed=normed,
    )  # fmt: skip
    before = KeyValues(*(buffer.clone() for buffer in case.cache))
    q, rows = case.store(reference, first)
    for name, actual, expected in zip("qkv", (q, *rows), by_rows(case, first), strict=True):
        assert_close(name, actual, expected)
    for old, new, previous in zip(before, case.cache, case.previous, strict=True):
        for slot, rows_of_path in enumerate((path, [3])):
            stop = int(case.committed[slot])
            old[slot, stop - len(rows_of_path) : stop] = previous[rows_of_path, slot]
        assert torch.equal(new.nan_to_num(), old.nan_to_num()), "the path and nothing else"


def check_kernel(case: Case, dtype: torch.dtype, device: str = "cpu", first: int = 0) -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, device)
    truth = ours.to(torch.float64, device)
    (q, rows), (true_q, true_rows) = ours.store(kernel, first), truth.store(reference, first)
    # An angle formed in fp32 is off by up to its own last digit.
    largest = int(case.committed.max()) + int(case.depth.max())
    tolerance = TOLERANCES[dtype] + largest * 2.0**-24
    assert_close("q", q, true_q, tolerance=tolerance)
    assert_close("k", rows.key, true_rows.key, tolerance=tolerance)
    assert torch.equal(rows.value.double(), true_rows.value), "values are copied"
    for kept, expected in zip(ours.cache, truth.cache, strict=True):
        assert torch.equal(kept.double().nan_to_num(), expected.nan_to_num()), "rows are copied"


KERNEL_CASES = {
    "one token": make_case(committed=[3], num_rows=1, paths=[[0]], capacity=1),
    "no path": make_case(committed=[0, 7]),
    "paths of 0 and 3": make_case(committed=[5, 24], paths=[[], [0, 2, 5]]),
    "half of a head": make_case(committed=[9], head_dim=32, rotary_dim=16),
    "many heads": make_case(committed=[2], num_heads=70, num_kv_heads=5, paths=[[1]]),
    "normed heads": make_case(
        committed=[9, 3], num_heads=6, head_dim=32, rotary_dim=8, paths=[[1, 2], []], normed=True
    ),
    "long path": make_case(
        committed=[20, 24], paths=[list(range(20)), [1] * 17], capacity=40, num_rows=1
    ),
}


@interpreted
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_interpreted_kernel_equals_the_reference(name: str) -> None:
    check_kernel(KERNEL_CASES[name], torch.float32)


@interpreted
def test_interpreted_kernel_writes_rows_from_the_first_one() -> None:
    check_kernel(KERNEL_CASES["no path"], torch.float32, first=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check_kernel(KERNEL_CASES[name], dtype, "cuda")
    check_kernel(KERNEL_CASES["no path"], dtype, "cuda", first=1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_kernel_on_sizes_of_models(num_rows: int, head_dim: int) -> None:
    case = make_case(
        committed=[1000, 0, 17, 999], num_rows=num_rows, num_heads=32, num_kv_heads=8,
        head_dim=head_dim, rotary_dim=head_dim, positions=1024, capacity=64,
        paths=[list(range(40)), [], [0, 2], list(range(64))],
    )  # fmt: skip
    check_kernel(case, torch.bfloat16, "cuda")


def check_far_positions(device: str) -> None:
    """Compare cos and sin, as rotations of unit vectors, with those of the same fp32 angles."""
    case = make_case(committed=[100_000, 3, (1 << 20) - 20], positions=1)
    ours = case.to(torch.float32, device)
    angle = (ours.depth[:3, None] + ours.committed)[..., None].float() * ours.inv_freq
    ours.qkv[..., : 4 * 16] = torch.cat((torch.ones(8), torch.zeros(8))).repeat(4)
    q, _ = ours.store(kernel)
    expected = torch.cat((angle.double().cos(), angle.double().sin()), dim=-1)
    assert (q - expected[:, :, None]).abs().max() < 1e-6


@interpreted
def test_interpreted_angles_of_far_positions_keep_their_digits() -> None:
    check_far_positions("cpu")


@pytest.mark.gpu
def test_angles_of_far_positions_keep_their_digits() -> None:
    check_far_positions("cuda")


def test_sizes_beyond_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes head dims .* got 8 and 8"):
        make_case(committed=[1], head_dim=8, rotary_dim=8).to(torch.float32).store(kernel)
    case = make_case(committed=[1]).to(torch.float32)
    with pytest.raises(ValueError, match=r"cover every row up to the last one scored, 6"):
        case.store(kernel, 3)
    with pytest.raises(ValueError, match=r"4 \+ 2 x 2 times 16, got 112 columns"):
        dataclasses.replace(case, qkv=case.qkv[..., :-16]).store(kernel)
    short = HeadNorms(torch.ones(8), torch.ones(16), 1e-6)
    with pytest.raises(ValueError, match=r"norms of heads have 16 weights, got \[\(8,\), "):
        dataclasses.replace(case, norms=short).store(kernel)
    with pytest.raises(ValueError, match=r"one dtype of torch.bfloat16, torch.float16, .*, got"):
        make_case(committed=[1]).store(kernel)
