"""How a scan's columns are cut into runs whose squares are summed."""

from __future__ import annotations

import pytest
import torch

from stree_kernels.launch.rows import gate_width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state_dim", [16, 128, 1000])
def test_runs_of_columns_divide_a_head(state_dim: int, dtype: torch.dtype) -> None:
    for head_dim in (*range(1, 70), 128, 129, 256):
        assert head_dim % gate_width(head_dim, state_dim, dtype) == 0
    assert gate_width(128, 128, torch.bfloat16) == 64
    assert gate_width(128, 128, torch.float32) == 16
