"""Row-wise steps: the reference against formulas, the kernels against the reference.

Shape letters: M rows, K columns, D hidden, F MLP inner, V vocab.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear import residual as kernel, residual_ref as reference
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.testing import TOLERANCES, assert_close, poisoned

EPS = 1e-3
SCALE = 12.0
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "geglu", "relu2")
NARROW = (torch.bfloat16, torch.float16)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")


def normal(*shape: int) -> Tensor:
    """Return random numbers in float64 that depend on the shape alone."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def residual_of(stream: Tensor, dtype: torch.dtype) -> Residual:
    """Return a copy of the stream with values and sums still to be written."""
    stream = stream.clone()
    device, exact = stream.device, torch.promote_types(stream.dtype, torch.float32)
    same = stream.dtype == dtype
    values = stream if same else poisoned(*stream.shape, dtype=dtype, device=device)
    sums = poisoned(len(stream), stream.shape[1] // COLUMNS_PER_SUM, dtype=exact, device=device)
    return Residual(stream, values, sums)


def unscaled(values: Tensor, num_groups: int, num_sums: int) -> DeferredNorm:
    """Return rows with the sums of squares of their values."""
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    return DeferredNorm(values, exact.unflatten(1, (num_sums, -1)).square().sum(2), num_groups, EPS)


def test_reference_starts_from_the_embedding() -> None:
    embed, tokens = normal(7, 48), torch.tensor([3, 3, 0])
    residual = residual_of(normal(3, 48), torch.float64)
    reference.start_residual(embed, tokens, residual)
    assert torch.equal(residual.values_MD, embed[tokens])
    sums = embed[tokens].view(3, -1, COLUMNS_PER_SUM).square().sum(2)
    assert_close("sums", residual.square_sums_MQ, sums)


def test_reference_scales_the_embedding_before_it_rounds() -> None:
    embed, tokens = normal(7, 48).bfloat16(), torch.tensor([3, 3, 0])
    residual = residual_of(torch.empty(3, 48), torch.bfloat16)
    reference.start_residual(embed, tokens, residual, scale=0.3)
    assert torch.equal(residual.stream_MD, embed[tokens].float() * 0.3)
    assert torch.equal(residual.values_MD, residual.stream_MD.bfloat16())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_activates(activation: Activation) -> None:
    gate, up = normal(3, 10), normal(3, 11)[:, :10]
    inputs = torch.cat((gate, up), dim=1) if activation in GATED else up
    expected = {
        "swiglu": gate * gate.sigmoid() * up,
        "geglu": gate * torch.special.ndtr(gate) * up,
        "relu2": torch.where(up > 0, up * up, 0.0),
    }
    out = poisoned(3, 10, dtype=torch.float64)
    reference.activate(inputs, out, activation)
    assert_close("out", out, expected[activation])


def test_reference_adds_before_it_rounds() -> None:
    stream, product = normal(3, 32).float(), normal(3, 32)
    residual = residual_of(stream, torch.bfloat16)
    reference.add_residual(product, residual)
    assert torch.equal(residual.stream_MD, (stream + product).float())
    assert torch.equal(residual.values_MD, residual.stream_MD.bfloat16())
    sums = residual.stream_MD.view(3, -1, COLUMNS_PER_SUM).square().sum(2)
    assert_close("sums", residual.square_sums_MQ, sums)


def test_reference_scales_a_product_by_the_norm_of_its_rows() -> None:
    values, weight, stream = normal(3, 64), normal(32, 64), normal(3, 32)
    residual = residual_of(stream, torch.float64)
    reference.add_residual(values @ weight.T, residual, unscaled(values, 1, 4))
    norm = functional.rms_norm(values, (64,), eps=EPS)
    assert_close("stream", residual.stream_MD, stream + norm @ weight.T)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_reference_norm_equals_that_of_torch(num_groups: int) -> None:
    values, weight, out = normal(5, 96), normal(96), poisoned(5, 96, dtype=torch.float64)
    reference.scale_rows(unscaled(values, num_groups, 6), weight, out)
    groups = values.unflatten(1, (num_groups, -1))
    norm = functional.rms_norm(groups, groups.shape[2:], eps=EPS).flatten(1)
    assert_close("out", out, norm * weight)


def test_reference_without_a_norm_leaves_the_rows() -> None:
    values, out = normal(5, 96), poisoned(5, 96, dtype=torch.float64)
    reference.scale_rows(DeferredNorm(values, None, 1, EPS), None, out)
    assert torch.equal(out, values)


def run_residual(ops: Any, op: str, source: Tensor, residual: Residual) -> Residual:
    """Start from, or add, `source`."""
    if op == "start_residual":
        tokens = torch.arange(len(residual.stream_MD), device=source.device) % 3
        ops.start_residual(source, tokens, residual, scale=SCALE)
    else:
        ops.add_residual(source, residual)
    return residual


def check_residual_op(
    op: str, num_rows: int, hidden: int, dtype: torch.dtype, stream_dtype: torch.dtype, device: str
) -> None:
    """Compare a kernel with the reference in float64 on the values that the kernel sees."""
    stream = normal(num_rows, hidden).to(device, stream_dtype)
    source = normal(3 if op == "start_residual" else num_rows, hidden).to(device, dtype)
    ours = run_residual(kernel, op, source, residual_of(stream, dtype))
    truth = residual_of(stream.double(), torch.float64)
    run_residual(reference, op, source.double(), truth)
    # The sums are of what the stream holds, which is rounded where it is narrow.
    tolerance = TOLERANCES[stream_dtype] if stream_dtype in NARROW else None
    assert_close("stream", ours.stream_MD, truth.stream_MD)
    assert_close("values", ours.values_MD, truth.values_MD)
    assert_close("sums", ours.square_sums_MQ, truth.square_sums_MQ, tolerance=tolerance)
    exact = ours.stream_MD.double().unflatten(1, (-1, COLUMNS_PER_SUM)).square().sum(2)
    assert_close("sums", ours.square_sums_MQ, exact)


def check_late_norm(num_rows: int, num_inner: int, hidden: int, device: str) -> None:
    """Compare the kernel with the reference in float64 where the product still lacks its norm."""
    rows = unscaled(normal(num_rows, num_inner).to(device, torch.float32), 1, num_inner // 16)
    exact = unscaled(rows.values_MK.double(), 1, num_inner // 16)
    product = normal(num_rows, hidden).to(device, torch.float32)
    ours = residual_of(normal(num_rows, hidden).to(device, torch.float32), torch.float32)
    truth = residual_of(ours.stream_MD.double(), torch.float64)
    kernel.add_residual(product, ours, rows)
    reference.add_residual(product.double(), truth, exact)
    assert_close("stream", ours.stream_MD, truth.stream_MD)
    assert_close("sums", ours.square_sums_MQ, truth.square_sums_MQ)


def check_scale_rows(
    num_rows: int, num_inner: int, num_groups: int, num_sums: int, *, weighted: bool,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    values = normal(num_rows, num_inner).to(device, dtype)
    weight = normal(num_inner).to(device, dtype) if weighted else None
    out = poisoned(num_rows, num_inner + 1, dtype=dtype, device=device)
    truth = poisoned(num_rows, num_inner, dtype=torch.float64, device=device)
    kernel.scale_rows(unscaled(values, num_groups, num_sums), weight, out[:, :-1])
    exact = None if weight is None else weight.double()
    reference.scale_rows(unscaled(values.double(), num_groups, num_sums), exact, truth)
    assert_close("out", out[:, :-1], truth)
    assert out[:, -1].isnan().all(), "only the columns asked for are written"


def check_activate(
    num_rows: int, inner: int, activation: Activation, dtype: torch.dtype, device: str
) -> None:
    """Compare the kernel with the reference in float64 on the values that the kernel sees."""
    num_inputs = 2 * inner if activation in GATED else inner
    inputs = normal(num_rows, num_inputs).to(device, dtype)
    out = poisoned(num_rows, inner + 1, dtype=dtype, device=device)
    truth = poisoned(num_rows, inner, dtype=torch.float64, device=device)
    kernel.activate(inputs, out[:, :-1], activation)
    reference.activate(inputs.double(), truth, activation)
    assert_close("out", out[:, :-1], truth)
    assert out[:, -1].isnan().all(), "only the columns asked for are written"


def check_join_rows(
    num_rows: int, num_slots: int, hidden: int, dtype: torch.dtype, device: str, *, shared: bool
) -> None:
    """Compare the kernel with the reference in float64; sources are of every slot, or shared."""
    random = torch.Generator().manual_seed(num_rows)
    embed = normal(7, hidden).to(device, dtype)
    states = normal(5, num_slots, hidden).to(device, dtype)
    tokens = torch.randint(7, (num_rows, num_slots), generator=random).to(device)
    # A table of paths is [B, L]; a tree's is the same for all slots.
    source = torch.randint(5, (num_slots, num_rows), generator=random, dtype=torch.int32).t()
    source = (source[:, :1].long().expand(-1, num_slots) if shared else source).to(device)

    size = (num_rows * num_slots, 2 * hidden)
    ours = poisoned(*size, dtype=dtype, device=device)
    truth = poisoned(*size, dtype=torch.float64, device=device)
    kernel.join_rows(embed, tokens, states, source, ours, eps=EPS, scale=SCALE)
    exact = (embed.double(), tokens, states.double(), source)
    reference.join_rows(*exact, truth, eps=EPS, scale=SCALE)
    assert_close("rows", ours, truth)


def test_reference_joins_the_norms_of_an_embedding_and_a_hidden_state() -> None:
    embed, states = normal(3, 16), normal(2, 2, 16)
    out = torch.empty(2, 32).double()
    tokens, source = torch.tensor([[2, 0]]), torch.tensor([[1, 0]])
    reference.join_rows(embed, tokens, states, source, out, eps=EPS, scale=SCALE)
    for row, (first, second) in enumerate(((embed[2], states[1, 0]), (embed[0], states[0, 1]))):
        halves = (functional.rms_norm(x, (16,), eps=EPS) for x in (SCALE * first, second))
        assert_close("row", out[row], torch.cat(tuple(halves)))


@interpreted
@pytest.mark.parametrize("hidden", [48, 1040])
@pytest.mark.parametrize("shared", [False, True])
def test_interpreted_joined_rows_equal_the_reference(hidden: int, shared: bool) -> None:
    check_join_rows(3, 2, hidden, torch.float32, "cpu", shared=shared)
    check_join_rows(1, 1, hidden, torch.float32, "cpu", shared=shared)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_joined_rows_equal_the_reference(dtype: torch.dtype, shared: bool) -> None:
    for num_rows, num_slots in ((1, 1), (4, 1), (3, 5), (8, 32)):
        check_join_rows(num_rows, num_slots, 2688, dtype, "cuda", shared=shared)


@interpreted
@pytest.mark.parametrize("op", ["start_residual", "add_residual"])
@pytest.mark.parametrize("hidden", [48, 1040])
def test_interpreted_residual_equals_the_reference(op: str, hidden: int) -> None:
    check_residual_op(op, 4, hidden, torch.float32, torch.float32, "cpu")


@interpreted
def test_interpreted_late_norm_equals_the_reference() -> None:
    check_late_norm(3, 48, 40, "cpu")


@interpreted
def test_interpreted_norm_equals_the_reference() -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    check_scale_rows(3, 96, 3, 6, weighted=True, **options)
    check_scale_rows(2, 1040, 1, 65, weighted=False, **options)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interpreted_activation_equals_the_reference(activation: Activation) -> None:
    check_activate(3, 1030, activation, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interpreted_activation_keeps_nan(activation: Activation) -> None:
    out = torch.zeros(1, 2)
    kernel.activate(torch.full((1, 4 if activation in GATED else 2), torch.nan), out, activation)
    assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["start_residual", "add_residual"])
@pytest.mark.parametrize("num_rows", [1, 5, 300])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_residual_equals_the_reference(
    op: str, num_rows: int, dtype: torch.dtype, wide: bool
) -> None:
    stream_dtype = torch.float32 if wide else dtype
    check_residual_op(op, num_rows, 2560, dtype, stream_dtype, "cuda")


@pytest.mark.gpu
def test_late_norm_equals_the_reference() -> None:
    check_late_norm(300, 5120, 2560, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_norm_and_activation_equal_the_reference(num_rows: int, dtype: torch.dtype) -> None:
    check_scale_rows(num_rows, 4096, 32, 32, weighted=True, dtype=dtype, device="cuda")
    check_scale_rows(num_rows, 2560, 1, 160, weighted=False, dtype=dtype, device="cuda")
    for activation in ACTIVATIONS:
        check_activate(num_rows, 14336, activation, dtype, "cuda")


def test_what_does_not_fit_is_refused() -> None:
    rows = unscaled(normal(2, 32).float(), 1, 2)
    out = torch.empty(2, 32)
    with pytest.raises(ValueError, match=r"the output is \(2, 32\), got \(2, 16\)"):
        kernel.scale_rows(rows, None, torch.empty(2, 16))
    residual = residual_of(out, torch.float32)
    with pytest.raises(ValueError, match=r"in the model's dtype is its own values"):
        kernel.add_residual(out, residual._replace(values_MD=out.clone()))
    with pytest.raises(ValueError, match=r"the product is \(2, 32\), got \(3, 32\)"):
        kernel.add_residual(torch.empty(3, 32), residual)
    with pytest.raises(ValueError, match=r"the activation's inputs is \(2, 64\), got \(2, 32\)"):
        kernel.activate(out, torch.empty(2, 32), "geglu")
