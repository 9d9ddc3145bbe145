"""A session says once that its texts are not those of its profile."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from synthetic_data import make_profile, policy_row
from tiny_models import ours, perturbed, tiny_mamba2

from stree_core.engine import accept_watch
from stree_core.engine.accept_watch import FEWEST_STEPS, AcceptWatch
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.request import Request
from stree_core.engine.session import Session
from stree_core.engine.stop import Generation, StopRule
from stree_core.profile import Policy, policy_of
from stree_core.tree import Tree


def generation(accept_length: int, num_steps: int) -> Generation:
    return Generation(accept_lengths=[accept_length] * num_steps)


@pytest.mark.parametrize(("accept_length", "says"), [(0, True), (1, False), (4, True)])
def test_texts_that_accept_otherwise_are_told_once(
    caplog: pytest.LogCaptureFixture, accept_length: int, says: bool
) -> None:
    caplog.set_level(logging.WARNING)
    watch = AcceptWatch((1.8, 2.4))
    watch.note(generation(accept_length, FEWEST_STEPS - 1))
    assert not caplog.records
    for _ in range(3):
        watch.note(generation(accept_length, 5))
    assert len(caplog.records) == says
    if says:
        (record,) = caplog.records
        assert record.getMessage().startswith(
            f"steps emit {accept_length + 1:.2f} tokens in the mean, the profile expects 1.80 to"
        )


def test_a_policy_expects_what_its_rows_say() -> None:
    profile = make_profile()
    rows = tuple(policy_row(size, Tree.chain(2)) for size in (1, 8))
    low, high = policy_of(profile.model_copy(update={"policy": rows})).expected
    for row in rows:
        assert 1 <= low <= row.predicted.tokens_per_step <= high


@pytest.mark.parametrize(("expected", "says"), [((1.0, 3.0), False), ((2.9, 3.0), True)])
def test_a_session_watches_its_profiles_interval(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    expected: tuple[float, float],
    says: bool,
) -> None:
    monkeypatch.setattr(accept_watch, "FEWEST_STEPS", 8)
    caplog.set_level(logging.WARNING, logger=accept_watch.logger.name)
    target, draft = (
        ours(perturbed(tiny_mamba2(), noise), tmp_path / name)
        for name, noise in (("target", 0.0), ("draft", 0.5))
    )
    policy = Policy((Tree.chain(2),), ((1, 0),), expected)
    engine = Engine(target, draft, policy, EngineConfig(2, num_positions=64))
    session = Session(engine)
    for prompt in ([1, 2], [3], [4, 5, 6]):
        session.submit(Request(prompt, StopRule(20)))
    ended = session.run()
    assert all(generation.num_steps for generation in ended.values())
    assert len(caplog.records) == says
    with_own_choice = Session(engine, choose_tree=lambda _: 0)
    with_own_choice.submit(Request([7], StopRule(30)))
    with_own_choice.run()
    assert len(caplog.records) == says, "who chooses trees is not measured by the profile's"
