"""Projections of unscaled rows: the reference against formulas, the kernel against the reference.

Shape letters: M rows, K columns in, N columns out, D hidden, F MLP inner, Q partial sums of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.settings import GATED
from stree_kernels.linear import linear as kernel, linear_ref as reference
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.linear.gemv_kernel import GemvConfig
from stree_kernels.linear.linear_kernel import LinearConfig
from stree_kernels.linear.residual_ref import normalised
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

EPS = 1e-3
ACTIVATIONS = ("swiglu", "geglu", "relu2")
OPS = ("linear", "linear_add", *ACTIVATIONS)
"""An activation stands for `linear_activated` with it."""
NARROW = (torch.bfloat16, torch.float16)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


@dataclasses.dataclass(frozen=True)
class Case:
    """The tensors of one projection, in float64 until moved."""

    values: Tensor
    weight: Tensor
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

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Return a copy in another dtype; the stream of a 16-bit case stays in fp32."""
        stream_dtype = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            values=self.values.to(device, dtype),
            weight=self.weight.to(device, dtype),
            stream=self.stream.to(device, stream_dtype),
        )

    def run(
        self, ops: Any, op: str, *, out_dtype: torch.dtype | None = None, own_values: bool = False
    ) -> tuple[Tensor, ...]:
        """Return all that an op writes, into poisoned buffers with a column more than the rows."""
        weight, dtype, device = self.weight, self.weight.dtype, self.weight.device
        num_rows, num_columns = self.stream.shape
        if op == "linear_add":
            residual = residual_of(self.stream.to(dtype) if own_values else self.stream, dtype)
            following = ops.linear_add(self.rows(), weight, residual, eps=EPS)
            return (*residual, normalised(following))
        size = num_columns // 2 if op in GATED else num_columns
        out = poisoned(num_rows, size + 1, dtype=out_dtype or dtype, device=device)
        if op in ACTIVATIONS:
            ops.linear_activated(self.rows(), weight, out[:, :-1], op)
        else:
            ops.linear(self.rows(), weight, out[:, :-1])
        assert out[:, -1].isnan().all(), "only the columns asked for are written"
        return (out[:, :-1],)


def residual_of(stream: Tensor, dtype: torch.dtype) -> Residual:
    """Return a copy of the stream with values and sums still to be written."""
    stream = stream.clone()
    values = stream if stream.dtype == dtype else poisoned(*stream.shape, dtype=dtype)
    sums_dtype = torch.promote_types(stream.dtype, torch.float32)
    sums = poisoned(len(stream), stream.shape[1] // COLUMNS_PER_SUM, dtype=sums_dtype)
    return Residual(stream, values.to(stream.device), sums.to(stream.device))


def make_case(
    num_rows: int, num_inner: int, num_columns: int, *, num_groups: int = 1,
    num_sums: int | None = None,
) -> Case:  # fmt: skip
    """Build a case in float64; rows differ in size, so that a norm matters."""
    random = torch.Generator().manual_seed(num_rows)
    values = torch.randn(num_rows, num_inner, generator=random, dtype=torch.float64)
    weight = torch.randn(num_columns, num_inner, generator=random, dtype=torch.float64)
    stream = torch.randn(num_rows, num_columns, generator=random, dtype=torch.float64)
    values *= torch.logspace(-1, 1, num_inner, dtype=torch.float64)
    values *= torch.logspace(0, 1, num_rows, dtype=torch.float64)[:, None]
    return Case(values, weight / num_inner**0.5, stream, num_groups, num_sums)


def by_formula(case: Case, op: str) -> Tensor:
    """Return the product after torch's own norm, or what the op makes of it, in float64."""
    x = case.values
    if case.num_sums is not None:
        groups = x.unflatten(1, (case.num_groups, -1))
        x = functional.rms_norm(groups, groups.shape[2:], eps=EPS).flatten(1)
    product = x @ case.weight.T
    if op in GATED:
        gate, up = product.chunk(2, dim=1)
        return (functional.silu if op == "swiglu" else functional.gelu)(gate) * up
    if op == "relu2":
        return product.clamp(min=0) ** 2
    return product + case.stream if op == "linear_add" else product


CASES = {
    "one row": make_case(1, 320, 48, num_sums=4),
    "one row with groups": make_case(1, 96, 32, num_groups=3, num_sums=6),
    "no norm": make_case(2, 48, 32),
    "one norm": make_case(3, 64, 48, num_sums=4),
    "grouped norm": make_case(5, 96, 32, num_groups=3, num_sums=6),
    "many grouped rows": make_case(17, 96, 32, num_groups=3, num_sums=3),
    "rows that fill a tile": make_case(8, 32, 64, num_sums=1),
    "more rows than a tile": make_case(9, 16, 32, num_sums=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_reference_equals_the_formula(name: str, op: str) -> None:
    out, *others = CASES[name].run(reference, op)
    assert_close("out", out, by_formula(CASES[name], op))
    if others:
        values, sums, following = others
        assert torch.equal(values, out)
        assert_close("next rows", following, functional.rms_norm(out, out.shape[1:], eps=EPS))
        assert_close("sums", sums, out.square().unflatten(1, (-1, COLUMNS_PER_SUM)).sum(2))


def test_a_stream_in_a_wider_dtype_is_rounded_once() -> None:
    stream, values, sums, _ = CASES["one norm"].to(torch.bfloat16).run(reference, "linear_add")
    assert stream.dtype == torch.float32
    assert torch.equal(values, stream.bfloat16())
    assert_close("sums", sums, stream.square().unflatten(1, (-1, COLUMNS_PER_SUM)).sum(2))


def check_kernel(
    case: Case, op: str, dtype: torch.dtype, device: str = "cpu", **options: Any
) -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    ours = case.to(dtype, device)
    # Groups, and cuBLAS, take rows that are rounded after the norm; a narrow stream is rounded.
    early = case.num_groups > 1 or kernel.pick_config(len(case.values), ours.weight) is None
    rounded = dtype in NARROW and (early or options.get("own_values"))
    tolerance = TOLERANCES[dtype] if rounded else None
    truth = ours.to(torch.float64, device)
    names = ("out", "values", "sums", "next rows")
    for name, actual, expected in zip(
        names, ours.run(kernel, op, **options), truth.run(reference, op), strict=False
    ):
        # The next rows' values are rounded to the model's dtype.
        narrow = name == "next rows" and dtype in NARROW
        coarse = TOLERANCES[dtype] if narrow else tolerance
        assert_close(name, actual, expected, tolerance=coarse)


Config = GemvConfig | LinearConfig | None


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """Take one config for all sizes."""
    monkeypatch.setattr(kernel, "pick_config", lambda *_, **__: config)


CONFIGS: dict[str, tuple[str, Config]] = {
    "one row, warps across rows": ("one row", GemvConfig(8, 2, 1, depth=1)),
    "one row, warps across columns": ("one row with groups", GemvConfig(8, 1, 2, depth=2)),
    "steps ahead": ("one norm", LinearConfig(16, 1, depth=3, rows_depth=1, weight_first=True)),
    "groups": ("grouped norm", LinearConfig(16, 2, depth=1, rows_depth=2, weight_first=True)),
    "rows first": ("grouped norm", LinearConfig(8, 2, depth=1, rows_depth=1)),
    "a step beyond the columns": ("no norm", LinearConfig(16, 4, depth=2, rows_depth=2)),
    "weight first": ("more rows than a tile", LinearConfig(32, 2, 1, 1, weight_first=True)),
    "cuBLAS": ("grouped norm", None),
    "cuBLAS without a norm": ("no norm", None),
}


@interpreted
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("op", OPS)
def test_interpreted_kernels_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str
) -> None:
    case, config = CONFIGS[name]
    use(monkeypatch, config)
    check_kernel(CASES[case], op, torch.float32)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_interpreted_ops_take_any_rows(name: str) -> None:
    check_kernel(CASES[name], "linear", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_kernel_equals_the_reference(name: str, op: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], op, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 16, 33, 64, 65, 200])
@pytest.mark.parametrize("op", OPS)
def test_kernel_on_sizes_of_models(num_rows: int, op: str) -> None:
    check_kernel(make_case(num_rows, 2560, 1056, num_sums=160), op, torch.bfloat16, "cuda")
    grouped = make_case(num_rows, 4096, 512, num_groups=32, num_sums=32)
    check_kernel(grouped, op, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4, 33])
@pytest.mark.parametrize("op", OPS)
def test_kernel_in_fp16_on_sizes_of_models(num_rows: int, op: str) -> None:
    check_kernel(make_case(num_rows, 2560, 1056, num_sums=160), op, torch.float16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4])
def test_kernel_takes_the_widest_rows_of_models(num_rows: int) -> None:
    check_kernel(make_case(num_rows, 21504, 4096), "linear_add", torch.bfloat16, "cuda")
    check_kernel(make_case(num_rows, 4096, 21504, num_sums=512), "relu2", torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [4, 100])
def test_kernel_takes_a_stream_and_logits_of_their_own_dtype(num_rows: int) -> None:
    case = make_case(num_rows, 768, 3360, num_sums=48)
    check_kernel(case, "linear", torch.bfloat16, "cuda", out_dtype=torch.float32)
    check_kernel(case, "linear_add", torch.bfloat16, "cuda", own_values=True)


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_again() -> None:
    case = make_case(8, 2560, 1056, num_sums=160).to(torch.bfloat16, "cuda")
    first = case.run(kernel, "linear_add")
    for _ in range(20):
        assert all(map(torch.equal, case.run(kernel, "linear_add"), first)), "not deterministic"


def test_sizes_beyond_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a multiple of 16 columns, got 24"):
        make_case(2, 24, 32).to(torch.float32).run(kernel, "linear")
    with pytest.raises(ValueError, match=r"a multiple of 32 columns, got 16"):
        make_case(2, 48, 32, num_groups=3, num_sums=3).to(torch.float32).run(kernel, "linear")
    with pytest.raises(ValueError, match=r"divide the sums of squares .* got 3, 4 and 96"):
        make_case(2, 96, 32, num_groups=3, num_sums=4).to(torch.float32).run(kernel, "linear")
    with pytest.raises(ValueError, match=r"one sum of squares for 8 columns, got stream \(2, 36\)"):
        make_case(2, 32, 36).to(torch.float32).run(kernel, "linear_add")
    with pytest.raises(
        ValueError, match=r"rows: one dtype of torch.bfloat16, torch.float16, .*, got"
    ):
        CASES["one norm"].run(kernel, "linear")
