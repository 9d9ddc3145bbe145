"""Weights as checkpoints store them: names and rows, and how those in FP8 are scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.fp8.layout import (
        FLOAT_TYPES as FLOAT_TYPES,
        Fp8Kind as Fp8Kind,
        Fp8Weights as Fp8Weights,
        row_group as row_group,
    )
    from stree_core.fp8.scheme import (
        Fp8Scheme as Fp8Scheme,
        Unsupported as Unsupported,
        find_scheme as find_scheme,
    )
    from stree_core.fp8.stored import EXTRAS as EXTRAS, Header as Header, stored_fp8 as stored_fp8
    from stree_core.fp8.weight import Weight as Weight

__getattr__, __dir__ = exports(
    __name__,
    {
        "layout": ["FLOAT_TYPES", "Fp8Kind", "Fp8Weights", "row_group"],
        "scheme": ["Fp8Scheme", "Unsupported", "find_scheme"],
        "stored": ["EXTRAS", "Header", "stored_fp8"],
        "weight": ["Weight"],
    },
)
