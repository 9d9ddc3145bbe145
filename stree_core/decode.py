"""Generate text: prompts in, tokens out, with what every step accepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from stree_core.engine import Engine
from stree_core.errors import ConfigError
from stree_core.sampling import SamplingParams

_Request = tuple[Sequence[int], SamplingParams]


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends: at an end token, which is kept, or after `max_new_tokens`."""

    max_new_tokens: int
    eos_token_ids: Collection[int] = ()

    def cut(self, tokens: Sequence[int], num_before: int) -> tuple[list[int], bool]:
        """Return the tokens to keep after `num_before` earlier ones, and whether that ends it."""
        kept = list(tokens[: self.max_new_tokens - num_before])
        for index, token in enumerate(kept):
            if token in self.eos_token_ids:
                return kept[: index + 1], True
        return kept, num_before + len(kept) >= self.max_new_tokens


@dataclass(slots=True)
class Generation:
    """One prompt's output.

    `tokens` holds the first token, which prefill emits, and all kept ones; `accept_lengths` the
    accepted draft tokens of every step, the last step's as far as they were kept.
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Decoding steps, prefill not counted."""
        return len(self.accept_lengths)


@dataclass(frozen=True, slots=True)
class Run:
    """All generations of one call, and the wall time of their steps without prefill."""

    generations: tuple[Generation, ...]
    step_seconds: float
    num_engine_steps: int

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


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    stop: StopRule,
    progress: Callable[[int], None] | None = None,
    sampling: Sequence[SamplingParams] | SamplingParams | None = None,
) -> Run:
    """Decode `prompts` (token ids), as many at a time as the engine has slots.

    `sampling` is of all prompts or of each, greedy by default. `progress` is called with the number
    of finished prompts. Raises ConfigError on a prompt that does not fit, or on sampling that the
    engine was not made for.
    """
    params = _of_each(prompts, sampling)
    if stop.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {stop.max_new_tokens}; raise it")
    generations: list[Generation] = []
    seconds = 0.0
    num_engine_steps = 0
    for group in _groups(list(zip(prompts, params, strict=True)), engine.config.num_slots):
        batch = [Generation() for _ in group]
        running = _prefill(engine, group, batch, stop)
        start = time.perf_counter()
        while running:
            emitted = engine.step().tokens
            num_engine_steps += 1
            for slot in sorted(running):
                if _extend(batch[slot], emitted[slot], stop):
                    running.discard(slot)
                    engine.release(slot)
        seconds += time.perf_counter() - start
        generations += batch
        if progress is not None:
            progress(len(generations))
    return Run(tuple(generations), seconds, num_engine_steps)


def stream(
    engine: Engine, prompt: Sequence[int], stop: StopRule, sampling: SamplingParams | None = None
) -> Iterator[list[int]]:
    """Decode one prompt in slot 0, yielding the kept tokens of prefill and of every step."""
    tokens, ended = stop.cut([engine.prefill(0, prompt, sampling)], 0)
    num_tokens = len(tokens)
    yield tokens
    while not ended:
        tokens, ended = stop.cut(engine.step().tokens[0], num_tokens)
        num_tokens += len(tokens)
        yield tokens


def _prefill(
    engine: Engine, group: Sequence[_Request], batch: list[Generation], stop: StopRule
) -> set[int]:
    """Fill one slot per prompt; return the slots that go on."""
    for slot in range(engine.config.num_slots):
        engine.release(slot)
    running = set()
    for slot, (prompt, params) in enumerate(group):
        engine.require_fits(len(prompt), stop.max_new_tokens)
        tokens, ended = stop.cut([engine.prefill(slot, prompt, params)], 0)
        batch[slot].tokens += tokens
        if ended:
            engine.release(slot)
        else:
            running.add(slot)
    return running


def _extend(generation: Generation, emitted: Sequence[int], stop: StopRule) -> bool:
    """Append a step's tokens as far as they are kept; return whether the sequence has ended."""
    kept, ended = stop.cut(emitted, len(generation.tokens))
    generation.tokens += kept
    generation.accept_lengths.append(min(len(emitted) - 1, len(kept)))
    return ended


def _groups(requests: Sequence[_Request], num_slots: int) -> Iterator[Sequence[_Request]]:
    for start in range(0, len(requests), num_slots):
        yield requests[start : start + num_slots]


def _of_each(
    prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams] | SamplingParams | None
) -> Sequence[SamplingParams]:
    """Return the parameters of every prompt."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * len(prompts)
    if len(sampling) != len(prompts):
        raise ConfigError(
            f"sampling is one for all prompts or one for each, got {len(sampling)} for "
            f"{len(prompts)}; pass as many"
        )
    return sampling
