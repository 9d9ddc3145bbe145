"""The command line `stree-tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.cli.commands import main as main

__getattr__, __dir__ = exports(
    __name__,
    {
        "commands": ["main"],
    },
)
