"""How fast an engine decodes with its slots at work: what a profile predicts.

Prompts are decoded in waves of as many as there are slots. Those of a wave join one after another,
so that, as in a server, slots store their states in different steps. Steps are timed once all have
joined and while at most a quarter of the slots is idle; prefill is not. A slot whose text has ended
computes on, but stores no state, so with more of them a step would be shorter than a server's.
Tokens per step count the steps of slots that have not ended: tokens/s = slots * tokens per step /
step time. A server's rate is lower by its prefill and by the share of slots that wait for a
request.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stree_autotune.probe import phases
from stree_autotune.trace import Trace
from stree_core.engine import Engine, Generation, Request, Session
from stree_core.errors import ConfigError

MOST_IDLE = 0.25
"""Share of the slots that may be idle while a step is timed."""


@dataclass(frozen=True, slots=True)
class LiveSpeed:
    """What waves of prompts generated, and the wall time of the calls that were timed."""

    generations: tuple[Generation, ...]
    num_slots: int
    seconds: float
    num_calls: int

    @property
    def tokens_per_step(self) -> float:
        """Kept tokens per step of a sequence; 1 when there was no step."""
        num_steps = sum(generation.num_steps for generation in self.generations)
        num_tokens = sum(len(generation.tokens) - 1 for generation in self.generations)
        return num_tokens / num_steps if num_steps else 1.0

    @property
    def step_ms(self) -> float:
        """Mean wall time of a step of all slots."""
        return 1e3 * self.seconds / self.num_calls

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all slots together."""
        return 1e3 * self.num_slots * self.tokens_per_step / self.step_ms


def typical_context(prompts: Sequence[Sequence[int]], trace: Trace) -> int:
    """Return the context at which a half full slot holds what one holds on average with a trace.

    That is a prompt, and half of a text that the trace recorded.
    """
    text = trace.num_positions / max(1, trace.num_prompts)
    return round(2 * statistics.fmean(map(len, prompts)) + text)


def live_speed(
    engine: Engine,
    requests: Sequence[Request],
    progress: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LiveSpeed:
    """Decode requests with an engine's first tree and time its steps.

    `progress` is called with the number of requests of the waves that have ended. Raises
    ConfigError when a request fails, or when all are too short for a step to be timed.
    """
    places: list[int] = []
    generations: dict[int, Generation] = {}
    calls: list[tuple[int, float]] = []
    with Session(engine) as session:
        for first in range(0, len(requests), engine.config.num_slots):
            size = min(engine.config.num_slots, len(requests) - first)
            joining = deque(sorted(zip(phases(size), range(first, first + size), strict=True)))
            num_tokens, eldest = 0.0, len(places)
            started = clock()
            while joining or session.busy:
                num_before, num_places = session.num_steps, len(places)
                num_ended = len(generations)
                while joining and joining[0][0] <= num_tokens:
                    places.append(joining.popleft()[1])
                    session.submit(requests[places[-1]])
                for update in session.step():
                    if update.generation is not None:
                        generations[places[update.request_id]] = _served(update.generation)
                    if update.request_id == eldest:
                        has_ended = update.generation is not None
                        num_tokens += math.inf if has_ended else len(update.tokens)
                ended = clock()
                # From end to end: what the host does between two calls hides behind the device's
                # work. A call in which a request joins waits for the steps before, and brings none.
                if session.num_steps > num_before and not joining and len(places) == num_places:
                    idle = engine.config.num_slots - (num_places - num_ended)
                    calls.append((idle, ended - started))
                started = ended
            if progress is not None:
                progress(len(generations))
    if not calls:
        raise ConfigError("texts must be longer to time steps, all ended at once; ask for more")
    ordered = tuple(generations[place] for place in sorted(generations))
    timed = _with_slots_at_work(calls, engine.config.num_slots)
    return LiveSpeed(ordered, engine.config.num_slots, sum(timed), len(timed))


def _with_slots_at_work(calls: Sequence[tuple[int, float]], num_slots: int) -> list[float]:
    """Return the seconds of calls with few idle slots; of those with fewest where all had many."""
    limit = max(min(calls)[0], int(MOST_IDLE * num_slots))
    return [seconds for idle, seconds in calls if idle <= limit]


def joined(parts: Sequence[LiveSpeed]) -> LiveSpeed:
    """Return several runs with equally many slots as one."""
    return LiveSpeed(
        tuple(generation for part in parts for generation in part.generations),
        parts[0].num_slots,
        sum(part.seconds for part in parts),
        sum(part.num_calls for part in parts),
    )


def _served(generation: Generation) -> Generation:
    if generation.finish == "error":
        raise ConfigError(str(generation.error))
    return generation
