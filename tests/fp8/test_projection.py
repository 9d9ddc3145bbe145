"""Projections by weights in FP8: kernels against the reference on the same codes and scales.

Shape letters: M rows, K columns in, N columns out, Q partial sums of a row.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from stree_kernels.fp8 import decode, projection as kernel, projection_ref as reference
from stree_kernels.fp8.dequantise import dequantise
from stree_kernels.fp8.scaled_weight import CODES, ScaledWeight, StackedWeight, random_scaled
from stree_kernels.launch.settings import GATED
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.linear.linear_kernel import LinearConfig
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

EPS = 1e-3
OPS = ("linear", "linear_add", "swiglu", "geglu", "relu2")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclasses.dataclass(frozen=True)
class Case:
    """One projection: rows of some dtype, a weight in FP8, a stream."""

    values: Tensor
    weight: ScaledWeight
    stream: Tensor
    num_groups: int
    num_sums: int | None

    def rows(self) -> DeferredNorm:
        """Return the input; its sums of squares are exact for its values."""
        if self.num_sums is None:
            return DeferredNorm(self.values, None, 1, EPS)
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        runs = self.values.to(dtype).unflatten(1, (self.num_sums, -1))
        return DeferredNorm(self.values, runs.square().sum(2), self.num_groups, EPS)

    def exact(self) -> Case:
        """Return the same numbers in float64."""
        w = self.weight
        factor = None if w.column_factor_K is None else w.column_factor_K.double()
        weight = dataclasses.replace(
            w, scales=w.scales.double(), column_factor_K=factor, dtype=torch.float64
        )
        return dataclasses.replace(
            self, values=self.values.double(), weight=weight, stream=self.stream.double()
        )

    def run(self, ops: Any, op: str) -> tuple[Tensor, ...]:
        """Return all that an op writes, into poisoned buffers with a column more than the rows."""
        dtype, device = self.values.dtype, self.values.device
        num_rows, num_columns = self.stream.shape
        if op == "linear_add":
            stream = self.stream.clone()
            values = stream
            if stream.dtype != dtype:
                values = poisoned(*stream.shape, dtype=dtype, device=device)
            sums = poisoned(
                num_rows, num_columns // COLUMNS_PER_SUM, dtype=stream.dtype, device=device
            )
            ops.linear_add(self.rows(), self.weight, Residual(stream, values, sums), eps=EPS)
            return stream, values, sums
        size = num_columns // 2 if op in GATED else num_columns
        out = poisoned(num_rows, size + 1, dtype=dtype, device=device)
        if op == "linear":
            ops.linear(self.rows(), self.weight, out[:, :-1])
        else:
            ops.linear_activated(self.rows(), self.weight, out[:, :-1], op)
        assert out[:, -1].isnan().all(), "only the columns asked for are written"
        return (out[:, :-1],)


def make_case(
    num_rows: int, num_inner: int, num_columns: int, *, num_groups: int = 1,
    num_sums: int | None = None, row_group: int = 128, column_block: int | None = None,
    factor: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Case:  # fmt: skip
    """Build a case; rows differ in size, so that a norm matters, and codes are of every size."""
    random = torch.Generator(device).manual_seed(num_rows)
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.randn(num_rows, num_inner, generator=random, device=device)
    values *= torch.logspace(-1, 1, num_inner, device=device)
    values *= torch.logspace(0, 1, num_rows, device=device)[:, None]
    # Without a norm activations would overflow.
    values *= 1.0 if num_sums else 0.05
    weight = random_scaled(
        (num_columns, num_inner), dtype, random, row_group=row_group, column_block=column_block
    )
    # Every finite code, subnormal ones among them.
    some = torch.arange(126, device=device, dtype=torch.uint8).repeat(num_inner // 126 + 1)
    weight.codes.view(torch.uint8)[0] = some[:num_inner]
    if factor:
        weight = weight.times_columns(torch.rand(num_inner, generator=random, device=device) + 0.5)
    stream = torch.randn(num_rows, num_columns, generator=random, device=device).to(wide)
    return Case(values.to(dtype), weight, stream, num_groups, num_sums)


CASES: dict[str, dict[str, Any]] = {
    "tensor": {"sizes": (1, 320, 48), "num_sums": 4},
    "channel": {"sizes": (3, 192, 48), "row_group": 1, "factor": True},
    "block": {"sizes": (1, 256, 64), "row_group": 32, "column_block": 64, "num_sums": 4},
    "block with a factor": {
        "sizes": (5, 320, 64), "row_group": 32, "column_block": 128, "num_sums": 4, "factor": True,
    },
    "ragged blocks": {"sizes": (2, 192, 40), "row_group": 16, "column_block": 128},
    "small row groups": {"sizes": (4, 128, 64), "row_group": 4, "column_block": 64},
    "one row, small row groups": {"sizes": (1, 192, 64), "row_group": 4, "column_block": 64},
    "grouped norm": {
        "sizes": (4, 192, 32), "num_groups": 3, "num_sums": 6, "column_block": 64, "factor": True,
    },
    "one row with groups": {
        "sizes": (1, 192, 32), "num_groups": 3, "num_sums": 6, "row_group": 16, "factor": True,
    },
    "many rows": {"sizes": (17, 192, 48), "column_block": 128, "num_sums": 4, "factor": True},
    "tiles": {
        "sizes": (33, 320, 72), "row_group": 8, "column_block": 64, "num_sums": 4, "factor": True,
    },
    "40 streamed rows": {
        "sizes": (40, 336, 176), "row_group": 16, "column_block": 128, "num_sums": 42,
        "factor": True,
    },
    "100 streamed rows": {
        "sizes": (100, 768, 208), "num_groups": 3, "num_sums": 6, "column_block": 128,
        "factor": True,
    },
    "tiles by channel": {"sizes": (20, 192, 40), "row_group": 1},
    "more rows than tiles take": {"sizes": (130, 192, 48), "column_block": 128, "num_sums": 4},
}  # fmt: skip


def case_of(name: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    options = dict(CASES[name])
    return make_case(*options.pop("sizes"), **options, dtype=dtype, device=device)


def check(case: Case, op: str) -> None:
    """Compare the kernel with the reference in float64 on the same values, codes and scales."""
    dtype = case.values.dtype
    narrow = dtype != torch.float32
    names = ("out", "values", "sums")
    pairs = zip(names, case.run(kernel, op), case.exact().run(reference, op), strict=False)
    for name, actual, expected in pairs:
        # Rows are rounded once they have the columns' factor, or their norm.
        assert_close(name, actual, expected, tolerance=TOLERANCES[dtype] if narrow else None)


SMALL: dict[str, LinearConfig | None] = {
    "tensor": LinearConfig(16, 2, 1, 1),
    "block": LinearConfig(16, 4, 2, 2, weight_first=True),
    "one row, small row groups": LinearConfig(16, 1, 1, 1),
    "one row with groups": LinearConfig(16, 2, 2, 2),
    "channel": LinearConfig(16, 1, 2, 1, weight_first=True),
    "block with a factor": LinearConfig(32, 2, 2, 2, weight_first=True),
    "ragged blocks": LinearConfig(16, 2, 1, 1, weight_first=True),
    "small row groups": LinearConfig(16, 1, 1, 1),
    "grouped norm": LinearConfig(16, 2, 1, 2),
    "many rows": None,
    "tiles": None,
}


@interpreted
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("op", ["linear", "linear_add", "swiglu"])
def test_interpreted_kernels_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str
) -> None:
    monkeypatch.setattr(kernel, "pick_config", lambda *_, **__: SMALL[name])
    monkeypatch.setattr(kernel, "takes_tiles", lambda *_: name == "tiles")
    check(case_of(name, torch.float32), op)


def check_stack(num_rows: int, dtype: torch.dtype, device: str) -> None:
    """Compare a projection that is in FP8 in part with the reference of both parts."""
    case = make_case(num_rows, 192, 48, num_sums=4, dtype=dtype, device=device)
    random = torch.Generator(device).manual_seed(3)
    other = torch.randn(16, 192, generator=random, device=device).to(dtype)
    stacked = StackedWeight((case.weight, other))
    exact = StackedWeight((case.exact().weight, other.double()))
    out = poisoned(num_rows, len(stacked), dtype=dtype, device=device)
    truth = poisoned(num_rows, len(stacked), dtype=torch.float64, device=device)
    kernel.linear(case.rows(), stacked, out)
    reference.linear(case.exact().rows(), exact, truth)
    assert_close("out", out, truth)


@interpreted
@pytest.mark.parametrize("num_rows", [1, 3])
def test_interpreted_parts_are_multiplied_apart(num_rows: int) -> None:
    check_stack(num_rows, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 40, 200])
def test_parts_are_multiplied_apart(num_rows: int) -> None:
    check_stack(num_rows, torch.bfloat16, "cuda")


@interpreted
def test_interpreted_dequantisation_has_the_reference_bits() -> None:
    for name in ("block with a factor", "ragged blocks", "channel"):
        weight = case_of(name, torch.float32).weight
        assert torch.equal(dequantise(weight), weight.dequantised())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_kernel_equals_the_reference(name: str, op: str) -> None:
    check(case_of(name, torch.bfloat16, "cuda"), op)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_kernel_equals_the_reference_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check(case_of(name, dtype, "cuda"), "linear")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 16, 17, 40, 64, 100, 128])
@pytest.mark.parametrize("op", OPS)
def test_kernel_on_sizes_of_models(num_rows: int, op: str) -> None:
    block: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "column_block": 128}
    check(make_case(num_rows, 4096, 2336, num_sums=512, factor=True, **block), op)
    check(make_case(num_rows, 14336, 1024, **block), op)
    grouped = make_case(num_rows, 4096, 1024, num_groups=32, num_sums=64, factor=True, **block)
    check(grouped, op)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantisation_has_the_reference_bits(name: str, dtype: torch.dtype) -> None:
    weight = case_of(name, dtype, "cuda").weight
    assert torch.equal(dequantise(weight), weight.dequantised())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 64, 128])
def test_kernel_gives_the_same_bits_again(num_rows: int) -> None:
    case = make_case(
        num_rows, 4096, 1056, num_sums=512, column_block=128, dtype=torch.bfloat16, device="cuda"
    )
    first = case.run(kernel, "linear_add")
    for _ in range(20):
        assert all(map(torch.equal, case.run(kernel, "linear_add"), first)), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 32, 40, 100])
def test_every_code_is_decoded_exactly(num_rows: int, dtype: torch.dtype) -> None:
    # One column of the rows is 1 at a time, so that each output is one code.
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = torch.where(codes % 128 == 127, 0, codes).view(16, 16).repeat(2, 4)
    weight = ScaledWeight(
        codes.view(CODES), torch.ones(1, 1, device="cuda"), 128, codes.shape[1], dtype
    )
    for column in range(16):
        values = torch.zeros(num_rows, 64, dtype=dtype, device="cuda")
        values[:, column] = 1
        out = poisoned(num_rows, 32, dtype=torch.float32, device="cuda")
        kernel.linear(DeferredNorm(values, None, 1, EPS), weight, out)
        assert torch.equal(out, weight.codes.float()[:, column].expand(num_rows, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_in_registers_is_exact_for_every_code(dtype: torch.dtype) -> None:
    # What the inline assembly does, step by step; the GPU tests run it.
    text = (decode._BF16_ASM if dtype == torch.bfloat16 else decode._FP16_ASM).value
    (shift,) = set(map(int, re.findall(r"shr\.b32 \w+, \w+, (\d+)", text)))
    mask, sign_mask, power = (
        int(text.split(before)[1][:8], 16)
        for before in ("and.b32 low, low, 0x", "and.b32 sign, low, 0x", "mov.b32 power, 0x")
    )
    codes = torch.arange(256, dtype=torch.int64)
    codes = codes[codes % 128 != 127]
    high = codes << 8
    bits = (high & sign_mask & 0xFFFF) | ((high >> shift) & mask & 0xFFFF)
    half = ((bits + (1 << 15)) % (1 << 16) - (1 << 15)).to(torch.int16).view(dtype)
    times = torch.tensor(power & 0xFFFF, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = codes.to(torch.uint8).view(CODES).double()
    assert torch.equal(half.double() * times.double(), exact)
    assert torch.equal(exact.to(dtype).double(), exact)
    assert re.findall(r"prmt\.b32 \w+, \$2, 0, 0x(\d+)", text) == ["1404", "3424"]


def test_sizes_beyond_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a multiple of 16 columns for a weight in FP8, got 24"):
        make_case(2, 24, 32).run(kernel, "linear")
    with pytest.raises(ValueError, match=r"a multiple of 64 columns for .*, got 32"):
        make_case(2, 96, 32, num_groups=3, num_sums=3).run(kernel, "linear")
    with pytest.raises(ValueError, match=r"has a multiple of 64 columns, or all of them, got 16"):
        make_case(2, 64, 32, column_block=16).run(kernel, "linear")
    case = make_case(2, 64, 32)
    narrow = dataclasses.replace(case, values=case.values.bfloat16())
    with pytest.raises(ValueError, match=r"the rows: one dtype of torch\.float32"):
        narrow.run(kernel, "linear")
