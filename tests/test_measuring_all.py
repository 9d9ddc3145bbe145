"""The set of measurements as a run: what is left out, what is replaced, what is packed."""

from __future__ import annotations

import json
import sys
import tarfile
import threading
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts import script
from synthetic_data import make_profile, policy_row

from stree_core.profile import Measured, MeasuredBlock
from stree_core.tree import Tree

runner = script("all")
shipped = script("shipped")
sources = script("sources")
parts = script("parts")
stale = script("stale")
gpus = script("gpus")

OPTIONS = Namespace(peers=None, pack=None, skip_gate=False, only=[], gpu=False)
WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
DOCUMENT = json.dumps({"command": "python x.py", "rows": [{"a": 1}]})


def task(folder: Path, name: str = "timed", **facts: Any) -> Any:
    measurement = sources.Measurement(name, name, (), gpu=False, **facts)
    return runner.Task(measurement, folder / f"{name}.json", "not measured", 1.0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of nothing, where every file that was written is fresh."""
    monkeypatch.setattr(runner.fingerprint, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "WORK", tmp_path / "build")
    monkeypatch.setattr(runner, "judge", lambda path: stale.Verdict(path.name))
    return tmp_path


def run_with(monkeypatch: pytest.MonkeyPatch, code: str, *words: str) -> None:
    def command(task: Any, options: Namespace, output: Path) -> list[str]:
        left = task.parts.options_left((), task.kept) if task.parts else []
        return [sys.executable, "-c", code, str(output), *words, *left]

    monkeypatch.setattr(runner, "command_of", command)


def test_a_benchmark_that_ends_well_replaces_its_file_and_is_packed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(monkeypatch, WRITES, DOCUMENT)
    (place / "timed.json").write_text("older")
    options = Namespace(**{**vars(OPTIONS), "pack": place / "made.tar"})
    assert runner.run_all([task(place)], options, time.monotonic() + 600) == []
    assert (place / "timed.json").read_text() == DOCUMENT
    with tarfile.open(options.pack) as file:
        assert file.getnames() == ["timed.json"]


@pytest.mark.parametrize(
    ("code", "why"), [("raise SystemExit(3)", "ended with 3"), ("pass", "wrote no file")]
)
def test_one_that_fails_leaves_the_file_there_is(
    place: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    run_with(monkeypatch, code)
    (place / "timed.json").write_text("older")
    ((_, told),) = runner.run_all([task(place)], OPTIONS, time.monotonic() + 600)
    assert told.startswith(why)
    assert (place / "timed.json").read_text() == "older"


def test_one_that_takes_too_long_is_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, "import time; time.sleep(60)")
    assert runner.run(task(place), OPTIONS, 0.2) == "stopped after 0 s"


STEADY = """
import json, pathlib, sys, time
out, *names = sys.argv[1], *sys.argv[3:]
rows = []
for name in names:
    for number in range(2):
        rows.append({"model": name, "number": number})
        document = {"command": "python benchmarks/x.py --models " + name, "date": "today"}
        document |= {"gpu": "G", "versions": {}, "seconds": 5, "rows": rows}
        pathlib.Path(out).write_text(json.dumps(document))
        if name == "slow":
            time.sleep(60)
"""


def test_what_is_whole_of_one_that_ends_early_is_kept_and_the_rest_is_measured_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECONDS_TO_END", 0.2)
    monkeypatch.setattr(runner, "is_of_this_run", lambda path, head: True)
    names = ["a", "slow", "b"]
    whole = parts.Parts("--models", "model", dict.fromkeys(names, 2))
    first = replace(task(place), parts=whole)
    first = replace(first, measurement=replace(first.measurement, arguments=("--models", *names)))
    run_with(monkeypatch, STEADY)
    assert runner.run(first, OPTIONS, 2.0) == "stopped after 2 s"
    document = json.loads(first.path.read_text())
    assert [row["model"] for row in document["rows"]] == ["a", "a"]
    assert document["cut_short"]
    rest = replace(first, kept=whole.whole(document["rows"]))
    run_with(monkeypatch, STEADY.replace("slow", "never"))
    assert runner.run(rest, OPTIONS, 60.0) == ""
    document = json.loads(first.path.read_text())
    assert [row["model"] for row in document["rows"]] == ["a", "a", "slow", "slow", "b", "b"]
    assert document["command"] == "python benchmarks/x.py --models a slow b"
    assert document["seconds"] == 10
    assert "cut_short" not in document


def test_parts_of_another_machine_are_measured_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "is_of_this_run", lambda path, head: False)
    whole = parts.Parts("--models", "model", {"a": 2, "b": 2})
    rows = [{"model": "a", "number": number} for number in (8, 9)]
    run_with(monkeypatch, STEADY)
    assert runner.run(replace(task(place), parts=whole, kept=rows), OPTIONS, 60.0) == ""
    document = json.loads((place / "timed.json").read_text())
    assert [row["number"] for row in document["rows"]] == [0, 1, 0, 1]


def test_the_rest_of_a_run_is_told_with_its_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "judge", lambda path: stale.Verdict(path.name, runner.CUT_SHORT))
    arguments = ("--models", "a", "b", "c", "--batches", "1", "--tokens", "1", "4", "--quick")
    measurement = sources.Measurement("shapes", "forward", (), arguments)
    rows = [{"model": name} for name in ("a", "a", "b")]
    (place / "shapes-h200.json").write_text(json.dumps({"seconds": 60, "rows": rows}))
    found = runner.task_of(measurement, "h200", place)
    assert found.kept == rows[:2]
    assert found.minutes == pytest.approx(2.0)
    assert found.parts.options_left(arguments, found.kept) == [
        "--batches", "1", "--tokens", "1", "4", "--quick", "--models", "b", "c",
    ]  # fmt: skip


def test_a_profile_has_a_row_for_every_batch_size_that_speculates() -> None:
    live = json.loads((runner.RESULTS / "live-h200.json").read_text())
    found = parts.rows_of_profiles("h200")
    for row in live["rows"]:
        assert row["profile"] in found
    assert sum(found.values()) >= len(live["rows"])


def test_what_does_not_fit_or_lacks_its_peers_is_told(place: Path) -> None:
    tasks = [task(place, "long"), task(place, "beside", peers=(("--peers", "."),))]
    left = runner.run_all(tasks, OPTIONS, time.monotonic() + 30)
    assert [why for _, why in left] == ["no time left", runner.NO_PEERS]


def test_a_fresh_file_is_not_run_again_and_tells_how_long_it_took(place: Path) -> None:
    measurement = sources.Measurement("timed", "timed", (), minutes=7.0)
    assert runner.task_of(measurement, "h200", place).reason == "not measured"
    (place / "timed-h200.json").write_text(json.dumps({"seconds": 90}))
    found = runner.task_of(measurement, "h200", place)
    assert (found.reason, found.minutes) == ("", 1.5)


def test_commands_name_the_peers_files(place: Path) -> None:
    (place / "sglang").mkdir()
    (place / "sglang" / "mamba_ssm.py").touch()
    (place / "benchmarks").mkdir()
    (place / "benchmarks" / "kernels.py").write_text("--skip-gate")
    options = Namespace(**{**vars(OPTIONS), "peers": place, "skip_gate": True})
    peers = (("--sglang", "**/mamba_ssm.py"), ("--wheels", "."), ("--absent", "fla"))
    measurement = sources.Measurement("kernels", "kernels", (), ("--quick",), peers=peers)
    asked = runner.Task(measurement, place / "kernels-h200.json", "not measured", 1.0)
    words = runner.command_of(asked, options, Path("kernels-h200.json"))
    expected = ["--quick", "--output", "kernels-h200.json"]
    expected += ["--sglang", str(place / "sglang" / "mamba_ssm.py"), "--wheels", str(place)]
    assert words[2:] == [*expected, "--skip-gate"]


def test_both_halves_are_the_whole_set_in_its_order() -> None:
    halves = [runner.chosen(Namespace(gpu=gpu, only=[])) for gpu in (True, False)]
    names = [each.name for half in halves for each in half]
    assert sorted(names) == sorted(each.name for each in sources.MEASUREMENTS)
    assert names[:3] == ["tables", "live", "kernels"]
    only = runner.chosen(Namespace(gpu=True, only=["live"]))
    assert [each.name for each in only] == ["live"]


def test_rows_with_their_tree_keep_what_was_measured() -> None:
    small, large = Tree.chain(1), Tree.chain(3)
    rows = [
        Measured(batch_size=size, mode=mode, tokens_per_step=2, step_ms=0.2, tokens_per_s=1e4)
        for size in (1, 8)
        for mode in ("off", "best chain (2)", "tuned chain")
    ]
    block = MeasuredBlock(gpu="NVIDIA H200", date="2026-01-01", versions={}, rows=tuple(rows))
    before = make_profile(policy_row(1, small), policy_row(8, small))
    before = before.model_copy(update={"measured": block})
    kept = shipped.with_kept(make_profile(policy_row(1, small), policy_row(8, large)), before)
    assert kept.measured.rows == tuple(rows[:3])
    other = make_profile(policy_row(1, large), policy_row(8, large))
    assert shipped.with_kept(other, before) == other


def test_tables_and_profiles_are_made_by_commands_of_their_own() -> None:
    tables = dict(shipped.table_commands("h200", shipped.torch.device("cuda")))
    shipping = (shipped.PROFILES / "runtime").glob("h200--*.yaml")
    assert {path.name for path in tables} >= {path.name for path in shipping}
    path = next((shipped.PROFILES / "tuned").glob("h200--*--mtp--demo.yaml"))
    words = shipped.profile_command(path)
    assert words[words.index("-o") + 1] == path.relative_to(shipped.PROFILES.parent).as_posix()
    assert words.count("--force") == 1


def test_works_that_have_not_begun_when_a_run_is_interrupted_never_do() -> None:
    begun, go_on = [], threading.Event()

    def work(number: int, environment: dict[str, str]) -> str:
        begun.append(number)
        if number:
            go_on.wait(60)
        return environment["CUDA_VISIBLE_DEVICES"]

    running = gpus.side_by_side([partial(work, number) for number in range(5)], ["3"])
    assert next(running).result() == "3"
    # What runs ends; the release comes once the others had to be given up.
    threading.Timer(0.3, go_on.set).start()
    running.close()
    assert begun in ([0], [0, 1])


def test_texts_of_a_wave_are_about_as_long() -> None:
    live = script("live")
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    trace = SimpleNamespace(offsets=[0, *accumulate(lengths)])
    found = live.in_waves(trace, [*range(8), 0], 2)
    assert [lengths[index] for index in found] == [1, 2, 6, 7, 9, 3, 4, 8, 9]
