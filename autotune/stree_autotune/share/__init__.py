"""Shared libraries of profiles, tables and traces at a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.share.files import named_files as named_files, own_files as own_files
    from stree_autotune.share.remote import (
        cache_root as cache_root,
        pull as pull,
        push as push,
        sync as sync,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "files": ["named_files", "own_files"],
        "remote": ["cache_root", "pull", "push", "sync"],
    },
)
