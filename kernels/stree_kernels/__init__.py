"""Every op of a forward pass over a tree: a Triton kernel and its torch reference, `name_ref`.

The modules below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "commit_path",
    "commit_path_ref",
    "delta_chunk_scan",
    "delta_chunk_scan_ref",
    "delta_conv",
    "delta_conv_ref",
    "delta_rows",
    "delta_scan",
    "delta_scan_ref",
    "experts",
    "experts_ref",
    "key_rows",
    "key_rows_ref",
    "laws",
    "linear",
    "linear_ref",
    "residual",
    "residual_ref",
    "router",
    "rows",
    "sampling",
    "sampling_ref",
    "testing",
    "top_tokens",
    "top_tokens_ref",
    "tree_attention",
    "tree_attention_ref",
    "tree_conv",
    "tree_conv_ref",
    "tree_scan",
    "tree_scan_ref",
    "uniforms",
    "uniforms_ref",
    "unscaled",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
