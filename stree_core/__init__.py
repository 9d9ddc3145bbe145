"""Static speculation trees: what a tree is, what a profile says, how a model decodes with one.

The names below are the public interface; each is imported when it is first used, so that reading a
profile does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stree_core.decode import Generation, Run, StopRule, generate, stream
    from stree_core.engine import Engine, EngineConfig
    from stree_core.model_source import ModelSource, find_source
    from stree_core.pair import Pair, Runtime, load_pair, require_profile_fits
    from stree_core.profile import Profile, load_profile, save_profile
    from stree_core.tree import DEFAULT_TREE, Tree

_HOME = {
    "DEFAULT_TREE": "tree",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Generation": "decode",
    "ModelSource": "model_source",
    "Pair": "pair",
    "Profile": "profile",
    "Run": "decode",
    "Runtime": "pair",
    "StopRule": "decode",
    "Tree": "tree",
    "find_source": "model_source",
    "generate": "decode",
    "load_pair": "pair",
    "load_profile": "profile",
    "require_profile_fits": "pair",
    "save_profile": "profile",
    "stream": "decode",
}

__all__ = [
    "DEFAULT_TREE",
    "Engine",
    "EngineConfig",
    "Generation",
    "ModelSource",
    "Pair",
    "Profile",
    "Run",
    "Runtime",
    "StopRule",
    "Tree",
    "find_source",
    "generate",
    "load_pair",
    "load_profile",
    "require_profile_fits",
    "save_profile",
    "stream",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
