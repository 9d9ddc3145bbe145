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
from stree_core.engine import Engine, Generation, Request, Session, Update, steps_of
from stree_core.errors import ConfigError

MOST_IDLE = 0.25
"""Share of the slots that may be idle while a step is timed."""

FEWEST_CALLS = 100
"""Timed steps below which a mean says little: joins and ends of texts are among them."""

_Call = tuple[int, float]
"""Idle slots before a call, and its seconds."""


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
    num_slots = engine.config.num_slots
    generations: list[Generation] = []
    calls: list[_Call] = []
    with Session(engine) as session:
        for first in range(0, len(requests), num_slots):
            wave = _Wave(session, requests[first : first + num_slots], len(generations), num_slots)
            calls += wave.run(clock)
            generations += wave.generations
            if progress is not None:
                progress(len(generations))
    if not calls:
        raise ConfigError("texts must be longer to time steps, all ended at once; ask for more")
    timed = _with_slots_at_work(calls, num_slots)
    return LiveSpeed(tuple(generations), num_slots, sum(timed), len(timed))


class _Wave:
    """Requests that join a session one after another; their ids count from `first_id`."""

    def __init__(
        self, session: Session, requests: Sequence[Request], first_id: int, num_slots: int
    ) -> None:
        self._session, self._requests = session, requests
        self._first_id, self._num_slots = first_id, num_slots
        self._joining = deque(zip(phases(len(requests)), requests, strict=True))
        self._eldest_tokens = 0.0
        self._ended: dict[int, Generation] = {}

    @property
    def generations(self) -> list[Generation]:
        """What the requests have generated, in their order."""
        return [self._ended[self._first_id + place] for place in range(len(self._requests))]

    def run(self, clock: Callable[[], float]) -> list[_Call]:
        """Decode all, and time the calls once all have joined.

        Their times are from end to end: what the host does between two calls hides behind the
        device's work. A call in which a request joins waits for the steps before, and brings none.
        """
        calls = []
        started = clock()
        joined_now, num_idle = self._join(), self._num_idle
        num_steps = self._session.num_steps
        for updates in steps_of(self._session):
            self._take(updates)
            ended = clock()
            if self._session.num_steps > num_steps and not self._joining and not joined_now:
                calls.append((num_idle, ended - started))
            started, num_steps, num_idle = ended, self._session.num_steps, self._num_idle
            joined_now = self._join()
        return calls

    @property
    def _num_idle(self) -> int:
        joined = len(self._requests) - len(self._joining)
        return self._num_slots - (joined - len(self._ended))

    def _join(self) -> bool:
        """Submit the requests whose turn has come; False when there is none."""
        before = len(self._joining)
        while self._joining and self._joining[0][0] <= self._eldest_tokens:
            self._session.submit(self._joining.popleft()[1])
        return len(self._joining) < before

    def _take(self, updates: Sequence[Update]) -> None:
        for update in updates:
            if update.generation is not None:
                self._ended[update.request_id] = update.generation
            if update.request_id == self._first_id:
                has_ended = update.generation is not None
                self._eldest_tokens += math.inf if has_ended else len(update.tokens)


def _with_slots_at_work(calls: Sequence[_Call], num_slots: int) -> list[float]:
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
