"""A session says once that its texts are not those of its profile."""

from __future__ import annotations

import logging

import pytest
from synthetic_data import make_profile, policy_row

from stree_core.engine.accept_watch import FEWEST_STEPS, AcceptWatch
from stree_core.engine.stop import Generation
from stree_core.profile import policy_of
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
