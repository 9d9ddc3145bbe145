"""The pairs that are decoded: the demo pair, and shapes whose acceptance a trace decides.

The shapes have random weights: their steps accept as many tokens as in a recorded trace
(stree_autotune.live.measure), while every pass is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stree_autotune.live.measure import script_of
from stree_autotune.store.library import Library
from stree_autotune.store.open_models import PairRequest, open_pair
from stree_autotune.trace.file import Trace, load_trace
from stree_core.drafting.pair import Pair, Runtime
from stree_core.engine.engine import MakeRules

DEMO = ("demo-target", "demo-draft")
DRAFTS = {"mamba2-2.7b": "mamba2-130m", "mamba-in-llama-8b": "mamba2-distilled-small"}
"""The draft's shape for each target's."""

PAIRS = ("demo", *DRAFTS)
TRACE = "demo-target--demo-draft--gsm8k--greedy"
ROOM = 1 << 14
"""Positions that a slot may go on in the trace: a text's, and timed steps behind its end."""


def open_named(name: str, device: str, data: Sequence[Path] = ()) -> tuple[Pair, Trace | None]:
    """Return the pair "demo", with its own acceptance, or a target's shapes with their trace."""
    if name == "demo":
        return open_pair(PairRequest(*DEMO, (), Runtime(device))), None
    trace = load_trace(Library.open(data).find_trace_file(TRACE))
    return open_pair(PairRequest(name, DRAFTS[name], (), Runtime(device), shapes=True)), trace


def traced_rules(pair: Pair, trace: Trace, num_slots: int) -> MakeRules:
    """Return the rules of an engine whose steps accept what a trace says."""
    return script_of(pair, trace, num_slots, ROOM).rules
