"""Continuous batching: requests join free slots, run to their own end, and leave at once.

On a GPU the engine is one step ahead of what the host has read: while it works on a step, the
tokens of the one before are cut, reported and, where a request ends, its slot is given to the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stree_core.engine import Engine
from stree_core.errors import ConfigError, StreeError
from stree_core.sampling import SamplingParams
from stree_core.step_result import StepResult
from stree_core.stop import Finish, Generation, StopRule

ChooseTree = Callable[[int], int]
"""Returns which of an engine's trees a step takes, by the number of active sequences."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (token ids), when its output ends, and how it is sampled."""

    prompt: Sequence[int]
    stop: StopRule
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Update(NamedTuple):
    """New tokens of a request; `generation` is all of it, once it has ended."""

    request_id: int
    tokens: list[int]
    generation: Generation | None


@dataclass(slots=True)
class _Running:
    request_id: int
    request: Request
    generation: Generation


class Session:
    """Runs requests on an engine's slots. A request that fails ends alone.

    `decode` turns token ids into text; requests with stop strings need it. `lookahead` is how many
    steps are under way while the host reads: by default 1 on a GPU, where they cost it no time.
    """

    def __init__(
        self,
        engine: Engine,
        choose_tree: ChooseTree | None = None,
        decode: Callable[[list[int]], str] | None = None,
        lookahead: int | None = None,
    ) -> None:
        self._engine = engine
        on_gpu = engine.target.device.type == "cuda"
        self._lookahead = int(on_gpu) if lookahead is None else lookahead
        self._choose_tree = choose_tree or (lambda num_active: 0)
        self._decode = decode
        self._waiting: deque[tuple[int, Request]] = deque()
        self._slots: list[_Running | None] = [None] * engine.config.num_slots
        self._updates: list[Update] = []
        self._num_under_way = 0
        self._num_submitted = 0
        self.num_steps = 0
        self.prefill_seconds = 0.0
        for slot in range(engine.config.num_slots):
            engine.release(slot)

    @property
    def busy(self) -> bool:
        """True while a request waits, runs, or has an update that nobody has read."""
        return bool(self._waiting or self._updates or self._num_active or self._num_under_way)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; ids count from 0.

        Raises ConfigError when it has stop strings and the session cannot decode.
        """
        if request.stop.strings and self._decode is None:
            raise ConfigError(
                "stop strings need a session that decodes tokens, this one does not; pass decode"
            )
        request_id = self._num_submitted
        self._num_submitted += 1
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; its last update says so. An id that has ended is ignored."""
        for waiting in self._waiting:
            if waiting[0] == request_id:
                self._waiting.remove(waiting)
                self._end(_Running(*waiting, Generation()), [], "cancelled")
                return
        for slot, running in enumerate(self._slots):
            if running is not None and running.request_id == request_id:
                self._leave(slot)
                self._end(running, [], "cancelled")

    def step(self) -> list[Update]:
        """Admit what fits, launch a step, and return what the step before it has brought."""
        if self._waiting and None in self._slots:
            # A prefill would wait for the step under way, whose time is not its own.
            self._engine.wait()
            start = time.perf_counter()
            self._admit()
            self.prefill_seconds += time.perf_counter() - start
        goes_on = self._may_go_on()
        if goes_on:
            self._engine.launch(self._choose_tree(self._num_active))
            self._num_under_way += 1
            self.num_steps += 1
        # What is under way when nobody goes on is waited for.
        while self._num_under_way > (self._lookahead if goes_on else 0):
            self._num_under_way -= 1
            self._read(self._engine.collect())
        updates, self._updates = self._updates, []
        return updates

    def run(self) -> dict[int, Generation]:
        """Step until nothing is left; return the generations of what ended, by request id."""
        ended = {}
        while self.busy:
            for update in self.step():
                if update.generation is not None:
                    ended[update.request_id] = update.generation
        return ended

    @property
    def _num_active(self) -> int:
        return sum(running is not None for running in self._slots)

    def _may_go_on(self) -> bool:
        """Return whether a request may need more than the steps under way, of a token each."""
        return any(
            len(running.generation.tokens) + self._num_under_way
            < running.request.stop.max_new_tokens
            for running in self._slots
            if running is not None
        )

    def _admit(self) -> None:
        """Give free slots to waiting requests; one that cannot be served ends with its error."""
        for slot, occupant in enumerate(self._slots):
            while occupant is None and self._waiting:
                running = _Running(*self._waiting.popleft(), Generation())
                request = running.request
                try:
                    self._engine.require_fits(len(request.prompt), request.stop.max_new_tokens)
                    first = self._engine.prefill(slot, request.prompt, request.sampling)
                except StreeError as err:
                    self._end(running, [], "error", str(err))
                    continue
                occupant = self._slots[slot] = running
                if self._extend(slot, running, [first]):
                    occupant = None

    def _read(self, result: StepResult) -> None:
        """Hand a step's tokens to the requests that ran in it."""
        for slot, running in enumerate(self._slots):
            if running is None:
                continue
            if not result.healthy[slot]:
                self._leave(slot)
                text = "logits must be finite, they are not; check the weights and the dtype"
                self._end(running, [], "error", text)
            elif result.tokens[slot]:
                self._extend(slot, running, result.tokens[slot])

    def _extend(self, slot: int, running: _Running, emitted: list[int]) -> bool:
        """Append tokens as far as they are kept; return whether the request has ended."""
        generation, stop = running.generation, running.request.stop
        is_first = not generation.tokens
        kept, finish = stop.cut(emitted, generation.tokens, self._decode)
        generation.tokens += kept
        if not is_first:
            generation.accept_lengths.append(min(len(emitted) - 1, len(kept)))
        if finish is None:
            self._updates.append(Update(running.request_id, kept, None))
            return False
        self._leave(slot)
        self._end(running, kept, finish)
        return True

    def _leave(self, slot: int) -> None:
        self._engine.release(slot)
        self._slots[slot] = None

    def _end(
        self, running: _Running, tokens: list[int], finish: Finish, error: str | None = None
    ) -> None:
        running.generation.finish = finish
        running.generation.error = error
        self._updates.append(Update(running.request_id, tokens, running.generation))
