"""Static speculation trees: what a tree is, what a profile says, how a model decodes with one.

The names below are the public interface; each is imported when it is first used, so that reading a
profile does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.drafting import (
        Pair as Pair,
        Runtime as Runtime,
        load_pair as load_pair,
        load_with_head as load_with_head,
        require_profile_fits as require_profile_fits,
    )
    from stree_core.engine import (
        Engine as Engine,
        EngineConfig as EngineConfig,
        Generation as Generation,
        Request as Request,
        Run as Run,
        SamplingParams as SamplingParams,
        SamplingSupport as SamplingSupport,
        Session as Session,
        StopRule as StopRule,
        TextDecoder as TextDecoder,
        TextRun as TextRun,
        Update as Update,
        generate as generate,
        load as load,
        profile_engine as profile_engine,
        stream as stream,
    )
    from stree_core.models import ModelSource as ModelSource, find_source as find_source
    from stree_core.profile import (
        Policy as Policy,
        Profile as Profile,
        load_profile as load_profile,
        policy_of as policy_of,
        save_profile as save_profile,
    )
    from stree_core.tree import DEFAULT_TREE as DEFAULT_TREE, Tree as Tree

__getattr__, __dir__ = exports(
    __name__,
    {
        "drafting.pair": ["Pair", "Runtime", "load_pair", "load_with_head", "require_profile_fits"],
        "engine.decode": ["Run", "generate", "profile_engine", "stream"],
        "engine.engine": ["Engine", "EngineConfig"],
        "engine.request": ["Request", "Update"],
        "engine.rules": ["SamplingSupport"],
        "engine.sampling": ["SamplingParams"],
        "engine.session": ["Session"],
        "engine.stop": ["Generation", "StopRule"],
        "engine.text_decoder": ["TextDecoder", "TextRun", "load"],
        "models.source": ["ModelSource", "find_source"],
        "profile": ["Policy", "Profile", "load_profile", "policy_of", "save_profile"],
        "tree": ["DEFAULT_TREE", "Tree"],
    },
)
