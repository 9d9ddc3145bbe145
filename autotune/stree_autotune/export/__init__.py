"""A profile as settings of servers and simulators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.export.formats import run_export as run_export
    from stree_autotune.export.served import deployment_of as deployment_of

__getattr__, __dir__ = exports(
    __name__,
    {
        "formats": ["run_export"],
        "served": ["deployment_of"],
    },
)
