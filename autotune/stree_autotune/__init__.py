"""Measure, predict, search: everything that decides how to speculate, and `stree-tune` itself.

The modules below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "library",
    "report",
    "runtime_table",
    "step_cost",
    "trace_file",
    "trace_walk",
    "tune",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
