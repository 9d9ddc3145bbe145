"""Three workers share a study and one is killed: nothing is lost, nothing is evaluated twice."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from synthetic import latent_trace

from stree_autotune.live.workers import PATIENCE_S, TREE, Claim, Evaluated, Worker, evaluated
from stree_autotune.search.study import StudyPlace, enqueue, enqueue_tree, open_storage, text_of
from stree_autotune.search.tree_space import TreeSpace
from stree_core.tree import OFF, Tree

SCRIPT = Path(__file__).parents[1] / "study_worker.py"
BUDGET = 14
DEADLINE_S = 120


@pytest.fixture(scope="module")
def space() -> TreeSpace:
    return TreeSpace.of(latent_trace(0, num_prompts=16, length=40), 12)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, with an empty database."""
    pytest.importorskip("psycopg", reason="needs psycopg, see the extra postgres")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(binaries[-1]) if binaries else None)
    if found is None:
        pytest.skip("needs a PostgreSQL server, no initdb is there")
    # The server refuses to run as root, so root hands it to the user of the package.
    is_root = os.geteuid() == 0
    if is_root and (shutil.which("setpriv") is None or not _has_user("postgres")):
        pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if is_root else []
    # Sockets have short paths, and pytest's own folders are closed to other users.
    folder = Path("/tmp") / f"stree-postgres-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        data = folder / "data"
        subprocess.run(
            [*user, found, "-D", data, "-U", "stree", "-A", "trust", "--no-sync"],
            check=True, capture_output=True, cwd=folder, timeout=DEADLINE_S,
        )  # fmt: skip
        server = subprocess.Popen(
            [*user, Path(found).with_name("postgres"), "-D", data, "-h", "127.0.0.1",
             "-p", str(port), "-k", folder, "-F"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        try:
            _wait_for(port)
            yield f"postgresql://stree@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=DEADLINE_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_user(name: str) -> bool:
    import pwd

    return any(entry.pw_name == name for entry in pwd.getpwall())


def _wait_for(port: int) -> None:
    import psycopg

    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="stree", dbname="postgres").close()
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        else:
            return


def test_one_of_three_is_killed_with_a_journal(space: TreeSpace, tmp_path: Path) -> None:
    check_three_workers(str(tmp_path / "shared.journal"), space, tmp_path)


def test_one_of_three_is_killed_with_postgres(
    postgres: str, space: TreeSpace, tmp_path: Path
) -> None:
    check_three_workers(postgres, space, tmp_path)


def check_three_workers(storage: str, space: TreeSpace, folder: Path) -> None:
    logs = [folder / f"log-{name}" for name in ("a", "bb", "victim")]
    with opened(storage):
        pass
    victim = start(storage, logs[2], "hang")
    others = []
    try:
        wait_until(lambda: "claimed" in read(logs[2]))
        others = [start(storage, log) for log in logs[:2]]
        wait_until(lambda: all("ready" in read(log) for log in logs[:2]))
        (folder / "go").touch()
        wait_until(lambda: all("told" in read(log) for log in logs[:2]))
    finally:
        victim.kill()
        victim.wait()
        codes = [other.wait(timeout=DEADLINE_S) for other in others]
    assert codes == [0, 0]
    with opened(storage) as study:
        states = [trial.state for trial in study.get_trials()]
        complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert states.count(TrialState.RUNNING) == 0
    trees = [trial.user_attrs[TREE] for trial in complete]
    assert len(trees) == len(set(trees)) == BUDGET
    told = [
        line.removeprefix("told ")
        for log in logs
        for line in read(log).splitlines()
        if line.startswith("told")
    ]
    assert sorted(told) == sorted(trees), "every result is kept once"
    claimed = [
        line.removeprefix("claimed ")
        for line in read(logs[2]).splitlines()
        if line.startswith("claimed")
    ]
    assert len(claimed) == 3
    assert set(claimed) <= set(trees), "what the killed worker had claimed was taken over"
    queued = {text_of(tree) for tree in (OFF, *map(Tree.chain, range(1, 9)))}
    assert queued <= set(trees)
    assert all("told" in read(log) for log in logs), "all three have taken part"


@contextmanager
def opened(storage: str) -> Iterator[optuna.Study]:
    """Open the shared study, and close the connections to its database."""
    place = open_storage(storage)
    yield StudyPlace(place, "shared").open(1)
    if isinstance(place, optuna.storages.RDBStorage):
        place.remove_session()
        place.engine.dispose()


def start(storage: str, log: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, SCRIPT, storage, log, *more])


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline, "workers did not get this far"
        time.sleep(0.05)


def found(space: TreeSpace, tree: Tree, rate: float) -> Evaluated:
    return Evaluated(tree, space.tokens_per_step(tree), 1.0, 0.0, rate)


class Clock:
    """What `time.monotonic` says, until it is moved on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def place(space: TreeSpace, tmp_path: Path) -> StudyPlace:
    place = StudyPlace(open_storage(str(tmp_path / "shared.journal")), "shared")
    enqueue(place.open(1), space, [])
    return place


def pulseless(place: StudyPlace, space: TreeSpace, budget: int) -> Worker:
    """Return a worker that others take for dead: it is never entered, so it has no heartbeat."""
    return Worker(place.open(1), space, budget)


@pytest.fixture
def lost(place: StudyPlace, space: TreeSpace) -> Claim:
    """A tree that a dead worker was given."""
    (claim,) = pulseless(place, space, 1).claim(1)
    return claim


def test_a_result_that_comes_too_late_is_dropped(
    space: TreeSpace, place: StudyPlace, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    slow = pulseless(place, space, 2)
    with Worker(place.open(1), space, 2) as fast:
        (kept,) = slow.claim(1)
        (own,) = fast.claim(2)
        assert fast.claim(1) == []
        clock.now = PATIENCE_S + 1
        (retried,) = fast.claim(1)
        assert retried.tree == kept.tree
        slow.tell(kept, found(space, kept.tree, 1.0))
        assert "given up before its result came" in caplog.text
        fast.tell(retried, found(space, retried.tree, 2.0))
        fast.tell(own, found(space, own.tree, 3.0))
        assert fast.claim(1) == []
        assert not fast.wait()
    assert sorted(one.tokens_per_s for one in evaluated(place.open(1))) == [2.0, 3.0]


def test_a_tree_that_changes_hands_leaves_no_room_for_another(
    space: TreeSpace, place: StudyPlace, lost: Claim, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = place.open(1)
    with Worker(watched, space, 1) as retry, Worker(place.open(1), space, 1) as other:
        assert retry.claim(1) == []
        meanwhile = []

        def between(name: str) -> None:
            original = getattr(watched, name)

            def call(*args: object, **options: object) -> None:
                meanwhile.append(other.claim(1))
                original(*args, **options)
                meanwhile.append(other.claim(1))

            monkeypatch.setattr(watched, name, call)

        between("add_trial")
        between("tell")
        clock.now = PATIENCE_S + 1
        (own,) = retry.claim(1)
        assert own.tree == lost.tree
        assert meanwhile == [[]] * 4


def test_of_two_heirs_one_gives_way(
    space: TreeSpace, place: StudyPlace, lost: Claim, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = place.open(1)
    with Worker(slow, space, 1) as late, Worker(place.open(1), space, 1) as early:
        assert late.claim(1) == early.claim(1) == []
        inherited = []
        add_trial = slow.add_trial

        def overtaken(trial: optuna.trial.FrozenTrial) -> None:
            add_trial(trial)
            inherited.extend(early.claim(1))

        monkeypatch.setattr(slow, "add_trial", overtaken)
        clock.now = PATIENCE_S + 1
        assert late.claim(1) == []
    assert [claim.tree for claim in inherited] == [lost.tree]
    states = [trial.state for trial in place.open(1).get_trials()]
    assert states.count(TrialState.RUNNING) == 1
    assert states.count(TrialState.FAIL) == 2


def test_a_tree_is_evaluated_once(space: TreeSpace) -> None:
    study = StudyPlace(seed=3).open(1)
    for _ in range(2):
        # By the back door: what is queued twice reaches the workers twice.
        study.enqueue_trial({"depth": 3, "width": 1, "num_nodes": 3})
    enqueue_tree(study, space, Tree.chain(3))
    with Worker(study, space, 4) as worker:
        claims = worker.claim(4)
    trees = [claim.tree for claim in claims]
    assert trees.count(Tree.chain(3)) == 1
    assert len(trees) == len(set(trees)) == 4


def test_an_exhausted_space_ends_the_study() -> None:
    space = TreeSpace.of(latent_trace(0, num_prompts=8, length=20), 1)
    study = StudyPlace().open(1)
    with Worker(study, space, 40) as worker:
        claims = worker.claim(40)
        assert {claim.tree for claim in claims} == {OFF, Tree.chain(1)}
        for claim in claims:
            worker.tell(claim, found(space, claim.tree, 1.0))
        assert worker.claim(40) == []
        assert not worker.wait()
