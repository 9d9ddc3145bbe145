"""Continuous batching: requests join free slots, run to their own end, and leave at once.

On a GPU the engine is one step ahead of what the host has read: while it works on a step, the
tokens of the one before are cut, reported and, where a request ends, its slot is given to the next.
Between two steps a piece of the prompts of new requests is read, so that no sequence waits for a
whole one.

The caller's code (decoder, choice of the tree) may raise anything. So a step's tokens are first
noted for every request, and only then looked at, one request at a time: a request's next tokens
stay noted until its decoder has returned.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from stree_core.engine.accept_watch import AcceptWatch
from stree_core.engine.engine import Engine, require_tree
from stree_core.engine.request import Request, Running, Update, Waiting
from stree_core.engine.step_result import StepResult
from stree_core.engine.stop import Finish, Generation, careful
from stree_core.errors import ConfigError, StreeError, brief

ChooseTree = Callable[[int], int]
"""Returns which of an engine's trees a step takes, by the number of active sequences."""

_CUT_SHORT = "a request runs until its output ends, its step was cut short; submit it again"


class Session:
    """Runs requests on an engine's slots. A request that fails ends alone.

    `choose_tree` stands in place of the engine's policy, for measurements. `decode` turns token ids
    into text; requests with stop strings need it. `lookahead` is how many steps are under way while
    the host reads: by default 1 on a GPU, where they cost it no time.

    An engine serves one session at a time: raises ConfigError while another has requests on it.
    One that is closed or has nothing to do makes way for this one, and raises when it is used.
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
        self._choose_tree = choose_tree or engine.policy.choose
        expected = None if choose_tree else engine.policy.expected
        self._watch = None if expected is None else AcceptWatch(expected)
        self._decode = careful(decode) if decode is not None else None
        self._waiting: deque[Waiting] = deque()
        self._slots: list[Running | None] = [None] * engine.config.num_slots
        self._updates: list[Update] = []
        self._ended: dict[int, Generation] = {}
        self._num_submitted = 0
        self._is_stepping = False
        self.num_steps = 0
        self.prefill_seconds = 0.0
        engine.ownership.take(self)
        engine.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def busy(self) -> bool:
        """True while a request waits, runs, or has an update that nobody has read."""
        is_taken = any(running is not None for running in self._slots)
        return bool(self._waiting or self._updates or is_taken or self._num_under_way)

    @property
    def _num_under_way(self) -> int:
        """Steps launched and not collected; none once the engine serves another session."""
        return self._engine.num_under_way if self._engine.ownership.held_by(self) else 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; ids count from 0.

        Raises ConfigError when it has stop strings and the session cannot decode, or when the
        session is closed or has made way for another.
        """
        self._engine.ownership.require(self)
        if not isinstance(request, Request):
            raise ConfigError(f"a session takes a Request, got {brief(request)}; make one")
        if request.stop.strings and self._decode is None:
            raise ConfigError(
                "stop strings need a session that decodes tokens, this one does not; pass decode"
            )
        request_id = self._num_submitted
        self._num_submitted += 1
        self._waiting.append(Waiting(request_id, request, time.perf_counter()))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; its last update says so. An id that has ended is ignored.

        One whose prompt is being read frees its slot as well.
        """
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                self._end(Running(*waiting), [], "cancelled")
                return
        for slot, running in enumerate(self._slots):
            if running is not None and running.request_id == request_id:
                self._leave(slot)
                self._end(running, [], "cancelled")

    def close(self) -> None:
        """Forget all requests and updates; the engine is free for another session.

        Raises ConfigError within a step, from a decoder say.
        """
        self._require_between_steps()
        self._waiting.clear()
        self._updates.clear()
        self._slots = [None] * len(self._slots)
        if self._engine.ownership.held_by(self):
            self._engine.forget_prompts()
        self._engine.ownership.leave(self)

    def step(self) -> list[Update]:
        """Admit what fits, read a piece of prompts, launch a step; return what is new.

        That is what the step before it has brought, and first tokens.

        What `decode` raises ends the request whose tokens it was given. All other exceptions of the
        caller's code, KeyboardInterrupt from `decode` among them, come out of here and change
        nothing: the next call goes on where this one left off. Only where the engine's own step is
        cut short, by an interrupt or a fault, the requests in it end with an error.
        """
        self._engine.ownership.require(self)
        self._require_between_steps()
        self._is_stepping = True
        try:
            # What an exception left over comes first: an output must not outgrow its slot unseen.
            self._look()
            self._admit()
            self._read()
            self._look()
            self._advance()
            self._look()
        finally:
            self._is_stepping = False
        updates, self._updates = self._updates, []
        return updates

    def run(self) -> dict[int, Generation]:
        """Step until nothing is left; return the generations of what ended, by request id.

        After an exception the next call returns those that ended before it, too.
        """
        while self.busy:
            for update in self.step():
                if update.generation is not None:
                    self._ended[update.request_id] = update.generation
        ended, self._ended = self._ended, {}
        return ended

    @property
    def _num_active(self) -> int:
        """Requests that steps bring tokens."""
        return sum(running is not None and not running.is_reading for running in self._slots)

    def _require_between_steps(self) -> None:
        if self._is_stepping:
            raise ConfigError(
                "a session does one thing at a time, this one is within a step; step and close it "
                "from outside of its own callbacks"
            )

    def _may_go_on(self) -> bool:
        """Return whether a request may need more than the steps under way, of a token each."""
        return any(
            len(running.generation.tokens) + self._num_under_way
            < running.request.stop.max_new_tokens
            for running in self._slots
            if running is not None and not running.is_reading
        )

    def _admit(self) -> None:
        """Give free slots to waiting requests; one that cannot be served ends at once."""
        for slot, running in enumerate(self._slots):
            if running is not None and running.is_reading and not self._engine.is_reading(slot):
                # An interrupt came before its first token was noted.
                self._engine.begin_prompt(slot, running.request.prompt, running.request.sampling)
        for slot in range(len(self._slots)):
            while self._slots[slot] is None and self._waiting:
                request, running = self._waiting[0].request, Running(*self._waiting[0])
                running.generation.prompt_tokens = len(request.prompt)
                try:
                    self._engine.require_fits(len(request.prompt), request.stop.max_new_tokens)
                    self._engine.begin_prompt(slot, request.prompt, request.sampling)
                except StreeError as err:
                    self._waiting.popleft()
                    self._end(running, [], "error", str(err))
                else:
                    self._waiting.popleft()
                    self._slots[slot] = running

    def _read(self) -> None:
        """Read a piece of the prompts that are not read yet.

        An interrupt leaves them to be read from their start: nobody has seen a token of them. What
        else is raised ends the prompts of the piece, as any of them may be why.
        """
        slots = self._engine.next_piece
        if not slots:
            return
        # It would wait for the step under way, whose time is not its own.
        self._engine.wait()
        start = time.perf_counter()
        try:
            firsts = self._engine.read_piece()
        # torch may raise anything: what the piece's slots hold is unknown then.
        except Exception:
            for slot in slots:
                self._end_reading(slot, _CUT_SHORT)
            raise
        now = time.perf_counter()
        self.prefill_seconds += now - start
        for slot in slots:
            running = self._slots[slot]
            assert running is not None
            running.generation.prefill_seconds += now - start
            if slot not in firsts:
                continue
            first = firsts[slot]
            if isinstance(first, StreeError):
                self._end_reading(slot, str(first))
                continue
            running.noted.append([first])
            running.is_reading = False
            running.generation.first_token_seconds = now - running.submitted

    def _end_reading(self, slot: int, error: str) -> None:
        """End the request whose prompt could not be read."""
        running = self._slots[slot]
        assert running is not None
        self._leave(slot)
        self._end(running, [], "error", error)

    def _advance(self) -> None:
        """Launch a step if one may be needed, and note what the steps before it have brought."""
        goes_on = self._may_go_on()
        if goes_on:
            which = require_tree(self._choose_tree(self._num_active), len(self._engine.trees))
            with self._whole_or_ended():
                self._engine.launch(which)
                self.num_steps += 1
        # What is under way when nobody goes on is waited for.
        while self._num_under_way > (self._lookahead if goes_on else 0):
            self._engine.wait(1)
            with self._whole_or_ended():
                self._note(self._engine.collect())

    @contextmanager
    def _whole_or_ended(self) -> Iterator[None]:
        """End the requests that run in slots where the engine's work inside is cut short.

        Prompts that are being read end with them: the engine forgets them.
        """
        try:
            yield
        except StreeError as err:
            self._end_all(str(err))
        except BaseException:
            # torch may raise anything, and an interrupt may come: what slots hold is unknown now.
            self._end_all(_CUT_SHORT)
            raise

    def _end_all(self, error: str) -> None:
        for slot, running in enumerate(self._slots):
            if running is not None:
                self._slots[slot] = None
                self._end(running, [], "error", error)
        self._engine.clear()

    def _note(self, result: StepResult) -> None:
        """Note a step's tokens for all requests that ran in it."""
        slots = zip(self._slots, result.healthy, result.tokens, strict=True)
        for running, is_healthy, tokens in slots:
            if running is None or running.is_reading:
                continue
            if tokens or not is_healthy:
                running.noted.append(tokens if is_healthy else [])

    def _look(self) -> None:
        for slot in range(len(self._slots)):
            self._look_at(slot)

    def _look_at(self, slot: int) -> None:
        """Report what is noted for the request in a slot; it leaves the slot when it ends."""
        running = self._slots[slot]
        while running is not None and running.noted:
            kept, finish, error = running.cut_oldest(self._decode)
            if running is not self._slots[slot]:
                # The decoder has cancelled it.
                return
            emitted, generation = running.noted.popleft(), running.generation
            waited = None if generation.tokens else generation.first_token_seconds
            if generation.tokens and error is None:
                generation.accept_lengths.append(min(len(emitted) - 1, len(kept)))
            generation.tokens += kept
            if finish is None:
                self._updates.append(Update(running.request_id, kept, None, waited))
                continue
            self._leave(slot)
            self._end(running, kept, finish, error, waited)
            return

    def _leave(self, slot: int) -> None:
        self._engine.release(slot)
        self._slots[slot] = None

    def _end(
        self, running: Running, tokens: list[int], finish: Finish, error: str | None = None,
        waited: float | None = None,
    ) -> None:  # fmt: skip
        running.generation.finish = finish
        running.generation.error = error
        self._updates.append(Update(running.request_id, tokens, running.generation, waited))
        if self._watch is not None:
            self._watch.note(running.generation)
