"""Time the reading of prompts side by side, from their ids on the host to their first tokens."""

from __future__ import annotations

from collections.abc import Sequence

from stree_autotune.probe.plan import Key
from stree_autotune.probe.steps import StepSetting, free
from stree_autotune.probe.timing import Work, time_interleaved
from stree_autotune.store import PromptPoint
from stree_core.drafting import Pair
from stree_core.engine import Engine, EngineConfig
from stree_core.errors import NotEnoughMemory, StreeError
from stree_core.tree import OFF, Tree


def time_prompts(pair: Pair, keys: Sequence[Key], setting: StepSetting) -> list[PromptPoint]:
    """Time what `keys` (reader, prompts, tokens of each) name, as an engine reads them.

    Nothing is timed where memory does not suffice for all. Raises NonFiniteLogits.
    """
    config = EngineConfig(setting.batch_size, setting.context)
    readers = sorted({key[0] for key in keys})
    works: dict[Key, Work] = {}
    try:
        for reader in readers:
            draft, trees = (pair.draft, (OFF, Tree.chain(1))) if reader == "pair" else (None, OFF)
            engine = Engine(pair.target, draft, trees, config)
            for key in (key for key in keys if key[0] == reader):
                works[key] = _reading(engine, key[1], key[2])
        setting.settle()
        timings = time_interleaved(
            works, pair.device, setting.effort, wall=True, until=setting.until
        )
    except NotEnoughMemory:
        return []
    finally:
        works.clear()
        free(pair.device)
    return [
        PromptPoint(reader, num_prompts, length, found.ms, found.spread_ms)
        for (reader, num_prompts, length), found in timings.items()
    ]


def _reading(engine: Engine, num_prompts: int, num_tokens: int) -> Work:
    """Return what reads so many prompts into the first slots, in the engine's pieces."""
    most = engine.target.shape.vocab_size
    prompt = [1 + place % (most - 1) for place in range(num_tokens)]

    def read() -> None:
        for slot in range(num_prompts):
            engine.begin_prompt(slot, prompt)
        firsts: dict[int, int | StreeError] = {}
        while engine.next_piece:
            firsts |= engine.read_piece()
        for first in firsts.values():
            if isinstance(first, StreeError):
                raise first
        for slot in range(num_prompts):
            engine.release(slot)

    return read
