"""Continuous batching: every request gets the text that it would get alone, whatever else runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, perturbed, tiny_bamba, tiny_mamba2
from torch import Tensor

from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.engine.decode import generate, stream
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request
from stree_core.engine.session import Session
from stree_core.engine.stop import Generation, StopRule
from stree_core.errors import ConfigError
from stree_core.models.model import Model
from stree_core.models.prompt_pass import PromptPass
from stree_core.tree import DEFAULT_TREE, Tree

RAGGED = Tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
TREES = (Tree.chain(0), Tree.chain(2), DEFAULT_TREE, RAGGED, Tree.chain(5))
OFF, CHAIN = 0, 1
Pair = tuple[Model, Model]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_bamba(), folder / "target")
    return target, ours(perturbed(tiny_bamba(), 0.07), folder / "draft")


def _requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 12 tokens, 1 to 25 new tokens."""
    rng = random.Random(seed)
    return [
        Request(
            [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 12))],
            StopRule(rng.randint(1, 25)),
        )
        for _ in range(count)
    ]


def _engine(pair: Pair, num_slots: int, trees: Sequence[Tree] = TREES) -> Engine:
    return Engine(*pair, trees, EngineConfig(num_slots, num_positions=64))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return _requests(11)


@pytest.fixture(scope="module")
def alone(pair: Pair, requests: list[Request]) -> list[list[int]]:
    """What each request gets by itself, without speculation."""
    engine = _engine(pair, 1, TREES[:1])
    return [
        generate(engine, [request.prompt], request.stop).generations[0].tokens
        for request in requests
    ]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("num_slots", [1, 5])
def test_requests_join_and_leave_with_another_tree_every_step(
    pair: Pair, requests: list[Request], alone: list[list[int]], num_slots: int, lookahead: int
) -> None:
    """Off among them, so that the draft falls behind and catches up; slots are used again."""
    rng = random.Random(lookahead)
    session = Session(
        _engine(pair, num_slots), lambda active: rng.randrange(len(TREES)), lookahead=lookahead
    )
    ids = [session.submit(request) for request in requests]
    ended = session.run()
    assert [ended[request_id].tokens for request_id in ids] == alone
    assert {generation.finish for generation in ended.values()} == {"length"}
    assert not session.busy


def test_the_tree_follows_the_number_of_active_requests(
    pair: Pair, requests: list[Request], alone: list[list[int]]
) -> None:
    seen: list[int] = []

    def choose(num_active: int) -> int:
        seen.append(num_active)
        return OFF if num_active > 2 else CHAIN

    session = Session(_engine(pair, 4), choose, lookahead=1)
    for request in requests:
        session.submit(request)
    ended = session.run()
    assert [ended[index].tokens for index in range(len(requests))] == alone
    assert {1, 4} <= set(seen)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_draft_that_caught_up_is_as_good_as_before(pair: Pair, lookahead: int) -> None:
    """A draft that is the target itself has every token accepted, after any number of off steps."""
    engine = _engine((pair[0], pair[0]), 2)
    plan = [CHAIN, OFF, OFF, OFF, CHAIN, CHAIN, OFF, CHAIN, CHAIN]
    turns = iter(plan)
    session = Session(engine, lambda active: next(turns, CHAIN), lookahead=lookahead)
    for prompt in ([3], [5, 6, 7]):
        session.submit(Request(prompt, StopRule(1 + sum(3 if turn else 1 for turn in plan))))
    for generation in session.run().values():
        assert generation.accept_lengths == [2 if turn else 0 for turn in plan]


def test_updates_bring_every_token_once(pair: Pair, requests: list[Request]) -> None:
    session = Session(_engine(pair, 3), lambda active: 2, lookahead=1)
    for request in requests:
        session.submit(request)
    parts: dict[int, list[int]] = {index: [] for index in range(len(requests))}
    whole: dict[int, Generation] = {}
    while session.busy:
        for update in session.step():
            assert update.request_id not in whole, "nothing comes after the end"
            parts[update.request_id] += update.tokens
            if update.generation is not None:
                whole[update.request_id] = update.generation
    assert parts == {index: generation.tokens for index, generation in whole.items()}


def test_requests_may_come_while_others_run(pair: Pair, alone: list[list[int]]) -> None:
    session = Session(_engine(pair, 2), lambda active: CHAIN, lookahead=1)
    waiting = _requests(11)
    ended: dict[int, Generation] = {}
    while waiting or session.busy:
        if waiting:
            session.submit(waiting.pop(0))
        ended |= {u.request_id: u.generation for u in session.step() if u.generation is not None}
    assert [ended[index].tokens for index in range(11)] == alone


def _words(tokens: list[int]) -> str:
    return "".join(f"w{token} " for token in tokens)


@pytest.mark.parametrize("which", [OFF, 2])
def test_an_output_ends_exactly(pair: Pair, which: int) -> None:
    prompt = [4, 9, 2]
    engine = _engine(pair, 1, [TREES[which]])
    text = generate(engine, [prompt], StopRule(24)).generations[0].tokens
    end = next(place for place in range(6, 24) if text[place] not in text[:place])

    def ended_by(stop: StopRule) -> Generation:
        return generate(engine, [prompt], stop, decode=_words).generations[0]

    by_token = ended_by(StopRule(24, eos_token_ids=(text[end],)))
    assert (by_token.tokens, by_token.finish) == (text[: end + 1], "eos")
    # Across two tokens; the string is complete with the second.
    string = f"{text[end - 1]} w{text[end]} "
    by_string = ended_by(StopRule(24, strings=("never", string)))
    assert (by_string.tokens, by_string.finish) == (text[: end + 1], "string")
    by_length = ended_by(StopRule(end))
    assert (by_length.tokens, by_length.finish) == (text[:end], "length")
    pieces = list(stream(engine, prompt, StopRule(end)))
    assert [token for piece in pieces for token in piece] == text[:end]


def test_cancelled_requests_end_and_the_others_do_not_notice(
    pair: Pair, requests: list[Request], alone: list[list[int]]
) -> None:
    session = Session(_engine(pair, 2), lambda active: CHAIN, lookahead=1)
    for request in requests:
        session.submit(request)
    ended: dict[int, Generation] = {}
    steps = 0
    while session.busy:
        if steps == 2:
            for request_id in (0, 1, 7, 99):
                session.cancel(request_id)
        steps += 1
        ended |= {u.request_id: u.generation for u in session.step() if u.generation is not None}
    cancelled = {index for index, generation in ended.items() if generation.finish == "cancelled"}
    assert 7 in cancelled
    assert ended[7].tokens == []
    assert cancelled <= {0, 1, 7}
    for index, generation in ended.items():
        expected = alone[index]
        assert generation.tokens == expected[: len(generation.tokens)]
        assert index in cancelled or generation.tokens == expected


def test_requests_that_cannot_be_served_end_alone(
    pair: Pair, requests: list[Request], alone: list[list[int]]
) -> None:
    session = Session(_engine(pair, 2), lambda active: CHAIN)
    bad = [
        (Request([1] * 60, StopRule(30)), "must fit 64 positions"),
        (Request([3, VOCAB_SIZE, 2], StopRule(3)), f"from 0 to 95, got {VOCAB_SIZE} in a prompt"),
        (Request([-1], StopRule(3)), "from 0 to 95, got -1 in a prompt"),
    ]
    for request, _ in bad:
        session.submit(request)
    for request in requests:
        session.submit(request)
    ended = session.run()
    for index, (_, message) in enumerate(bad):
        assert ended[index].finish == "error"
        assert message in str(ended[index].error)
    assert [ended[index + len(bad)].tokens for index in range(len(requests))] == alone
    with pytest.raises(ConfigError, match="must fit 64 positions"):
        generate(_engine(pair, 2), [[1] * 60], StopRule(30))
    with pytest.raises(ConfigError, match="pass decode"):
        session.submit(Request([1], StopRule(3, strings=("x",))))


def test_a_prompt_without_memory_left_ends_alone(
    pair: Pair, requests: list[Request], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the prompts of a piece is too large shows when each is read alone."""
    unlucky, read = requests[3].prompt[0], Model.read

    def fail(self: Model, tokens_M: Tensor, this: PromptPass) -> Tensor:
        if self is pair[1] and unlucky in tokens_M[this.packing.offsets_S1[:-1]]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, tokens_M, this)

    session = Session(_engine(pair, 3), lambda active: CHAIN)
    monkeypatch.setattr(Model, "read", fail)
    for request in requests:
        session.submit(request)
    ended = session.run()
    unlucky_ones = [i for i, r in enumerate(requests) if len(r.prompt) > 1 and ended[i].error]
    assert 3 in unlucky_ones
    assert ended[3].finish == "error"
    size = len(requests[3].prompt)
    assert f"a piece of {size} tokens of a prompt needs more memory" in str(ended[3].error)
    for index, text in enumerate(alone):
        assert index in unlucky_ones or ended[index].tokens == text
    assert len(unlucky_ones) < 4


def test_logits_that_are_not_finite_end_their_request_alone(tmp_path: Path) -> None:
    theirs = tiny_mamba2(layers=1)
    theirs.config.tie_word_embeddings = False
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    model = ours(theirs, tmp_path / "model", torch.float32)
    engine = Engine(model, model, TREES, EngineConfig(3, num_positions=64))
    prompts = [[5], [6, 7], [8]]
    healthy = [generate(engine, [prompt], StopRule(20)).generations[0].tokens for prompt in prompts]
    # A token of the second text that the others never read.
    poison = next(
        t for t in healthy[1][2:] if all(t not in other for other in (healthy[0], healthy[2]))
    )
    model.weights.embed_VD[poison] = torch.nan
    for which in (OFF, CHAIN):
        session = Session(engine, lambda active, which=which: which, lookahead=1)
        for prompt in (*prompts, [poison]):
            session.submit(Request(prompt, StopRule(20)))
        ended = session.run()
        assert [ended[index].finish for index in range(4)] == ["length", "error", "length", "error"]
        assert (ended[0].tokens, ended[2].tokens) == (healthy[0], healthy[2])
        assert ended[1].tokens == healthy[1][: len(ended[1].tokens)]
        assert "logits must be finite" in str(ended[1].error)


def test_prefill_waits_for_the_step_under_way_in_stepping_time(
    pair: Pair, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the rest of that step would pass for prefill, and steps would look faster."""
    events: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        method = getattr(Engine, name)

        def call(*arguments: Any) -> Any:
            events.append(name)
            return method(*arguments)

        return call

    for name in ("launch", "wait", "read_piece"):
        monkeypatch.setattr(Engine, name, noted(name))
    session = Session(_engine(pair, 2, TREES[1:2]), lookahead=1)
    for request in requests:
        session.submit(request)
    session.run()
    joins = [before for before, event in pairwise(events) if event == "read_piece"]
    assert 1 < len(joins) <= len(requests)
    assert set(joins) == {"wait"}


def test_a_long_prompt_keeps_nobody_waiting(pair: Pair, alone: list[list[int]]) -> None:
    """While it is read, every call of `step` brings those that run a step, after one piece."""
    engine = Engine(*pair, TREES, EngineConfig(3, num_positions=1200, piece_tokens=50))
    session = Session(engine, lambda active: OFF, lookahead=0)
    short = [session.submit(Request([3, number], StopRule(60))) for number in (4, 5)]
    session.step()
    long = session.submit(Request([1] * 1000, StopRule(4)))
    brought: list[set[int]] = []
    while not brought or long not in brought[-1]:
        updates = session.step()
        brought.append({update.request_id for update in updates})
    assert len(brought) == 20
    assert all({*short} <= ids for ids in brought)
    ended = session.run()
    one = Engine(*pair, TREES[:1], EngineConfig(1, num_positions=1200))
    expected = generate(one, [[3, 4], [3, 5], [1] * 1000], [StopRule(60)] * 2 + [StopRule(4)])
    assert [ended[n].tokens for n in (*short, long)] == [g.tokens for g in expected.generations]
    assert ended[long].prompt_tokens == 1000
    waited, read = ended[long].first_token_seconds, ended[long].prefill_seconds
    assert waited is not None
    assert 0 < read <= waited


def test_a_piece_holds_a_token() -> None:
    with pytest.raises(ConfigError, match="piece_tokens must be 1 or more, got 0"):
        EngineConfig(piece_tokens=0)


def test_a_cancelled_prompt_frees_its_slot_at_once(
    pair: Pair, requests: list[Request], alone: list[list[int]]
) -> None:
    engine = Engine(*pair, TREES, EngineConfig(1, num_positions=1200, piece_tokens=50))
    session = Session(engine, lambda active: CHAIN)
    long = session.submit(Request([1] * 1000, StopRule(4)))
    following = session.submit(requests[3])
    for _ in range(4):
        assert session.step() == []
    session.cancel(long)
    ended = session.run()
    assert (ended[long].finish, ended[long].tokens) == ("cancelled", [])
    assert ended[following].tokens == alone[3]


def test_a_draft_catches_up_on_the_missing_part_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = Prefill.read

    def noted(self: Prefill, parts: Sequence[PromptPart]) -> Tensor:
        sizes.append(sum(part.end - part.begin for part in parts))
        return read(self, parts)

    engine = _engine((pair[0], pair[0]), 1)
    engine.prefill(0, [5] * 20)
    monkeypatch.setattr(Prefill, "read", noted)
    for which in (CHAIN, OFF, OFF, OFF, CHAIN, OFF, CHAIN):
        engine.step(which)
    assert sizes == [3, 1]
