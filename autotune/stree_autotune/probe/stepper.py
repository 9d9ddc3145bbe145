"""Steps in steady state: a session in the middle of its work, as long as a measurement takes."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from stree_autotune.probe.timing import Timing
from stree_autotune.store import TIMED_PATH
from stree_core.drafting import Draft, Prefill, PromptPart
from stree_core.engine import (
    Engine,
    EngineConfig,
    MakeRules,
    Request,
    SamplingParams,
    Session,
    Speculator,
    StepResult,
    StopRule,
    steps_of,
)
from stree_core.errors import StreeError
from stree_core.models import CacheSize, Model
from stree_core.tree import Tree
from stree_kernels.launch.rows import MAX_BUFFERED

_ENDLESS = StopRule(1 << 40)
_HOST_WARM_UP, _HOST_STEPS = 5, 45
_PROMPT = (1,) * 65
_REACH = 128
"""Positions that a slot goes on before and behind the middle."""


def occupy(speculator: Speculator, num_tokens: int, num_buffered: int | None = None) -> None:
    """Set every slot to hold `num_tokens`, the last step's path of TIMED_PATH still pending.

    Slots keep different numbers of rows, as in a server, or all `num_buffered`, and hold different
    tokens: rows that are alike choose the same experts.
    """
    scatter_tokens(speculator)
    speculator.buffers.active_B.fill_(1)
    for cache in (speculator.target_cache, speculator.draft_cache):
        if cache is not None:
            cache.committed_B.fill_(num_tokens)
            capacity = cache.pending.path_BL.shape[1]
            cache.pending.length_B.fill_(min(TIMED_PATH, capacity))
            cache.pending.path_BL.copy_(torch.arange(capacity)[None])
            buffered_B = cache.pending.num_buffered_B
            spread = (
                phases(len(buffered_B))
                if num_buffered is None
                else [num_buffered] * len(buffered_B)
            )
            buffered_B.copy_(torch.tensor(spread))


@torch.inference_mode()
def scatter_tokens(speculator: Speculator) -> None:
    """Give every slot and node a token of its own, always the same ones."""
    tokens_RB = speculator.buffers.tokens_RB
    generator = torch.Generator().manual_seed(0)
    vocab_size = speculator.target.shape.vocab_size
    tokens_RB.copy_(torch.randint(vocab_size, tokens_RB.shape, generator=generator))


def prompt_reader(model: Model) -> Callable[[], None]:
    """Return what consumes a short prompt, as servers do all the time; nothing on the CPU.

    What ran before can change what captured steps take by some percent (docs/log.md): so they are
    timed behind what they follow in use.
    """
    if model.device.type != "cuda":
        return _nothing
    cache = model.make_cache(CacheSize(1, 1, 1, len(_PROMPT)))
    prefill, part = Prefill(model, cache, use_graph=True), PromptPart(0, _PROMPT, 0, len(_PROMPT))

    def consume() -> None:
        with torch.inference_mode():
            prefill.read([part])

    return consume


def _nothing() -> None:
    pass


def phases(num_slots: int) -> list[int]:
    """Return for each slot how many tokens it is apart from the first, spread evenly and ascending.

    In a server requests start at any time; slots that started together would all store their states
    in the same steps, which takes less time. Whoever joins in this order gets slots in this order,
    so that the same slots store together here and there: those whose programs share a
    multiprocessor take longer.
    """
    return [(MAX_BUFFERED + 1) * slot // num_slots for slot in range(num_slots)]


class SteadyEngine(Engine):
    """An engine whose slots are busy without a prompt, and whose positions never run out.

    Where attention makes positions count, slots stay close to half of them. With `rules` whose
    acceptance is given, `restart` is called when slots begin and whenever they go back.
    """

    def __init__(
        self,
        target: Model,
        draft: Draft | Model | None,
        trees: Sequence[Tree],
        config: EngineConfig,
        rules: MakeRules | None = None,
        restart: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(target, draft, trees, config, rules=rules)
        scatter_tokens(self.speculator)
        shapes = [target.shape] if self.draft is None else [target.shape, self.draft.shape]
        attends = any(shape.has_attention for shape in shapes)
        self._restart = restart
        self._goes_back = attends or restart is not None
        self._ahead = math.inf if self._goes_back else 0
        # Two steps more may be under way when it goes back.
        room = config.num_positions // 2 - 2 * (self.depth + 1)
        self._reach = min(_REACH, max(0, room))
        self._under_way: deque[int] = deque()
        self._emitted = [0] * len(trees)
        self._collected = [0] * len(trees)

    def tokens_per_step(self, which: int) -> float:
        """Return the mean over all steps with a tree that were collected, at least 1."""
        return max(1.0, self._emitted[which] / max(1, self._collected[which]))

    def require_fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """Let every request in: it never ends."""

    @torch.inference_mode()
    def begin_prompt(
        self, slot: int, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> None:
        """Take a slot without a prompt."""
        super().begin_prompt(slot, prompt, params)
        self.speculator.rule.start(slot, params or SamplingParams(), prompt)

    @torch.inference_mode()
    def read_piece(self, only: int | None = None) -> dict[int, int | StreeError]:
        """Make slots active without running their prompts."""
        slots = self.next_piece
        for slot in slots:
            self._prompts.drop(slot)
        occupy(self.speculator, self._first)
        return dict.fromkeys(slots, 0)

    def launch(self, which: int = 0) -> None:
        """Start a step."""
        if self._ahead > 2 * self._reach:
            self._go_back()
        super().launch(which)
        self._under_way.append(which)

    def collect(self) -> StepResult:
        """Return what the oldest step did, and count its tokens for its tree."""
        result = super().collect()
        which = self._under_way.popleft()
        counts = list(map(len, result.tokens))
        self._emitted[which] += sum(counts)
        self._collected[which] += len(counts)
        self._ahead += max(counts) if self._goes_back else 0
        return result

    @property
    def _first(self) -> int:
        """As many positions before the middle as slots may go beyond it."""
        return self.config.num_positions // 2 - self._reach

    @torch.inference_mode()
    def _go_back(self) -> None:
        """Set all slots to the first position, without waiting for the steps under way."""
        for cache in self._caches():
            cache.committed_B.fill_(self._first)
        if self._restart is not None:
            self._restart()
        self._ahead = 0


class Stepper:
    """Steps a session for ever, with any of its engine's trees: what it costs is what users get."""

    def __init__(self, engine: SteadyEngine, params: SamplingParams) -> None:
        self.engine = engine
        self._which = 0
        session = Session(engine, choose_tree=lambda num_active: self._which)
        for slot in range(engine.config.num_slots):
            seeded = SamplingParams(params.temperature, top_p=params.top_p, seed=slot)
            session.submit(Request((1, 2), _ENDLESS, seeded))
        self._steps = steps_of(session)

    def step(self, which: int = 0) -> None:
        """Run one step with tree number `which`; raise ConfigError when a slot breaks down."""
        self._which = which
        next(self._steps)

    def host_timing(self) -> Timing:
        """Return what the host works for a step, the device's work left out."""
        times = []
        for _ in range(_HOST_WARM_UP + _HOST_STEPS):
            torch.cuda.synchronize()
            # What is under way has arrived, and the queue is empty: nothing is waited for.
            start = time.perf_counter()
            self.step(self._which)
            times.append(1e3 * (time.perf_counter() - start))
        timed = times[_HOST_WARM_UP:]
        return Timing(statistics.median(timed), statistics.stdev(timed))
