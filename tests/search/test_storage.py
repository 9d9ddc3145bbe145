"""Offline studies: where trials are kept, how they go on, and what does not fit."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from synthetic import FakeCost, latent_trace
from synthetic_data import make_table, memory_for, memory_of

from stree_autotune.search.study import (
    NUM_TRIALS,
    SearchSetting,
    StudyPlace,
    binding_limit,
    open_storage,
    search_batch,
)
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.search.verdict import decide_policy
from stree_autotune.trace.file import Trace
from stree_core.errors import ConfigError, NoFeasibleTree
from stree_core.extras import install_command
from stree_core.tree import DEFAULT_TREE, OFF, Tree

FREE = FakeCost(pad=16, per_token_ms=0.001, per_level_ms=0.0)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return latent_trace(0, num_prompts=40, length=60, phi=0.3)


@pytest.fixture(scope="module")
def space(trace: Trace) -> TreeSpace:
    return TreeSpace.of(trace, 16)


def test_a_tree_that_does_not_fit_is_never_proposed(space: TreeSpace) -> None:
    free = search_batch(space, FREE, 4, seed=0)
    assert free.best.tree.num_nodes == 16
    assert "--max-nodes 16 binds" in binding_limit(free, space, SearchSetting())
    setting = SearchSetting(memory=memory_for(Tree.chain(5), 4))
    tight = search_batch(space, FREE, 4, setting, seed=0)
    assert max(trial.tree.num_nodes for trial in tight.trials) == 5
    assert tight.too_large is not None
    assert tight.too_large.tokens_per_s > tight.best.tokens_per_s
    assert "memory binds: 16 nodes would reach" in binding_limit(tight, space, setting)


def test_the_verdict_names_the_limit(trace: Trace) -> None:
    setting = SearchSetting(memory=memory_for(Tree.chain(5), 4))
    (decision,) = decide_policy(trace, FREE, (4,), max_nodes=16, seed=0, setting=setting)
    assert 0 < decision.tree.num_nodes <= 5
    assert "memory binds" in decision.reason
    only_off = SearchSetting(memory=memory_for(OFF, 4))
    (decision,) = decide_policy(trace, FREE, (4,), max_nodes=16, seed=0, setting=only_off)
    assert decision.verdict == "off"
    assert "no speculation fits" in decision.reason
    nothing = SearchSetting(memory=memory_of(make_table(), 1e6))
    with pytest.raises(NoFeasibleTree, match="lower --batch-size or --context"):
        decide_policy(trace, FREE, (4,), max_nodes=16, seed=0, setting=nothing)


def test_memory_is_a_constraint_of_the_study(space: TreeSpace, tmp_path: Path) -> None:
    place = StudyPlace(open_storage(str(tmp_path / "a.journal")), "toy")
    setting = SearchSetting(NUM_TRIALS, place, memory_for(Tree.chain(5), 4))
    search_batch(space, FREE, 4, setting, seed=0)
    trials = place.open(4).get_trials(states=(TrialState.COMPLETE,))
    assert len(trials) == NUM_TRIALS
    infeasible = [trial for trial in trials if trial.constraints["memory"] > 0]
    assert infeasible
    assert {trial.value for trial in infeasible} == {0.0}
    assert place.open(4).best_trial.constraints["memory"] <= 0


def test_a_study_goes_on_where_it_stopped(space: TreeSpace, tmp_path: Path) -> None:
    path = tmp_path / "studies" / "a.journal"
    fresh = search_batch(space, FakeCost(), 2, SearchSetting(30), seed=0)
    for num_trials in (12, 30, 30):
        place = StudyPlace(open_storage(str(path)), "toy")
        setting = SearchSetting(num_trials, place)
        result = search_batch(space, FakeCost(), 2, setting, seed=0)
        trials = place.open(2).get_trials(states=(TrialState.COMPLETE,))
        assert len(trials) == num_trials
    assert result.best == fresh.best
    place = StudyPlace(open_storage(str(path)), "another question")
    assert place.open(2).trials == []


def test_the_first_trials_are_given(space: TreeSpace) -> None:
    evaluated = {trial.tree for trial in search_batch(space, FakeCost(), 1, seed=0).trials}
    assert {OFF, DEFAULT_TREE, *(Tree.chain(n) for n in range(1, 9))} <= evaluated


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:1/trials", "must be a database that can be reached"),
        ("nosuch://host/trials", "--storage nosuch://host/trials"),
        ("/proc/nowhere/a.journal", "a.journal cannot be written"),
    ],
)
def test_a_storage_that_cannot_be_used(storage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(storage)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_database_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        ConfigError, match="needs a driver.*" + re.escape(install_command("postgres"))
    ):
        open_storage("postgresql://me:secret@host/trials")


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "x\ny\n", '{"op_code": 99}\n', "\x00" * 9 + "\n"])
def test_a_file_that_is_no_journal_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.journal"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be a journal file"):
        open_storage(str(path))
    assert path.read_text() == text


def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="name a regular file"):
        open_storage(str(tmp_path / "pipe"))
