"""Which results files are of this code: hashes of sources, revisions, what docs say of both."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from scripts import FOLDER, script

fingerprint = script("fingerprint")
sources = script("sources")
stale = script("stale")
report = script("report")

CODE = '''
"""What it does."""

WIDTH: int = 4  # columns


def twice(value: float) -> float:
    """Return twice the value."""
    return 2.0 * value
'''
TESTS = Path(__file__).parent
NEUTRAL = {
    "report", "gate", "gpus", "fingerprint", "sources", "prediction_table", "prediction_figure"
}  # fmt: skip
"""Modules of benchmarks that print and write, and change no number."""

NEUTRAL_MODULES = (
    # what finds, opens, reads and names things, and types
    "autotune/stree_autotune/store/*", "autotune/stree_autotune/trace/file.py",
    "autotune/stree_autotune/search/request.py", "autotune/stree_autotune/live/rows.py",
    "stree_core/errors.py", "stree_core/profile.py", "stree_core/tree.py",
    "stree_core/drafting/pair.py", "stree_core/drafting/checkpoint.py",
    "stree_core/models/source.py", "stree_core/models/backend.py",
    "stree_core/families/registry.py", "stree_core/engine/request.py", "stree_core/engine/stop.py",
    # a tree that several take from it
    "autotune/stree_autotune/live/validation.py",
    # inputs of single layers are made beside them
    "stree_core/families/model_shape.py", "stree_core/models/row_block.py",
)  # fmt: skip
PACKAGES = {
    "stree_kernels": "kernels/stree_kernels",
    "stree_core": "stree_core",
    "stree_autotune": "autotune/stree_autotune",
}


def hash_of(code: str) -> str:
    digest: str = fingerprint.hash_of("m.py", code.encode())
    return digest


def test_comments_docstrings_and_line_breaks_are_no_change_of_a_source() -> None:
    said = CODE.replace("  # columns", "").replace("What it does.", "Other words.")
    said = said.replace("    return 2.0 * value", '    "a text"\n    return (\n 2.0\n * value)')
    assert said != CODE
    assert hash_of(said) == hash_of(CODE)


@pytest.mark.parametrize(("before", "after"), [("2.0", "2"), ("= 4", "= 5"), ("twice", "once")])
def test_whatever_else_is_said_is_a_change(before: str, after: str) -> None:
    assert hash_of(CODE.replace(before, after)) != hash_of(CODE)


def test_a_hash_is_the_same_under_every_version_of_python() -> None:
    code = "def f(a, /, *b: int) -> str:\n    return f'{a!r:>{b}}' 'c' if a else b''\n"
    assert hash_of(code) == "4dfc6177fef6"


def test_files_that_are_not_python_count_by_their_bytes() -> None:
    assert fingerprint.hash_of("a.yaml", b"a: 1") != fingerprint.hash_of("a.yaml", b"a: 1 # one")


def test_who_made_a_table_and_when_is_no_change_of_it() -> None:
    def profile(step_ms: int, date: int) -> bytes:
        block = f"measured:\n  date: {date}\n  rows:\n  - {{a: {date}}}\n"
        return f"step_ms: {step_ms}\n{block}provenance: {{date: {date}}}\n".encode()

    same, other = profile(1, 2), profile(2, 1)
    assert fingerprint.hash_of("a.yaml", profile(1, 1)) == fingerprint.hash_of("a.yaml", same)
    assert fingerprint.hash_of("a.yaml", profile(1, 1)) != fingerprint.hash_of("a.yaml", other)


def test_a_glob_of_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        fingerprint.hashes(["*.py"], tmp_path)


@pytest.mark.parametrize("measurement", sources.MEASUREMENTS, ids=lambda each: each.name)
def test_sources_hold_what_the_benchmark_imports(measurement: Any) -> None:
    known = {Path(path).stem for path in measurement.hashes() if path.startswith("benchmarks/")}
    assert measurement.script in known
    for name in known:
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        imported: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported |= {each.name for each in node.names}
        beside = {module for module in imported if (FOLDER / f"{module}.py").exists()}
        assert beside <= known | NEUTRAL, name
        of_tests = {module for module in imported - beside if (TESTS / f"{module}.py").exists()}
        if of_tests and measurement.name != "fuzz":
            # a script run by itself has only its own folder on the path
            assert "sys.path." in (FOLDER / f"{name}.py").read_text()
            assert {f"tests/{module}.py" for module in of_tests} <= set(measurement.hashes())


@pytest.mark.parametrize(
    # mutated files go through every loader, and change what none of them does
    "measurement",
    [each for each in sources.MEASUREMENTS if each.name != "fuzz"],
    ids=lambda each: each.name,
)
def test_sources_hold_the_modules_that_a_benchmark_names(measurement: Any) -> None:
    known = measurement.hashes()
    for path in (path for path in known if path.startswith("benchmarks/")):
        for module in modules_named_in(FOLDER.parent / path):
            is_neutral = any(fnmatch(module, glob) for glob in NEUTRAL_MODULES)
            if not is_neutral and not module.endswith("_ref.py"):
                assert module in known, f"{path} names {module}"


def modules_named_in(script: Path) -> Iterator[str]:
    """The modules of the packages that a script imports from, by their paths."""
    for node in ast.parse(script.read_text()).body:
        package, *parts = (getattr(node, "module", None) or "").split(".")
        if package in PACKAGES and isinstance(node, ast.ImportFrom):
            place = "/".join([PACKAGES[package], *parts])
            named = [f"{place}.py", *(f"{place}/{each.name}.py" for each in node.names)]
            yield from (module for module in named if (FOLDER.parent / module).exists())


def test_every_script_that_saves_a_file_is_in_the_set() -> None:
    saving = {path.stem for path in FOLDER.glob("*.py") if "default=RESULTS /" in path.read_text()}
    assert saving <= {measurement.script for measurement in sources.MEASUREMENTS}


def test_a_file_is_of_the_measurement_of_its_name() -> None:
    names = {file: sources.measurement_of(file) for file in ("lossless-h200.json", "server.json")}
    assert [measurement.name for measurement in names.values()] == ["lossless", "server"]
    assert sources.measurement_of("lossless-cpu.json").name == "lossless-cpu"
    assert sources.measurement_of("forward-130m-h200.json") is None


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one measurement, `timed`, of one source, and its results file's folder."""
    folder = tmp_path / "checkout"
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "timed.py").write_text(CODE)
    (folder / ".gitattributes").write_text(f"{fingerprint.EXPORTED} export-subst\n")
    (folder / fingerprint.EXPORTED).write_text("$Format:%H$\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    timed = sources.Measurement("timed", "timed", ("benchmarks/timed.py",), ("--rounds", "2"))
    monkeypatch.setattr(stale, "measurement_of", {"timed-h200.json": timed}.get)
    return folder


def save(folder: Path, **facts: object) -> Path:
    path = folder / "timed-h200.json"
    hashes = fingerprint.hashes(["benchmarks/timed.py"], folder)
    document = {
        "command": "python benchmarks/timed.py --rounds 2 --skip-gate",
        "revision": "unknown",
        "source_hashes": hashes,
        "rows": [{}],
        **facts,
    }
    path.write_text(json.dumps({key: value for key, value in document.items() if value}))
    return path


def test_a_file_is_stale_once_a_source_says_something_else(checkout: Path) -> None:
    path, source = save(checkout), checkout / "benchmarks" / "timed.py"
    source.write_text(CODE.replace("What it does.", "Other words."))
    assert not stale.judge(path, checkout).is_stale
    source.write_text(CODE.replace("= 4", "= 8"))
    assert stale.judge(path, checkout).reason == "benchmarks/timed.py"


def test_a_file_is_stale_once_what_it_wrote_is_rewritten(checkout: Path) -> None:
    table = checkout / "table.yaml"
    table.write_text("points: [1]\nmeasured:\n  date: today\n")
    value = fingerprint.hash_of("table.yaml", table.read_bytes())
    path = save(checkout, rows=[{"file": "table.yaml", "hash": value}])
    table.write_text("points: [1]\nmeasured:\n  date: tomorrow\n")
    assert not stale.judge(path, checkout).is_stale
    table.write_text("points: [2]\n")
    assert stale.judge(path, checkout).reason == "table.yaml"
    table.unlink()
    assert stale.judge(path, checkout).reason == "table.yaml"


def test_a_file_of_other_options_is_not_the_measurement(checkout: Path) -> None:
    path = save(checkout, command="python benchmarks/timed.py --rounds 1")
    assert stale.judge(path, checkout).reason == stale.OTHER_OPTIONS


def test_what_is_left_of_a_run_that_was_cut_short_is_not_the_measurement(checkout: Path) -> None:
    path = save(checkout, cut_short=True)
    assert stale.judge(path, checkout).reason == stale.CUT_SHORT
    assert not stale.judge(save(checkout), checkout).is_stale


def test_a_file_without_hashes_is_judged_by_a_clean_commit_only(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    path = save(checkout, source_hashes=None, git_sha=head)
    assert not stale.judge(path, checkout).is_stale
    (checkout / "benchmarks" / "timed.py").write_text(CODE.replace("= 4", "= 8"))
    assert stale.judge(path, checkout).reason == "benchmarks/timed.py"
    for unclear in (f"{head}-dirty", "unknown", "f" * 40):
        save(checkout, source_hashes=None, git_sha=unclear)
        assert stale.judge(path, checkout).reason == stale.NO_FINGERPRINT


def test_a_file_of_no_measurement_is_named(checkout: Path) -> None:
    path = checkout / "old.json"
    path.write_text("{}")
    assert stale.judge(path, checkout).reason == stale.OF_NO_MEASUREMENT


def test_the_commit_of_a_file_is_found_by_its_sources(checkout: Path) -> None:
    first, source = git(checkout, "rev-parse", "HEAD"), checkout / "benchmarks" / "timed.py"
    path = save(checkout)
    source.write_text(CODE.replace("= 4", "= 8"))
    git(checkout, "commit", "-qam", "second")
    assert stale.lacks_commit(path, checkout)
    stale.write_revision(path, checkout)
    assert json.loads(path.read_text())["revision"] == first
    assert not stale.lacks_commit(path, checkout)
    source.write_text(CODE.replace("= 4", "= 16"))
    path = save(checkout)
    stale.write_revision(path, checkout)
    assert json.loads(path.read_text())["revision"] == "unknown"
    assert stale.lacks_commit(path, checkout)


def test_an_exported_tree_knows_its_commit(checkout: Path, tmp_path: Path) -> None:
    exported, hashes = tmp_path / "exported", fingerprint.hashes(["benchmarks/*.py"], checkout)
    exported.mkdir()
    head = git(checkout, "rev-parse", "HEAD")
    git(checkout, "archive", "-o", str(tmp_path / "a.tar"), "HEAD")
    subprocess.run(["tar", "-xf", str(tmp_path / "a.tar"), "-C", str(exported)], check=True)
    assert fingerprint.head_with(hashes, exported) == head
    assert fingerprint.head_with(hashes, checkout) == head
    (checkout / "benchmarks" / "timed.py").write_text(CODE.replace("= 4", "= 8"))
    changed = fingerprint.hashes(["benchmarks/*.py"], checkout)
    assert fingerprint.head_with(changed, checkout) is None


def test_rows_are_kept_of_the_same_code_and_machine_only(tmp_path: Path) -> None:
    path, head = tmp_path / "server.json", report.header()
    assert not report.is_of_this_run(path, head)
    report.save(path, head, [{"seed": 1}])
    assert report.is_of_this_run(path, head)
    assert not report.is_of_this_run(path, head | {"gpu": "another"})
    document = report.read(path)
    assert list(document)[-2:] == ["rows", "source_hashes"]
    path.write_text(json.dumps(document | {"fingerprint": "other"}))
    assert not report.is_of_this_run(path, head)
