"""One comparison for all op tests and for the gate of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    # a few hundred roundings of 1e-16
    torch.float64: 1e-12,
    # likewise of 6e-8: measured 1e-7 for outputs, 5e-7 for 256 rows in one block
    torch.float32: 1e-5,
    # the output's own rounding is 1.4e-4 (root mean square), the products' inside more
    torch.float16: 2e-3,
    # the output's own rounding is 1e-3 (root mean square), the products' inside about as much
    torch.bfloat16: 1e-2,
}


def assert_close(
    name: str, actual: Tensor, expected: Tensor, *, tolerance: float | None = None
) -> None:
    """Raise AssertionError unless `actual` equals `expected` up to a relative RMS error.

    The default tolerance is that of `actual`'s dtype; NaN on either side fails.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    limit = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    truth = expected.detach().double().cpu()
    error = (actual.detach().double().cpu() - truth).norm().item()
    scale = truth.norm().item()
    relative = error / scale if scale else error
    # Written so that a NaN, which compares false, fails.
    if not relative <= limit:
        raise AssertionError(f"{name}: relative RMS error {relative:.3g} is above {limit:.3g}")


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a buffer of NaN: an op that leaves an element out, or reads a stray one, fails."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)
