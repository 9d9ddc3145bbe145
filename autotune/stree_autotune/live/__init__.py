"""Tune and validate with live decoding on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.live.tuning import tune_live as tune_live
    from stree_autotune.live.validation import (
        ValidateRequest as ValidateRequest,
        run_validate as run_validate,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "tuning": ["tune_live"],
        "validation": ["ValidateRequest", "run_validate"],
    },
)
