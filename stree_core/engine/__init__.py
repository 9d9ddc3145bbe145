"""Decoding: draft, verify, accept and commit, for requests that join and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.engine.decode import (
        Run as Run,
        generate as generate,
        profile_engine as profile_engine,
        steps_of as steps_of,
        stream as stream,
    )
    from stree_core.engine.engine import (
        Engine as Engine,
        EngineConfig as EngineConfig,
        MakeRules as MakeRules,
        needed_positions as needed_positions,
    )
    from stree_core.engine.request import Request as Request, Update as Update
    from stree_core.engine.rules import (
        GreedyRule as GreedyRule,
        Rule as Rule,
        RuleName as RuleName,
        SampledRule as SampledRule,
        SamplingSupport as SamplingSupport,
        make_rules as make_rules,
    )
    from stree_core.engine.sampling import (
        SamplingParams as SamplingParams,
        SlotSettings as SlotSettings,
        processed as processed,
    )
    from stree_core.engine.session import Session as Session
    from stree_core.engine.step import (
        Speculator as Speculator,
        make_speculators as make_speculators,
    )
    from stree_core.engine.step_result import StepResult as StepResult
    from stree_core.engine.stop import Generation as Generation, StopRule as StopRule
    from stree_core.engine.text_decoder import (
        TextDecoder as TextDecoder,
        TextRun as TextRun,
        load as load,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "decode": ["Run", "generate", "profile_engine", "steps_of", "stream"],
        "engine": ["Engine", "EngineConfig", "MakeRules", "needed_positions"],
        "request": ["Request", "Update"],
        "rules": ["GreedyRule", "Rule", "RuleName", "SampledRule", "SamplingSupport", "make_rules"],
        "sampling": ["SamplingParams", "SlotSettings", "processed"],
        "session": ["Session"],
        "step": ["Speculator", "make_speculators"],
        "step_result": ["StepResult"],
        "stop": ["Generation", "StopRule"],
        "text_decoder": ["TextDecoder", "TextRun", "load"],
    },
)
