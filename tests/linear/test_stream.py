"""Streamed projections: who owns what, the sum of shares, and the kernel against float64.

Gluon cannot be interpreted: here the kernel's own code runs on stand-ins for what it calls.

Shape letters: M rows, K columns in, N columns out, D hidden, R ranks.
"""

from __future__ import annotations

import pytest
import torch
from gluon_stand_ins import Descriptor, Launcher
from hypothesis import given, settings, strategies as st
from torch.nn import functional

from stree_kernels.launch.settings import GATED, Activation
from stree_kernels.linear import linear as op, linear_ref as reference, stream_kernel
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM, DeferredNorm, Residual
from stree_kernels.linear.residual_ref import normalised
from stree_kernels.linear.shares import BLOCK, add_shares
from stree_kernels.linear.stream_kernel import bounds, part_of
from stree_kernels.linear.stream_plan import BOX_K, StreamConfig, StreamPlan, make_plan
from stree_kernels.testing import assert_close, poisoned

EPS = 1e-3
FEW = settings(max_examples=60, deadline=None, derandomize=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
CONFIGS = (
    StreamConfig(128, 1), StreamConfig(64, 2), StreamConfig(200, 2, max_rows=256),
    StreamConfig(32, 1, 2),
)  # fmt: skip
MODELS = ((10576, 2560), (2560, 5120), (14336, 4096), (4096, 14336), (50288, 2560), (3352, 768))
"""Columns out and in of shipped models' projections."""


def items_of(plan: StreamPlan, part: int, num_outputs: int) -> list[tuple[int, int, int]]:
    """Return (first row, end of the tile's rows, step) of each item of a program, in its order."""
    if plan.shares:
        begin, end = bounds.fn(part, -(-num_outputs // plan.group) * plan.steps, plan.num_programs)
        places = [divmod(place, plan.steps) for place in range(begin, end)]
        ends = [min((tile + 1) * plan.group, num_outputs) for tile, _ in places]
        return [
            (tile * plan.group, end, step) for (tile, step), end in zip(places, ends, strict=True)
        ]
    first, last = bounds.fn(part, -(-num_outputs // plan.group), plan.num_programs)
    items = []
    for tile in range(plan.tiles):
        begin, end = bounds.fn(tile, last - first, plan.tiles)
        row, end_row = (first + begin) * plan.group, (first + end) * plan.group
        items += [(row, min(end_row, num_outputs), step) for step in range(plan.steps)]
    return items


def check_plan(plan: StreamPlan, num_outputs: int, num_inner: int) -> None:
    """Check that each box of the weight is multiplied once, from a slot that holds it."""
    tile_rows = plan.group * plan.num_boxes
    seen: dict[tuple[int, int], int] = {}
    for part in range(plan.num_programs):
        items = items_of(plan, part, num_outputs)
        slots: dict[int, int] = {s: s for s in range(plan.stages)}
        for current, (row, end_row, step) in enumerate(items):
            assert slots[current % plan.stages] == current, "the slot holds another item"
            if current:
                ahead = current - 1 + plan.stages
                slots[ahead % plan.stages] = ahead
            assert end_row - row <= tile_rows, "a tile has more rows than boxes"
            for group_row in range(row, end_row, plan.group):
                seen[group_row, step] = seen.get((group_row, step), 0) + 1
    assert set(seen.values()) == {1}, "a part of the weight is multiplied twice"
    assert len(seen) == -(-num_outputs // plan.group) * plan.steps, "a part is left out"
    assert plan.steps * plan.splits * BOX_K >= num_inner
    assert plan.num_boxes * plan.box_rows <= plan.mma_rows


@FEW
@given(
    config=st.sampled_from(CONFIGS),
    num_rows=st.integers(1, 128),
    num_outputs=st.one_of(st.integers(1, 700).map(lambda count: 8 * count), st.integers(1, 5600)),
    num_inner=st.integers(1, 60).map(lambda count: 16 * count),
    num_sms=st.sampled_from([1, 7, 114, 132]),
    gated=st.booleans(),
    shares=st.booleans(),
)
def test_every_part_of_a_weight_is_multiplied_once(
    config: StreamConfig, num_rows: int, num_outputs: int, num_inner: int, num_sms: int,
    gated: bool, shares: bool,
) -> None:  # fmt: skip
    gated = gated and not shares
    plan = make_plan(config, num_rows, num_outputs, num_inner, num_sms, gated=gated, shares=shares)
    check_plan(plan, num_outputs, num_inner)
    assert num_rows <= plan.block_m <= max(8, 2 * num_rows)
    assert plan.stages >= 2


@pytest.mark.parametrize("sizes", MODELS)
def test_models_weights_fit_the_ring_and_keep_programs_busy(sizes: tuple[int, int]) -> None:
    for num_rows, shares in ((9, False), (64, False), (16, True), (64, True)):
        plan = make_plan(op.STREAM_CONFIG, num_rows, *sizes, 132, gated=False, shares=shares)
        check_plan(plan, *sizes)
        assert plan.ring_bytes <= op.STREAM_CONFIG.ring_kib << 10
        work = [len(items_of(plan, part, sizes[0])) for part in range(plan.num_programs)]
        if shares:
            assert max(work) - min(work) <= 1


def ranks_of(plan: StreamPlan, num_outputs: int) -> dict[int, list[int]]:
    """Return the ranks of the shares that programs write, by tile, in the programs' order."""
    total = -(-num_outputs // 64) * plan.steps
    ranks: dict[int, list[int]] = {}
    for part in range(plan.num_programs):
        begin, end = bounds.fn(part, total, plan.num_programs)
        for tile in sorted({place // plan.steps for place in range(begin, end)}):
            rank = part - part_of.fn(tile * plan.steps, total, plan.num_programs)
            ranks.setdefault(tile, []).append(rank)
    return ranks


@FEW
@given(
    num_outputs=st.integers(1, 80).map(lambda count: 32 * count),
    num_inner=st.integers(1, 90).map(lambda count: 64 * count),
    num_sms=st.sampled_from([1, 7, 132]),
)
def test_the_shares_of_a_tile_are_numbered_from_zero(
    num_outputs: int, num_inner: int, num_sms: int
) -> None:
    plan = make_plan(CONFIGS[0], 16, num_outputs, num_inner, num_sms, gated=False, shares=True)
    ranks = ranks_of(plan, num_outputs)
    assert all(found == list(range(len(found))) for found in ranks.values())
    assert len(ranks) == -(-num_outputs // 64)
    assert max(map(len, ranks.values())) == plan.num_ranks(num_outputs)


def residual_of(stream: torch.Tensor, dtype: torch.dtype) -> Residual:
    """Return a copy of the stream with values and sums still to be written."""
    values = poisoned(*stream.shape, dtype=dtype, device=stream.device)
    exact = torch.promote_types(stream.dtype, torch.float32)
    sums = poisoned(
        len(stream), stream.shape[1] // COLUMNS_PER_SUM, dtype=exact, device=stream.device
    )
    return Residual(stream.clone(), values, sums)


@interpreted
@pytest.mark.parametrize("num_columns", [2 * BLOCK, 96])
@pytest.mark.parametrize("num_sums", [None, 6])
def test_interpreted_shares_are_added_up(num_columns: int, num_sums: int | None) -> None:
    plan = make_plan(CONFIGS[0], 3, num_columns, 768, 5, gated=False, shares=True)
    shares = torch.full((plan.num_ranks(num_columns), 3, num_columns), torch.nan)
    product = torch.zeros(3, num_columns, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    for tile, ranks in ranks_of(plan, num_columns).items():
        columns = slice(64 * tile, 64 * tile + 64)
        for rank in ranks:
            part = torch.randn(3, shares[0, :, columns].shape[1], generator=random)
            shares[rank, :, columns] = part
            product[:, columns] += part.double()
    inputs = torch.randn(3, 768, generator=random)
    norm = DeferredNorm(inputs, None, 1, EPS)
    if num_sums is not None:
        norm = norm._replace(square_sums_MQ=inputs.unflatten(1, (num_sums, -1)).square().sum(2))
        product *= torch.rsqrt(inputs.double().square().mean(1, keepdim=True) + EPS)
    stream = torch.randn(3, num_columns, generator=random)
    residual = Residual(stream.clone(), stream, torch.full((3, num_columns // 8), torch.nan))
    residual = residual._replace(values_MD=residual.stream_MD)
    rows = add_shares(shares, plan, residual, norm, EPS)
    expected = stream.double() + product
    assert_close("stream", residual.stream_MD, expected)
    sums = expected.unflatten(1, (-1, COLUMNS_PER_SUM)).square().sum(2)
    assert_close("sums", residual.square_sums_MQ, sums)
    assert_close("rows", normalised(rows), functional.rms_norm(expected, (num_columns,), eps=EPS))


SMALL: dict[str, tuple[StreamConfig, int, int, int, int | None, Activation | None]] = {
    "a tile each": (StreamConfig(64, 1), 9, 200, 336, 42, None),
    "several tiles each": (StreamConfig(32, 2), 3, 700, 144, None, None),
    "two tensor core tiles": (StreamConfig(64, 1), 17, 560, 128, 16, None),
    "several of two": (StreamConfig(64, 1, 2), 5, 1200, 80, 10, "relu2"),
    "gate and up": (StreamConfig(32, 1), 12, 120, 208, 13, "swiglu"),
    "several of gate and up": (StreamConfig(32, 2), 70, 600, 128, None, "geglu"),
    "rows that no group ends at": (StreamConfig(64, 1), 7, 187, 144, 9, None),
    "gates that no group ends at": (StreamConfig(64, 1), 4, 341, 144, 9, "swiglu"),
    "four tensor core tiles": (StreamConfig(64, 1, max_rows=256), 6, 270, 144, None, "swiglu"),
    "fewer groups than programs": (StreamConfig(64, 1), 2, 13, 80, None, "swiglu"),
}
"""Config, rows, columns out (of one half, if gated) and in, sums of squares, activation."""


@interpreted
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_the_kernel_on_stand_ins_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, eager: bool
) -> None:
    config, num_rows, num_outputs, num_inner, num_sums, activation = SMALL[name]
    gated = activation in GATED
    rows = random_rows(num_rows, num_inner, num_sums, "cpu")
    weight = torch.randn(num_outputs * (1 + gated), num_inner).bfloat16() / num_inner**0.5
    plan = make_plan(config, num_rows, num_outputs, num_inner, 3, gated=gated, shares=False)
    use_stand_ins(monkeypatch, eager)
    out = poisoned(num_rows, num_outputs + 8, dtype=torch.float32)
    stream_kernel.launch_stream(plan, rows, weight, out[:, :-8], activation=activation)
    assert out[:, -8:].isnan().all(), "only the columns asked for are written"
    expected = torch.empty(num_rows, num_outputs, dtype=torch.float64)
    if activation is None:
        reference.linear(in_float64(rows), weight.double(), expected)
    else:
        reference.linear_activated(in_float64(rows), weight.double(), expected, activation)
    assert_close("out", out[:, :-8], expected)


@interpreted
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("sizes", [(192, 336), (96, 1040), (520, 144)])
def test_the_kernel_on_stand_ins_leaves_shares(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], eager: bool
) -> None:
    num_outputs, num_inner = sizes
    rows = random_rows(9, num_inner, None, "cpu")
    weight = torch.randn(num_outputs, num_inner).bfloat16() / num_inner**0.5
    plan = make_plan(CONFIGS[1], 9, num_outputs, num_inner, 7, gated=False, shares=True)
    use_stand_ins(monkeypatch, eager)
    shares = torch.full((plan.num_ranks(num_outputs), 9, num_outputs), torch.nan)
    stream_kernel.launch_stream(plan, rows, weight, shares)
    for tile, ranks in ranks_of(plan, num_outputs).items():
        columns = slice(64 * tile, 64 * tile + 64)
        assert shares[len(ranks) :, :, columns].isnan().all()
        product = shares[: len(ranks), :, columns].double().sum(0)
        expected = rows.values_MK.double() @ weight[columns].double().T
        assert_close("product", product, expected, tolerance=1e-6)


def use_stand_ins(monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    """Run the kernel on the CPU."""
    launcher = Launcher(stream_kernel.stream_kernel, eager=eager)
    monkeypatch.setattr(stream_kernel, "stream_kernel", launcher)
    monkeypatch.setattr(stream_kernel, "TensorDescriptor", Descriptor)
    monkeypatch.setattr(stream_kernel, "_DTYPES", {torch.bfloat16: torch.bfloat16})


SIZES = (
    (10576, 2560, 160), (1056, 4096, 512), (8192, 1040, 130), (3352, 768, None), (200, 336, 42)
)  # fmt: skip
"""Columns out, columns in, sums of squares; the last ones end inside a tile, a box and a step."""


def random_rows(
    num_rows: int, num_inner: int, num_sums: int | None, device: str = "cuda"
) -> DeferredNorm:
    """Return rows whose sizes differ by 1000, so that a wrong scale or row shows."""
    random = torch.Generator(device).manual_seed(num_rows)
    values = torch.randn(num_rows, num_inner, generator=random, device=device)
    values *= torch.logspace(-1, 1, num_inner, device=device)
    values *= torch.logspace(-1, 2, num_rows, device=device)[:, None]
    values = values.bfloat16()
    if num_sums is None:
        return DeferredNorm(values, None, 1, EPS)
    sums = values.float().unflatten(1, (num_sums, -1)).square().sum(2)
    return DeferredNorm(values, sums, 1, EPS)


def in_float64(rows: DeferredNorm) -> DeferredNorm:
    """Return the same rows, exactly."""
    sums = rows.square_sums_MQ
    return rows._replace(
        values_MK=rows.values_MK.double(), square_sums_MQ=None if sums is None else sums.double()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_rows", [2, 8, 9, 16, 31, 64, 65, 128])
def test_streamed_products_equal_float64(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int | None], num_rows: int
) -> None:
    # A third of the pairs for each config.
    config = CONFIGS[(SIZES.index(sizes) + num_rows // 8) % 3]
    monkeypatch.setattr(op, "pick_config", lambda *_, **__: config)
    num_outputs, num_inner, num_sums = sizes
    rows = random_rows(num_rows, num_inner, num_sums)
    weight = torch.randn(num_outputs, num_inner, device="cuda").bfloat16()
    truth = in_float64(rows)
    expected = torch.empty(num_rows, num_outputs, dtype=torch.float64, device="cuda")
    reference.linear(truth, weight.double(), expected)
    out = poisoned(num_rows, num_outputs + 8, dtype=torch.bfloat16, device="cuda")
    op.linear(rows, weight, out[:, :-8])
    assert_close("bf16", out[:, :-8], expected)
    assert out[:, -8:].isnan().all(), "only the columns asked for are written"
    logits = poisoned(num_rows, num_outputs, dtype=torch.float32, device="cuda")
    op.linear(rows, weight, logits)
    assert_close("fp32", logits, expected)
    again = logits.clone()
    for _ in range(5):
        op.linear(rows, weight, again.fill_(torch.nan))
        assert torch.equal(again, logits), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2560, 5120, 80), (4096, 14336, None), (1056, 336, 42)])
@pytest.mark.parametrize("num_rows", [2, 9, 16, 33, 128])
def test_streamed_shares_are_added_in_order(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int | None], num_rows: int
) -> None:
    monkeypatch.setattr(op, "pick_config", lambda *_, **__: op.STREAM_CONFIG)
    num_outputs, num_inner, num_sums = sizes
    rows = random_rows(num_rows, num_inner, num_sums)
    weight = torch.randn(num_outputs, num_inner, device="cuda").bfloat16()
    stream = torch.randn(num_rows, num_outputs, device="cuda")
    ours, truth = residual_of(stream, torch.bfloat16), residual_of(stream.double(), torch.float64)
    following = op.linear_add(rows, weight, ours, eps=EPS)
    expected = reference.linear_add(in_float64(rows), weight.double(), truth, eps=EPS)
    assert_close("stream", ours.stream_MD, truth.stream_MD)
    assert_close("sums", ours.square_sums_MQ, truth.square_sums_MQ)
    assert torch.equal(ours.values_MD, ours.stream_MD.bfloat16())
    assert_close("rows", normalised(following).bfloat16(), normalised(expected))
    for _ in range(5):
        again = residual_of(stream, torch.bfloat16)
        op.linear_add(rows, weight, again, eps=EPS)
        assert torch.equal(again.stream_MD, ours.stream_MD), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
@pytest.mark.parametrize("num_rows", [2, 16, 128])
@pytest.mark.parametrize("num_inner_out", [4096, 200])
def test_streamed_activations_equal_float64(
    monkeypatch: pytest.MonkeyPatch, activation: Activation, num_rows: int, num_inner_out: int
) -> None:
    monkeypatch.setattr(op, "pick_config", lambda *_, **__: op.STREAM_CONFIG)
    rows = random_rows(num_rows, 1040, 130)
    num_products = num_inner_out * (2 if activation in GATED else 1)
    weight = torch.randn(num_products, 1040, device="cuda").bfloat16() / 32
    expected = torch.empty(num_rows, num_inner_out, dtype=torch.float64, device="cuda")
    reference.linear_activated(in_float64(rows), weight.double(), expected, activation)
    out = poisoned(num_rows, num_inner_out, dtype=torch.bfloat16, device="cuda")
    op.linear_activated(rows, weight, out, activation)
    assert_close("activation", out, expected)


@pytest.mark.gpu
def test_rows_of_nan_and_infinity_stay_in_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "pick_config", lambda *_, **__: op.STREAM_CONFIG)
    rows = random_rows(16, 1040, None)
    weight = torch.randn(1056, 1040, device="cuda").bfloat16()
    out, changed = (torch.empty(16, 1056, device="cuda") for _ in range(2))
    op.linear(rows, weight, out)
    rows.values_MK[3] = torch.nan
    rows.values_MK[7, 5] = torch.inf
    weight[40] = torch.nan
    op.linear(rows, weight, changed)
    assert changed[3].isnan().all()
    assert changed[:, 40].isnan().all()
    kept = [m for m in range(16) if m not in (3, 7)]
    columns = [n for n in range(1056) if n != 40]
    assert torch.equal(changed[kept][:, columns], out[kept][:, columns])
