"""Live speed: the tokens that the decoder gives, per step, and the time of full batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from tiny_models import ours, perturbed, random_texts, tiny_mamba2, word_tokenizer

from stree_autotune.live.speed import _with_slots_at_work, joined, live_speed
from stree_autotune.probe.stepper import phases
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request
from stree_core.engine.stop import Generation, StopRule
from stree_core.errors import ConfigError
from stree_core.tree import Tree

STOP = StopRule(30, (0,))
SECONDS = 0.25


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_mamba2(layers=1), folder / "target")
    draft = ours(perturbed(tiny_mamba2(layers=1), 0.1), folder / "draft")
    return Engine(target, draft, Tree.chain(2), EngineConfig(3, 64))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [word_tokenizer().encode(text).ids for text in random_texts(7)]


def test_waves_decode_what_a_session_decodes(engine: Engine, prompts: list[list[int]]) -> None:
    run = generate(engine, prompts, STOP)
    done: list[int] = []
    # Read before a wave and after each of its calls.
    times = itertools.accumulate(itertools.repeat(SECONDS))
    requests = [Request(prompt, STOP) for prompt in prompts]
    live = live_speed(engine, requests, done.append, lambda: next(times))
    assert [g.tokens for g in live.generations] == [g.tokens for g in run.generations]
    assert done == [3, 6, 7]
    assert live.tokens_per_step == run.tokens_per_step
    full = sum(calls_of_a_full_batch(run.generations[first : first + 3]) for first in (0, 3))
    assert live.num_calls == full > 0
    assert live.step_ms == pytest.approx(1e3 * SECONDS)
    assert live.tokens_per_s == pytest.approx(3 * run.tokens_per_step / SECONDS)
    both = joined([live, live])
    assert both.tokens_per_s == pytest.approx(live.tokens_per_s)
    assert len(both.generations) == 14


def calls_of_a_full_batch(wave: Sequence[Generation]) -> int:
    """Return how many calls of a wave of three come behind the last join, up to the first end."""
    (eldest, *_), joins = wave, [0]
    for phase in phases(3)[1:]:
        emitted, calls = 1, 0
        for accepted in eldest.accept_lengths:
            if emitted >= phase:
                break
            emitted, calls = emitted + accepted + 1, calls + 1
        joins.append(calls)
    ends = [join + g.num_steps for join, g in zip(joins, wave, strict=True)]
    return max(0, min(ends) - max(joins) - 1)


def test_steps_with_many_idle_slots_count_only_where_all_have_many(
    engine: Engine, prompts: list[list[int]]
) -> None:
    requests = [Request(prompt, STOP) for prompt in prompts]
    lone = live_speed(engine, requests[:1])
    assert lone.num_calls == lone.generations[0].num_steps - 1
    assert _with_slots_at_work([(0, 1.0), (2, 3.0), (3, 9.0)], 8) == [1.0, 3.0]
    assert _with_slots_at_work([(7, 1.0), (6, 3.0)], 8) == [3.0]


def test_requests_of_a_wave_join_one_after_another(
    engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(name: str) -> None:
        method = getattr(engine, name)

        def call(*arguments: object) -> object:
            events.append(name)
            return method(*arguments)

        monkeypatch.setattr(engine, name, call)

    noted("begin_prompt")
    noted("launch")
    live_speed(engine, [Request(prompt, STOP) for prompt in prompts[:3]])
    joined_at = [place for place, name in enumerate(events) if name == "begin_prompt"]
    between = [events[first:last].count("launch") for first, last in itertools.pairwise(joined_at)]
    assert len(joined_at) == 3
    assert min(between) > 0, "never in one step"


def test_what_cannot_be_timed_or_run_is_refused(engine: Engine, prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="texts must be longer"):
        live_speed(engine, [Request(prompts[0], StopRule(1))])
    with pytest.raises(ConfigError, match="must fit 64 positions"):
        live_speed(engine, [Request(prompts[0], StopRule(90))])
