"""One request, one caller's function, one session harms no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, perturbed, tiny_bamba, tiny_mamba2

from stree_core.drafting.prefill import Prefill
from stree_core.engine.decode import generate, stream
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.session import Session
from stree_core.engine.stop import Generation, StopRule
from stree_core.errors import ConfigError
from stree_core.models.model import Model
from stree_core.tree import Tree

RAGGED = Tree.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])
TREES = (Tree.chain(0), Tree.chain(2), RAGGED)
POSITIONS = 48
NEVER = ("never",)
Pair = tuple[Model, Model]


class Whim(Exception):
    """What a caller's function raises for no reason."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_bamba(), folder / "target")
    return target, ours(perturbed(tiny_bamba(), 0.07), folder / "draft")


def _engine(pair: Pair, num_slots: int, support: SamplingSupport | None = None) -> Engine:
    config = EngineConfig(num_slots, POSITIONS, sampling=support or SamplingSupport())
    return Engine(*pair, TREES, config)


def _words(tokens: list[int]) -> str:
    return "".join(f"w{token} " for token in tokens)


def _texts(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Return what each request gets by itself."""
    return [
        generate(engine, [r.prompt], r.stop, sampling=r.sampling, decode=_words)
        .generations[0].tokens
        for r in requests
    ]  # fmt: skip


def _good(rng: random.Random) -> Request:
    prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 8))]
    strings = (f"w{rng.randrange(VOCAB_SIZE)} ",) if rng.random() < 0.4 else ()
    eos = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.3 else ()
    return Request(prompt, StopRule(rng.randint(1, 9), eos, strings))


BAD: tuple[Callable[[], Any], ...] = (
    lambda: Request([3, VOCAB_SIZE], StopRule(4)),
    lambda: Request([3, -1], StopRule(4)),
    lambda: Request([10**30], StopRule(4)),
    lambda: Request([1] * POSITIONS, StopRule(4)),
    lambda: Request([1], StopRule(1 << 40)),
    lambda: Request([1], StopRule(4), SamplingParams(0.5)),
    lambda: Request([1], StopRule(4), SamplingParams(repetition_penalty=1.5)),
)
"""Requests that end with an error when their turn comes."""

REFUSED: tuple[Callable[[], Any], ...] = (
    lambda: Request([1.5], StopRule(4)),  # type: ignore[list-item]
    lambda: Request("text", StopRule(4)),  # type: ignore[arg-type]
    lambda: Request([], StopRule(4)),
    lambda: Request([1], StopRule(float("nan"))),  # type: ignore[arg-type]
    lambda: Request([1], StopRule(4, 0)),  # type: ignore[arg-type]
    lambda: Request([1], StopRule(4, strings="stop")),
    lambda: Request([1], StopRule(4), SamplingParams(float("nan"))),
    lambda: [1, 2, 3],
)
"""What never becomes a request, or is none."""


class Crowd:
    """A session whose requests join at any time, and whose caller's functions raise at random."""

    def __init__(self, engine: Engine, rng: random.Random, lookahead: int) -> None:
        self.rng = rng
        self.num_raised = dict.fromkeys((Whim, KeyboardInterrupt), 0)
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Generation] = {}
        self.session = Session(engine, self._choose, self._decode, lookahead)

    def _decode(self, tokens: list[int]) -> str:
        for kind in self.num_raised:
            if self.rng.random() < 0.04:
                self.num_raised[kind] += 1
                raise kind("for no reason")
        return _words(tokens)

    def _choose(self, num_active: int) -> int:
        if self.rng.random() < 0.1:
            raise Whim
        return self.rng.choice([0, 1, 2, 2, 99])

    def submit(self, make: Callable[[], Any]) -> int | None:
        """Return the id of a request, None when it is refused."""
        try:
            return self.session.submit(make())
        except ConfigError:
            return None

    def step(self) -> None:
        """Run a step, whatever it raises."""
        try:
            updates = self.session.step()
        except (Whim, KeyboardInterrupt, ConfigError):
            return
        for update in updates:
            assert update.request_id not in self.ended, "nothing comes after the end"
            self.tokens.setdefault(update.request_id, []).extend(update.tokens)
            if update.generation is not None:
                self.ended[update.request_id] = update.generation


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(5)
    return [_good(rng) for _ in range(150)]


@pytest.fixture(scope="module")
def alone(pair: Pair, requests: list[Request]) -> list[list[int]]:
    return _texts(_engine(pair, 1), requests)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_two_hundred_requests_of_which_a_quarter_is_bad(
    pair: Pair, requests: list[Request], alone: list[list[int]], lookahead: int
) -> None:
    """Every good text is its own, every bad request ends, and nothing is lost or comes twice."""
    rng = random.Random(lookahead)
    makes: list[Callable[[], Any]] = [*(lambda r=r: r for r in requests)]
    makes += rng.choices(BAD, k=30) + rng.choices(REFUSED, k=20)
    places = rng.sample(range(200), 200)
    crowd = Crowd(_engine(pair, 6), rng, lookahead)
    ids: dict[int, int | None] = {}
    cancelled: set[int | None] = set()
    while places or crowd.session.busy:
        for _ in range(min(len(places), rng.randint(0, 3))):
            place = places.pop()
            ids[place] = crowd.submit(makes[place])
        if rng.random() < 0.05:
            cancelled.add(ids[place])
            crowd.session.cancel(ids[place] or 0)
        crowd.step()
    num_failed = 0
    for place, request_id in ids.items():
        if request_id is None:
            assert place >= 180
            continue
        ended = crowd.ended[request_id]
        assert crowd.tokens[request_id] == ended.tokens
        if place >= 150:
            assert ended.finish in ("error", "cancelled")
            assert ended.tokens == []
        elif ended.finish == "error":
            num_failed += 1
            assert "Whim: for no reason" in str(ended.error)
            assert ended.tokens == alone[place][: len(ended.tokens)]
        elif ended.finish == "cancelled":
            assert request_id in cancelled
            assert ended.tokens == alone[place][: len(ended.tokens)]
        else:
            assert ended.tokens == alone[place]
            assert len(ended.accept_lengths) < len(ended.tokens) or len(ended.tokens) == 1
    assert num_failed == crowd.num_raised[Whim] > 0
    assert crowd.num_raised[KeyboardInterrupt] > 0


PROMPTS = ([4, 9, 2], [7], [5, 5, 8, 1], [11, 3])


def _four(strings: tuple[str, ...] = NEVER) -> list[Request]:
    """Four requests whose outputs are decoded at every step and end by their limits."""
    return [Request(prompt, StopRule(6 + n, strings=strings)) for n, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def four(pair: Pair) -> list[list[int]]:
    return _texts(_engine(pair, 1), _four())


def _chain(num_active: int) -> int:
    return 1


def _run(session: Session, kind: type[BaseException]) -> tuple[int, list[Generation]]:
    """Run a session to its end; return how often it raised, and what became of all requests."""
    num_raised = 0
    ended: dict[int, Generation] = {}
    while session.busy:
        try:
            ended |= session.run()
        except kind:
            num_raised += 1
    return num_raised, [ended[n] for n in sorted(ended)]


def _tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def _once(error: BaseException, place: int) -> Callable[[], None]:
    """Return a function that raises at its call number `place`."""
    calls = count()

    def check() -> None:
        if next(calls) == place:
            raise error

    return check


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("place", [0, 2, 5, 9])
def test_an_interrupt_in_a_decoder_loses_nothing(
    pair: Pair, four: list[list[int]], place: int, lookahead: int
) -> None:
    check = _once(KeyboardInterrupt(), place)

    def decode(tokens: list[int]) -> str:
        check()
        return _words(tokens)

    results = []
    for decoder in (_words, decode):
        session = Session(_engine(pair, 3), _chain, decoder, lookahead)
        for request in _four():
            session.submit(request)
        results.append(_run(session, KeyboardInterrupt))
    (_, undisturbed), (num_raised, generations) = results
    assert num_raised == 1
    assert generations == undisturbed
    assert _tokens(generations) == four


def test_run_returns_what_ended_before_an_exception(pair: Pair, four: list[list[int]]) -> None:
    check = _once(KeyboardInterrupt(), 11)

    def decode(tokens: list[int]) -> str:
        check()
        return _words(tokens)

    session = Session(_engine(pair, 1), _chain, decode)
    for request in _four():
        session.submit(request)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert [generation.tokens for generation in session.run().values()] == four
    assert session.run() == {}


def _raise(tokens: list[int]) -> str:
    raise ValueError("first line\nsecond line")


class _Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def _raise_wordless(tokens: list[int]) -> str:
    raise _Wordless


@pytest.mark.parametrize(
    ("decode", "sentence"),
    [
        (_raise, "it raised ValueError: first line second line; mend it"),
        (_raise_wordless, "_Wordless"),
        (lambda tokens: next(iter([])), "it raised StopIteration"),
        (lambda tokens: None, "must return text, got None"),
        (lambda tokens: b"text", "must return text, got b'text'"),
        (7, "TypeError: 'int' object is not callable"),
    ],
)
def test_a_decoder_that_fails_ends_its_request_alone(
    pair: Pair, four: list[list[int]], decode: Any, sentence: str
) -> None:
    session = Session(_engine(pair, 3), _chain, decode)
    for request, strings in zip(_four(), ((), NEVER, (), ()), strict=True):
        session.submit(Request(request.prompt, StopRule(request.stop.max_new_tokens, (), strings)))
    ended = session.run()
    assert ended[1].finish == "error"
    assert sentence in str(ended[1].error)
    assert "\n" not in str(ended[1].error)
    assert [ended[n].tokens for n in (0, 2, 3)] == [four[n] for n in (0, 2, 3)]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(
    ("which", "sentence"),
    [(3, "numbered 0 to 2, got 3"), (-1, "got -1"), (1.0, "whole number"), (None, "whole number")],
)
def test_a_tree_that_does_not_exist_changes_nothing(
    pair: Pair, four: list[list[int]], which: Any, sentence: str, lookahead: int
) -> None:
    choices = iter([1, which, which])
    session = Session(_engine(pair, 3), lambda active: next(choices, 1), _words, lookahead)
    for request in _four():
        session.submit(request)
    for _ in range(2):
        with pytest.raises(ConfigError, match=sentence):
            session.run()
    assert [g.tokens for _, g in sorted(session.run().items())] == four
    engine = _engine(pair, 1)
    with pytest.raises(ConfigError, match=sentence):
        engine.launch(which)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyboardInterrupt(), "its step was cut short; submit it again"),
        (RuntimeError("device"), "its step was cut short; submit it again"),
        (torch.OutOfMemoryError("CUDA out of memory"), "a step needs more memory"),
    ],
)
def test_a_step_cut_short_ends_those_in_it_and_no_other(
    pair: Pair, four: list[list[int]], error: BaseException, sentence: str, lookahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What slots hold is unknown then: half of a step may have been done, one cache be flipped."""
    engine = _engine(pair, 2)
    check, flip = _once(error, 2), Engine._flip

    def half(self: Engine) -> None:
        self._caches()[0].flip()
        check()
        self._caches()[1].flip()

    session = Session(engine, _chain, _words, lookahead)
    for request in _four():
        session.submit(request)
    monkeypatch.setattr(Engine, "_flip", half)
    num_raised, generations = _run(session, type(error))
    assert num_raised == (not isinstance(error, torch.OutOfMemoryError))
    for generation, text in zip(generations[:2], four, strict=False):
        assert sentence in str(generation.error)
        assert generation.tokens == text[: len(generation.tokens)]
    assert _tokens(generations[2:]) == four[2:]
    monkeypatch.setattr(Engine, "_flip", flip)
    assert [generate(engine, [r.prompt], r.stop, decode=_words).generations[0].tokens
            for r in _four()] == four  # fmt: skip


def test_an_interrupt_while_waiting_for_a_step_loses_nothing(
    pair: Pair, four: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, wait = _once(KeyboardInterrupt(), 4), Engine.wait

    def interrupted(self: Engine, num_steps: int | None = None) -> None:
        wait(self, num_steps)
        check()

    monkeypatch.setattr(Engine, "wait", interrupted)
    session = Session(_engine(pair, 2), _chain, _words, 1)
    for request in _four():
        session.submit(request)
    num_raised, generations = _run(session, KeyboardInterrupt)
    assert num_raised == 1
    assert _tokens(generations) == four


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device")])
def test_prompts_cut_short(
    pair: Pair, four: list[list[int]], error: BaseException, which: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """After an interrupt they are read again; what fails by itself is not tried twice.

    Three prompts are in the first piece, which both models read.
    """
    check, read = _once(error, which), Prefill.read

    def cut(self: Prefill, *given: Any) -> Any:
        check()
        return read(self, *given)

    monkeypatch.setattr(Prefill, "read", cut)
    session = Session(_engine(pair, 3), _chain, _words, 1)
    for request in _four():
        session.submit(request)
    num_raised, generations = _run(session, type(error))
    assert num_raised == 1
    failed = range(3) if which < 2 else range(3, 4)
    if isinstance(error, KeyboardInterrupt):
        failed = range(0)
    assert _tokens(generations) == [[] if n in failed else four[n] for n in range(4)]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_decoder_may_submit_and_cancel_but_neither_step_nor_close(
    pair: Pair, four: list[list[int]], lookahead: int
) -> None:
    # By the text's first token and how many there are.
    actions: dict[tuple[int, int], Callable[[], object]] = {
        (four[0][0], 2): lambda: session.submit(_four()[0]),
        (four[0][0], 3): lambda: session.cancel(0),
        (four[1][0], 2): lambda: session.step(),
        (four[2][0], 2): lambda: session.close(),
    }

    def decode(tokens: list[int]) -> str:
        actions.pop((tokens[0], len(tokens)), list)()
        return _words(tokens)

    session = Session(_engine(pair, 1), _chain, decode, lookahead)
    for request in _four():
        session.submit(request)
    ended = session.run()
    assert ended[0].finish == "cancelled"
    assert ended[0].tokens == four[0][: len(ended[0].tokens)]
    for n in (1, 2):
        assert "this one is within a step" in str(ended[n].error)
    assert (ended[3].tokens, ended[4].tokens) == (four[3], four[0])


def test_a_second_session_is_refused_while_the_first_has_requests(
    pair: Pair, four: list[list[int]]
) -> None:
    engine = _engine(pair, 2)
    first = Session(engine, _chain, _words, 1)
    for request in _four():
        first.submit(request)
    for _ in range(3):
        with pytest.raises(ConfigError, match="serves one session at a time"):
            Session(engine)
        with pytest.raises(ConfigError, match="serves one session at a time"):
            generate(engine, [[1]], StopRule(3))
        first.step()
    assert _run(first, ConfigError)[0] == 0
    second = Session(engine, _chain, _words, 1)
    with pytest.raises(ConfigError, match="no longer has it; make a new session"):
        first.submit(_four()[0])
    with pytest.raises(ConfigError, match="no longer has it; make a new session"):
        first.step()
    first.close()
    for request in _four():
        second.submit(request)
    assert not first.busy
    assert _tokens(_run(second, ConfigError)[1]) == four


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_session_that_is_closed_or_forgotten_leaves_nothing_behind(
    pair: Pair, four: list[list[int]], lookahead: int
) -> None:
    engine = _engine(pair, 2)
    for steps in range(4):
        with Session(engine, _chain, _words, lookahead) as closed:
            closed.submit(_four()[steps])
            for _ in range(steps):
                closed.step()
        assert not closed.busy
        with pytest.raises(ConfigError, match="make a new session"):
            closed.submit(_four()[0])
        forgotten = Session(engine, _chain, _words, lookahead)
        forgotten.submit(_four()[steps])
        forgotten.step()
        del forgotten
        session = Session(engine, _chain, _words, lookahead)
        for request in _four():
            session.submit(request)
        assert _tokens(_run(session, ConfigError)[1]) == four


def test_abandoned_streams_and_calls_free_the_engine(pair: Pair, four: list[list[int]]) -> None:
    engine = _engine(pair, 2)

    def interrupt(num_ended: int) -> None:
        raise KeyboardInterrupt

    def refuse(num_ended: int) -> None:
        raise Whim

    request = _four()[2]
    pieces = stream(engine, request.prompt, request.stop, decode=_words)
    assert next(pieces) == four[2][:1]
    with pytest.raises(ConfigError, match="serves one session at a time"):
        generate(engine, PROMPTS, StopRule(3))
    pieces.close()  # type: ignore[attr-defined]
    # The exceptions are kept, and with them the frames that they came from.
    kept = []
    for progress, kind in ((interrupt, KeyboardInterrupt), (refuse, Whim)):
        with pytest.raises(kind) as caught:
            generate(engine, PROMPTS, StopRule(6), progress)
        kept.append(caught)
    with pytest.raises(ConfigError, match="at least one token") as caught:
        generate(engine, [[1], []], StopRule(3))
    kept.append(caught)
    with pytest.raises(ConfigError, match="from 0 to 95") as caught:
        generate(engine, [[1, 2], [VOCAB_SIZE], [3]], StopRule(9))
    kept.append(caught)
    stops = [request.stop for request in _four()]
    run = generate(engine, PROMPTS, stops, decode=_words)
    assert [generation.tokens for generation in run.generations] == four


def test_a_draft_with_other_tokens_is_refused(pair: Pair, tmp_path: Path) -> None:
    """It would be asked for tokens that it lacks, or propose what the target lacks."""
    for size in (VOCAB_SIZE - 8, VOCAB_SIZE + 8):
        theirs = tiny_mamba2(layers=1)
        theirs.resize_token_embeddings(size, mean_resizing=False)
        draft = ours(theirs, tmp_path / str(size))
        with pytest.raises(ConfigError, match=f"the target's 96 tokens, it knows {size}"):
            Engine(pair[0], draft, TREES, EngineConfig(1, POSITIONS))
