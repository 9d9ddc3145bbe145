"""Generate text: prompts in, tokens out, with what every step accepted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stree_core.drafting import Pair, require_profile_fits
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request, Update
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.session import Session
from stree_core.engine.stop import Decode, Generation, StopRule
from stree_core.errors import ConfigError
from stree_core.profile import Profile, policy_of

Setting = TypeVar("Setting", StopRule, SamplingParams)


@dataclass(frozen=True, slots=True)
class Run:
    """All generations of one call, the wall time of their steps, and that of their prompts."""

    generations: tuple[Generation, ...]
    step_seconds: float
    num_engine_steps: int
    prefill_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that steps emitted and that were kept: all but each prompt's first."""
        return sum(len(g.tokens) - 1 for g in self.generations)

    @property
    def num_steps(self) -> int:
        """Steps of all sequences; fewer engine steps when several run together."""
        return sum(g.num_steps for g in self.generations)

    @property
    def tokens_per_step(self) -> float:
        """Kept tokens per step of a sequence."""
        return self.num_tokens / max(1, self.num_steps)

    @property
    def step_ms(self) -> float:
        """Mean wall time of an engine step."""
        return 1e3 * self.step_seconds / max(1, self.num_engine_steps)

    @property
    def tokens_per_s(self) -> float:
        """Kept tokens per second of stepping."""
        return self.num_tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prompts per second of reading them."""
        num_tokens = sum(g.prompt_tokens for g in self.generations)
        return num_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def first_token_ms(self) -> float:
        """Mean time from a request's submission to its first token, waiting for a slot included."""
        times = [g.first_token_seconds or 0.0 for g in self.generations]
        return 1e3 * sum(times) / max(1, len(times))


def profile_engine(profile: Profile, pair: Pair, config: EngineConfig) -> Engine:
    """Return an engine whose steps take the profile's tree for the number of sequences that run.

    Raises ConfigError when the profile was made for another pair, and what Engine raises.
    """
    require_profile_fits(profile, pair)
    return Engine(pair.target, pair.draft, policy_of(profile), config)


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[StopRule] | StopRule,
    progress: Callable[[int], None] | None = None,
    sampling: Sequence[SamplingParams] | SamplingParams | None = None,
    decode: Decode | None = None,
) -> Run:
    """Decode `prompts` (token ids) with continuous batching over the engine's slots.

    Each step takes the tree that the engine's policy has for the number of sequences that run.
    `stop` and `sampling` are of all prompts or of each, the latter greedy by default. `progress` is
    called with the number of finished prompts. `decode` turns tokens into text, which stop strings
    need. Raises ConfigError on a prompt that cannot be served.
    """
    stops = _of_each(prompts, stop, "stop")
    settings = _of_each(prompts, sampling or SamplingParams(), "sampling")
    requests = [Request(*asked) for asked in zip(prompts, stops, settings, strict=True)]
    ended: dict[int, Generation] = {}
    with Session(engine, decode=decode) as session:
        for request in requests:
            session.submit(request)
        start = time.perf_counter()
        for updates in steps_of(session):
            for update in updates:
                if update.generation is None:
                    continue
                ended[update.request_id] = update.generation
                if progress is not None:
                    progress(len(ended))
        seconds = time.perf_counter() - start
    generations = tuple(ended[request_id] for request_id in range(len(prompts)))
    prefill_seconds = session.prefill_seconds
    return Run(generations, seconds - prefill_seconds, session.num_steps, prefill_seconds)


def stream(
    engine: Engine,
    prompt: Sequence[int],
    stop: StopRule,
    sampling: SamplingParams | None = None,
    decode: Decode | None = None,
) -> Iterator[list[int]]:
    """Decode one prompt, yielding the kept tokens of prefill and of every step.

    Steps take the tree that the engine's policy has for one sequence. The engine is busy until the
    iterator has ended or is closed or forgotten.
    """
    request = Request(prompt, stop, sampling or SamplingParams())
    with Session(engine, decode=decode) as session:
        session.submit(request)
        for updates in steps_of(session):
            for update in updates:
                yield update.tokens


def steps_of(session: Session) -> Iterator[list[Update]]:
    """Step a session until it has nothing to do, and yield what each step brings.

    The caller may submit requests between two steps. Raises ConfigError when one fails, what came
    before it in the same step is yielded first.
    """
    while session.busy:
        updates = session.step()
        served = list(itertools.takewhile(_is_served, updates))
        yield served
        if len(served) < len(updates):
            failed = updates[len(served)].generation
            raise ConfigError(str(failed and failed.error))


def _is_served(update: Update) -> bool:
    return update.generation is None or update.generation.finish != "error"


def _of_each(
    prompts: Sequence[Sequence[int]], given: Sequence[Setting] | Setting, what: str
) -> Sequence[Setting]:
    """Return the setting of every prompt."""
    if not isinstance(given, Sequence):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise ConfigError(
            f"{what} is one for all prompts or one for each, got {len(given)} for "
            f"{len(prompts)}; pass as many"
        )
    return given
