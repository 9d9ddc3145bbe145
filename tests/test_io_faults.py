"""Disks that are full, read-only or lost while a verb writes; outputs that cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faulty_disk import PROFILE_FILE, TOY, contents, is_right, prepare, survey, verbs
from synthetic_profile import TRACE

from stree_autotune.cli.commands import main

NAMES = [
    "tune",
    "tune --storage",
    "probe",
    "trace",
    "certify",
    "analyze --plot",
    "validate -o",
    "validate --write",
    "report",
    "export -o",
    "push",
    "pull",
    "list --library",
]
SAMPLED = 3


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("disk") / "here")


def test_every_verb_that_writes_is_here(pristine: Path) -> None:
    assert [verb.name for verb in verbs(pristine)] == NAMES


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_failing_write_is_one_sentence_and_leaves_nothing_half_written(
    pristine: Path, number: int
) -> None:
    found = survey(verbs(pristine)[number], pristine, most=SAMPLED)
    wrong = [(fault, n, outcome) for fault, n, outcome in found if not is_right(fault, outcome)]
    assert not wrong


@pytest.fixture
def here(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data whose long work must not begin."""
    prepare(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "here" / "file" / "home")
    for name in (
        "search.tuning.tune",
        "probe.report.open_pair",
        "cli.trace.open_pair",
        "search.certificate.certify",
        "report.analyze.ask",
        "live.validation.open_profile_pair",
        "report.page.make_section",
        "export.deployment.Deployment.changes",
        "share.remote._push",
        "share.remote._select",
        "cli.listing.load_profile",
    ):
        monkeypatch.setattr(f"stree_autotune.{name}", _must_not_begin)
    return tmp_path / "here"


def _must_not_begin(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


ASKED = ("--gpu", "h200", "--dataset", "gsm8k", *TOY)


@pytest.mark.parametrize(
    "arguments",
    [
        (*ASKED, "-o", "file/x.yaml"),
        (*ASKED, "-o", "library"),
        ("probe", *TOY, "--data", "file/x"),
        ("trace", "--dataset", "d", "--prompts", "prompts.jsonl", *TOY, "--data", "file/x"),
        ("analyze", *ASKED, "--plot", "library/x.svg/y.svg"),
        ("validate", "-p", PROFILE_FILE, "-o", "file/x"),
        ("report", PROFILE_FILE, "-o", "file/x.html"),
        ("report", PROFILE_FILE, "-o", "library"),
        ("export", PROFILE_FILE, "--to", "vllm", "-o", "file/x"),
        ("push", "file/shelf", PROFILE_FILE),
        ("pull", "library", "--data", "file/x"),
        ("list", "--library", "library"),
        ("show", "--library", "library"),
    ],
    ids=" ".join,
)
def test_an_unwritable_output_is_said_before_the_work(
    here: Path,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(here)
    monkeypatch.setattr(sys, "argv", ["stree-tune", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert contents(here) == before


def test_a_certificate_in_a_read_only_place_is_said_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = Path("stree-data") / TRACE
    trace.with_suffix(".certificate.yaml").mkdir()
    monkeypatch.setattr(sys, "argv", ["stree-tune", "certify", str(trace)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "it is a folder; name a file in it" in capsys.readouterr().err


def test_a_full_stdout_is_one_sentence_and_a_closed_one_is_silent() -> None:
    command = [sys.executable, "-c", "from stree_autotune.cli.commands import main; main()", "list"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert "No space left" in run.stderr
    closed = ["sh", "-c", '"$@" | true', "sh", *command]
    run = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False)
    assert run.stderr == ""
