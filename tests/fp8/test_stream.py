"""Streamed projections by weights in FP8: the kernel's code on stand-ins against float64.

The GPU tests of `test_projection` run it where it is compiled.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon_stand_ins import Descriptor, Launcher

from stree_kernels.fp8 import projection as kernel, projection_ref as reference, stream_kernel
from stree_kernels.fp8.stream_plan import CodeConfig, make_plan
from stree_kernels.testing import assert_close

from .test_projection import make_case

NEW_EMPTY = torch.Tensor.new_empty
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")

SMALL: dict[str, tuple[CodeConfig, str, dict[str, Any]]] = {
    "a tile each": (
        CodeConfig(64), "linear",
        {"sizes": (9, 336, 200), "num_sums": 42, "column_block": 128, "factor": True},
    ),
    "several tiles each": (
        CodeConfig(32), "linear",
        {"sizes": (3, 256, 704), "column_block": 128, "row_group": 32},
    ),
    "two tensor core tiles": (
        CodeConfig(64), "relu2",
        {"sizes": (17, 384, 560), "num_sums": 6, "column_block": 256, "factor": True},
    ),
    "gate and up": (
        CodeConfig(32), "swiglu",
        {
            "sizes": (1, 256, 240), "num_sums": 4, "column_block": 128, "row_group": 16,
            "factor": True,
        },
    ),
    "several of gate and up": (
        CodeConfig(64), "geglu", {"sizes": (30, 128, 1216), "column_block": 128},
    ),
    "channel": (CodeConfig(64), "linear", {"sizes": (5, 208, 96), "row_group": 1}),
    "gated channel": (
        CodeConfig(64, 2), "swiglu", {"sizes": (5, 320, 160), "row_group": 1, "factor": True},
    ),
    "groups": (
        CodeConfig(64), "linear",
        {
            "sizes": (4, 512, 96), "num_groups": 2, "num_sums": 4, "column_block": 128,
            "factor": True,
        },
    ),
    "shares": (
        CodeConfig(32, 2), "linear_add",
        {"sizes": (9, 1040, 96), "num_sums": 13, "column_block": 128, "factor": True},
    ),
    "shares of a tensor": (
        CodeConfig(64), "linear_add", {"sizes": (2, 640, 200), "num_sums": 4},
    ),
    "40 rows of gate and up": (
        CodeConfig(32), "swiglu",
        {
            "sizes": (40, 256, 416), "num_sums": 4, "column_block": 128, "row_group": 16,
            "factor": True,
        },
    ),
    "64 rows": (
        CodeConfig(80, 2), "linear",
        {"sizes": (64, 336, 200), "num_sums": 42, "column_block": 128, "factor": True},
    ),
    "shares of 40 rows": (
        CodeConfig(80, 2), "linear_add",
        {"sizes": (40, 1040, 200), "num_sums": 13, "column_block": 128, "factor": True},
    ),
    "shares of 64 rows by channel": (
        CodeConfig(80), "linear_add", {"sizes": (64, 400, 328), "row_group": 1, "num_sums": 5},
    ),
    "100 rows, two tensor core tiles": (
        CodeConfig(160), "relu2",
        {"sizes": (100, 384, 560), "num_sums": 6, "column_block": 256, "factor": True},
    ),
    "128 rows of gate and up by channel": (
        CodeConfig(160), "geglu", {"sizes": (128, 208, 1216), "row_group": 1},
    ),
    "shares of 100 rows in groups": (
        CodeConfig(160), "linear_add",
        {"sizes": (100, 768, 192), "num_groups": 3, "num_sums": 6, "column_block": 128},
    ),
    "shares of 128 rows": (
        CodeConfig(160), "linear_add", {"sizes": (128, 640, 320), "num_sums": 4},
    ),
    "shares of groups": (
        CodeConfig(32), "linear_add",
        {"sizes": (16, 768, 192), "num_groups": 3, "num_sums": 6, "column_block": 128},
    ),
}  # fmt: skip
"""Config, op, case."""


@interpreted
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_the_kernel_on_stand_ins_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, eager: bool
) -> None:
    config, op, options = SMALL[name]
    options = dict(options)
    case = make_case(*options.pop("sizes"), **options, dtype=torch.bfloat16)
    launcher = Launcher(stream_kernel.fp8_stream_kernel, eager=eager)
    monkeypatch.setattr(stream_kernel, "fp8_stream_kernel", launcher)
    monkeypatch.setattr(stream_kernel, "TensorDescriptor", Descriptor)
    monkeypatch.setattr(stream_kernel, "_DTYPES", {torch.bfloat16: torch.bfloat16})
    monkeypatch.setattr(kernel, "pick_config", lambda *_, **__: config)
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 3)
    monkeypatch.setattr(kernel, "prefer_shared", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_workspace)
    for actual, expected in zip(case.run(kernel, op), case.exact().run(reference, op), strict=True):
        assert_close(name, actual, expected, tolerance=1e-2)


def poisoned_workspace(like: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
    """Stand in for `Tensor.new_empty`."""
    new = NEW_EMPTY(like, *shape, **options)
    return new.fill_(torch.nan) if new.is_floating_point() else new


def test_steps_of_codes_are_of_128_columns() -> None:
    plan = make_plan(CodeConfig(64), 8, 1024, 1040, 8, gated=False, shares=False)
    # 8 groups of 16 rows and the rows' 8, of two bytes each, in 64 KiB.
    assert (plan.steps, plan.num_boxes, plan.stages) == (9, 8, 65536 // (128 * (128 + 16)))


CHOICES = {
    "one for each multiprocessor": (1, 132 * 64, False, kernel.FULL_TILES_STREAM_CONFIG, 132),
    "in-projection of 8B": (16, 10272, False, kernel.FULL_TILES_STREAM_CONFIG, 161),
    "gate of 8B": (8, 14336, False, kernel.FULL_TILES_STREAM_CONFIG, 224),
    "as many as run at once": (8, 264 * 64, False, kernel.FULL_TILES_STREAM_CONFIG, 264),
    "gate of 27B, of more": (8, 17408, False, kernel.STREAM_CONFIG, 396),
    "the same for more rows": (17, 17408, False, kernel.FULL_TILES_STREAM_CONFIG, 264),
    "too few full tiles": (16, 131 * 64, False, kernel.STREAM_CONFIG, 396),
    "shares": (16, 10272, True, kernel.STREAM_CONFIG, 396),
    "shares of more rows": (32, 4096, True, kernel.FULL_TILES_STREAM_CONFIG, 264),
    "in-projection of 8B, 33 rows": (33, 10272, False, kernel.MORE_ROWS_STREAM_CONFIG, 161),
    "gate of 27B, 64 rows": (64, 17408, False, kernel.MORE_ROWS_STREAM_CONFIG, 264),
    "gate of 8B, 65 rows": (65, 14336, False, kernel.MOST_ROWS_STREAM_CONFIG, 132),
    "shares of 128 rows": (128, 4096, True, kernel.MOST_ROWS_STREAM_CONFIG, 132),
}
"""Rows, outputs, shares; the config on 132 multiprocessors, and its programs."""


@pytest.mark.parametrize("name", CHOICES)
def test_full_tiles_are_owned_where_they_fill_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    num_rows, num_outputs, shares, config, num_programs = CHOICES[name]
    monkeypatch.setattr(kernel.pdl, "capability", lambda _: kernel.STREAM_CAPABILITY)
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 132)
    weight = make_case(1, 4096, 16, column_block=128, dtype=torch.bfloat16).weight
    assert kernel.pick_config(num_rows, weight, num_outputs, shares=shares) == config
    plan = make_plan(config, num_rows, num_outputs, 4096, 132, gated=False, shares=shares)
    assert plan.num_programs == num_programs


@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_rings_fit_a_multiprocessor(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, gated: bool
) -> None:
    monkeypatch.setattr(kernel.pdl, "capability", lambda _: kernel.STREAM_CAPABILITY)
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 132)
    weight = make_case(1, 256, 16, column_block=128, dtype=torch.bfloat16).weight
    for num_outputs in range(16, 40000, 176):
        for shares in (False,) if gated else (False, True):
            config = kernel.pick_config(num_rows, weight, num_outputs, shares=shares)
            assert isinstance(config, CodeConfig)
            plan = make_plan(config, num_rows, num_outputs, 4096, 132, gated=gated, shares=shares)
            codes = plan.num_boxes * plan.box_rows
            ring = plan.stages * (codes + 2 * plan.block_m) + plan.mma_rows - codes
            # Rows of two steps are kept beside it, and a KiB of each program is not its own.
            needed = 128 * (ring + 4 * plan.block_m) + 2048
            assert config.programs_per_sm * needed <= 228 << 10
