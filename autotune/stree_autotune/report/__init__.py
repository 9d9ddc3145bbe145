"""What a profile and an analysis show: page, figures, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.report.analyze import run_analyze as run_analyze
    from stree_autotune.report.page import is_report as is_report, write_report as write_report

__getattr__, __dir__ = exports(
    __name__,
    {
        "analyze": ["run_analyze"],
        "page": ["is_report", "write_report"],
    },
)
