"""The verbs export, push, pull and list, and `--library`, as they are typed."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import export_rules as rules
import pytest
import torch
from synthetic_profile import NAME, PAIR, ROWS, TABLE, TRACE, write_profile

from stree_autotune.cli.commands import main
from stree_autotune.cli.listing import describe_age
from stree_autotune.store.library import shipped_root
from stree_core.profile import GpuRef, load_profile, save_profile
from stree_core.tree import Tree

PROFILE = f"stree-data/tuned/{NAME}.yaml"
TOY = ("--target", PAIR[0], "--draft", PAIR[1])


class Outcome(NamedTuple):
    code: object
    out: str
    err: str


Terminal = Callable[..., Outcome]


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    """A command line in a folder with a profile and its sources in ./stree-data."""
    folder = tmp_path / "here"
    write_profile(folder / "stree-data")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["stree-tune", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return Outcome(left.value.code, *capsys.readouterr())

    return call


def test_export_to_stdout_and_to_a_file(terminal: Terminal) -> None:
    outcome = terminal("export", PROFILE, "--to", "vllm", "--draft", "org/draft")
    assert outcome.code == 0
    config = json.loads(outcome.out)
    rules.check_vllm(config)
    assert config["model"] == "org/draft"
    assert "note: vLLM drafts chains" in outcome.err
    assert "name of the draft" not in outcome.err
    assert max(map(len, outcome.err.splitlines())) <= 80
    named = terminal("export", NAME, "--to", "vllm", "-o", "v.json")
    assert named.out == ""
    assert json.loads(Path("v.json").read_text()) == {**config, "model": "toy-draft"}
    said = " ".join(named.err.split())
    assert "toy-draft is the profile's name of the draft; pass --draft" in said
    again = terminal("export", NAME, "--to", "vllm", "-o", "v.json")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "v.json exists already; pass --force" in again.err
    assert terminal("export", NAME, "--to", "vllm", "-o", "v.json", "--force").code == 0


def test_export_of_one_batch_size(terminal: Terminal) -> None:
    config = json.loads(terminal("export", NAME, "--to", "vllm", "--batch-size", "3").out)
    assert config["num_speculative_tokens"] == ROWS[4].num_nodes
    outcome = terminal("export", NAME, "--to", "vllm", "--batch-size", "16")
    assert outcome.code == 1
    assert outcome.err.startswith("error: at batch size 16 decoding without speculation is")
    assert "--batch-size 4\n" in outcome.err, "the tree of 1 may give way to off"


def test_export_of_a_binary_format(terminal: Terminal) -> None:
    assert (
        "sequoia is a binary format; name a file" in terminal("export", NAME, "--to", "sequoia").err
    )
    assert terminal("export", NAME, "--to", "sequoia", "-o", "growmap.pt").code == 0
    rules.check_growmap(torch.load("growmap.pt", weights_only=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", NAME, "--to", "vlm"), "--to names a format, got vlm; did you mean vllm"),
        (("export", "absent", "--to", "vllm"), "no profile absent is there"),
        (("export", NAME), "--to"),
        (("push",), "URL"),
        (("push", "lib", "absent"), "no profile absent is there"),
        (("pull", "lib"), "a library has an index.json, lib has none; make one with"),
        (("list", "--library", "nosuch://x"), "must be a path or a URL that fsspec knows"),
        (("validate", "-p", NAME, "--write"), "--write changes a profile's file, got the name"),
        (("decode", "-p", "absent", "--prompt", "x"), "no profile absent is there"),
    ],
)
def test_bad_input_is_one_line_and_code_two(
    terminal: Terminal, arguments: tuple[str, ...], message: str
) -> None:
    outcome = terminal(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_from_one_machine_to_another(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push here; over there show, tune and export from the library, then pull it."""
    shelf = Path("..", "shelf").resolve()
    pushed = terminal("push", str(shelf), PROFILE, "--json")
    assert pushed.code == 0
    assert json.loads(pushed.out.splitlines()[-1])["pushed"] == [
        f"tuned/{NAME}.yaml",
        TABLE,
        TRACE,
    ]
    assert terminal("push", str(shelf)).out == "0 of 3 files were new\n"
    expected = terminal("export", NAME, "--to", "sglang").out

    there = Path("..", "there").resolve()
    there.mkdir()
    monkeypatch.chdir(there)
    library = ("--library", shelf.as_uri())
    assert "gain over off" in terminal("show", NAME, *library).out
    assert terminal("export", NAME, "--to", "sglang", *library).out == expected
    tune = ("--gpu", "h200", "--dataset", "gsm8k", "--batch-size", "1", "--max-nodes", "8")
    assert terminal(*tune, *TOY, *library).code == 0
    tuned, shared = (
        load_profile(path).sources
        for path in (there / "stree-profile.yaml", shelf / "tuned" / f"{NAME}.yaml")
    )
    assert tuned.runtime.sha256 == shared.runtime.sha256
    assert tuned.trace.sha256 == shared.trace.sha256
    assert terminal("pull", str(shelf), NAME).out.splitlines()[0] == PROFILE
    assert terminal("export", PROFILE, "--to", "sglang").out == expected


def test_list_shows_local_library_and_shipped(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal("push", "../shelf", NAME)
    outcome = terminal("list", "--library", "../shelf", "--json")
    assert outcome.code == 0
    rows = json.loads(outcome.out.splitlines()[-1])
    places = {(row["kind"], row["where"]) for row in rows}
    assert places == {
        (kind, where)
        for kind in ("profile", "table", "trace")
        for where in ("local", "library", "shipped")
    }
    estimated = {Path(row["path"]).stem for row in rows if row["status"] == "estimated"}
    assert "h100--demo-target--demo-draft--gsm8k" in estimated
    assert NAME not in estimated
    lines = outcome.out.splitlines()
    # names say the rest
    assert lines[0].split() == ["kind", "status", "age", "name"]
    # a name is whole, so that of one pair is longer than the others'
    assert max(len(line) for line in lines[:-1] if "fp8-block" not in line) <= 82
    monkeypatch.setenv("COLUMNS", "200")
    wide = terminal("list").out.splitlines()[0]
    assert wide.split() == [
        *("kind", "where", "gpu", "pair", "dataset", "sampling", "status", "age", "name")
    ]
    assert len(lines) == len(rows) + 2
    first = next(row for row in rows if row["where"] == "library")
    assert first["gpu"] == "h200"
    assert (first["target"], first["draft"]) == PAIR
    assert (first["dataset"], first["sampling"]) == ("gsm8k", "greedy")


def test_list_shows_the_shapes_of_models(terminal: Terminal) -> None:
    outcome = terminal("list", "--shapes", "--json")
    assert outcome.code == 0
    rows = {row["name"]: row for row in json.loads(outcome.out.splitlines()[-1])}
    served = rows["nemotron-3-super-120b-a12b"]
    assert (served["billions"], served["mtp"]) == (120.669, True)
    assert served["layers"] == "40 Mamba2, 40 experts, 40 MLP, 8 attention"
    assert all(row["source"].startswith("https://") for row in rows.values())
    assert not rows["codestral-mamba-7b"]["mtp"]


def test_list_leaves_out_what_it_cannot_read(
    terminal: Terminal, caplog: pytest.LogCaptureFixture
) -> None:
    Path("stree-data/tuned/odd.yaml").write_text("kind: diary\n")
    outcome = terminal("list")
    assert outcome.code == 0
    assert "odd" not in outcome.out
    assert "left out: stree-data/tuned/odd.yaml: " in caplog.text


def test_ages() -> None:
    now = datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)
    assert describe_age("2026-03-10T09:00:00+00:00", now) == "3 h"
    assert describe_age("2026-03-01T12:00:00", now) == "9 d"
    assert describe_age("2026-03-11T12:00:00+00:00", now) == "0 h"
    assert describe_age("some day", now) == ""


def test_decode_with_a_profile_of_a_library(terminal: Terminal) -> None:
    """The profile has a GPU's name that nothing shipped has, so it can come from there alone."""
    shipped = shipped_root() / "tuned" / "h200--demo-target--demo-draft--demo.yaml"
    profile = load_profile(shipped)
    own = profile.model_copy(update={"gpu": GpuRef(name="mine", status="measured")})
    save_profile(own, Path("own.yaml"))
    assert terminal("push", "../shelf", "own.yaml").code == 0
    shutil.rmtree("stree-data")
    outcome = terminal(
        "decode", "-p", "mine--demo-target--demo-draft--demo", "--library", "../shelf",
        "--prompt", "Tom has 3 apples.", "--max-new-tokens", "12", "--device", "cpu", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out.splitlines()[-1])
    assert summary["tokens"] <= 12
    longest = own.policy[0].tree.build()
    assert longest == Tree.chain(longest.num_nodes)
    assert max(summary["accept_lengths"]) <= longest.num_nodes
