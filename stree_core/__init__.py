"""Static speculation trees: what a tree is, what a profile says, how a model decodes with one.

The names below are the public interface; each is imported when it is first used, so that reading a
profile does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stree_core.decode import Run, generate, profile_engine, stream
    from stree_core.engine import Engine, EngineConfig
    from stree_core.model_source import ModelSource, find_source
    from stree_core.pair import Pair, Runtime, load_pair, load_with_head, require_profile_fits
    from stree_core.policy import Policy, policy_of
    from stree_core.profile import Profile, load_profile, save_profile
    from stree_core.request import Request, Update
    from stree_core.rules import SamplingSupport
    from stree_core.sampling import SamplingParams
    from stree_core.session import Session
    from stree_core.stop import Generation, StopRule
    from stree_core.tree import DEFAULT_TREE, Tree

_HOME = {
    "DEFAULT_TREE": "tree",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Generation": "stop",
    "ModelSource": "model_source",
    "Pair": "pair",
    "Policy": "policy",
    "Profile": "profile",
    "Request": "request",
    "Run": "decode",
    "Runtime": "pair",
    "SamplingParams": "sampling",
    "SamplingSupport": "rules",
    "Session": "session",
    "StopRule": "stop",
    "Tree": "tree",
    "Update": "request",
    "find_source": "model_source",
    "generate": "decode",
    "load_pair": "pair",
    "load_profile": "profile",
    "load_with_head": "pair",
    "policy_of": "policy",
    "profile_engine": "decode",
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
    "Policy",
    "Profile",
    "Request",
    "Run",
    "Runtime",
    "SamplingParams",
    "SamplingSupport",
    "Session",
    "StopRule",
    "Tree",
    "Update",
    "find_source",
    "generate",
    "load_pair",
    "load_profile",
    "load_with_head",
    "policy_of",
    "profile_engine",
    "require_profile_fits",
    "save_profile",
    "stream",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
