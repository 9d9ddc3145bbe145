"""Every command that a message proposes is one that the command line takes, in its user's words."""

from __future__ import annotations

import ast
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from synthetic_data import make_table, make_trace, write_library
from synthetic_profile import NAME, write_profile

import stree_autotune
import stree_core
from stree_autotune.cli.commands import app, main
from stree_autotune.cost.estimate import estimate_table
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.search.certificate import certify_file, load_certificate
from stree_autotune.share.remote import sync
from stree_autotune.store.advice import PairWords, command, probe_command, trace_command
from stree_autotune.store.gpu_spec import load_gpu_spec
from stree_autotune.store.library import shipped_root
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table, save_runtime_table
from stree_autotune.store.step_rule import StepRule
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.models.source import folder_source
from stree_core.profile import Sampling, load_profile
from stree_core.tree import Tree

HUB = ("--target", "some-org/large-target", "--draft", "some-org/toy-draft")
ASKED = ("--gpu", "h200", "--dataset", "gsm8k", *HUB, "--data", "my data")
WORDS = PairWords("some-org/large-target", "some-org/toy-draft", (Path("my data"),))


def parsed(text: str) -> dict[str, Any]:
    """Return the verb and the parameters of the one command in backticks that a message holds."""
    (found,) = re.findall(r"`(stree-tune[^`]*)`", text)
    name, *words = shlex.split(found)
    assert name == "stree-tune"
    group: Any = typer.main.get_command(app)
    verb = words[0] if words[0] in group.commands else ""
    call = group.commands[verb] if verb else group
    context = call.make_context(verb or name, words[1:] if verb else words)
    assert verb or context.invoked_subcommand is None
    return {"verb": verb, **context.params}


class Caller:
    """Calls the command line; returns what it wrote to stderr and to the log."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        capture: pytest.CaptureFixture[str],
        log: pytest.LogCaptureFixture,
    ) -> None:
        self._patch, self._capture, self._log = patch, capture, log

    def __call__(self, *arguments: str, code: int = 2) -> str:
        self._patch.setattr(sys, "argv", ["stree-tune", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self._capture.readouterr()
        assert left.value.code == code, err
        return f"{self._log.text}{err}" if code else f"{self._log.text}{out}"


@pytest.fixture
def call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Caller:
    """A command line in a folder with a table and a trace of a pair that was named by hub ids."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    table = make_table(target="large-target", draft="toy-draft")
    write_library(tmp_path / "my data", table, make_trace("large-target", "toy-draft"))
    return Caller(monkeypatch, capsys, caplog)


def edit_table(path: Path, **changes: object) -> RuntimeTable:
    table = load_runtime_table(path).model_copy(update=changes)
    save_runtime_table(table, path)
    return table


TABLE = Path("my data/runtime/h200--large-target--toy-draft.yaml")
TRACE = Path("my data/traces/large-target--toy-draft--gsm8k--greedy.safetensors")


def words_of(found: dict[str, Any]) -> tuple[object, ...]:
    return found["target"], found["draft"], tuple(found["data"])


@pytest.mark.parametrize(
    ("changed", "verb", "expected"),
    [
        (("--gpu", "h20"), "probe", {"gpu": "h20", "context": 1024, "max_nodes": 64}),
        (("--gpu", "cpu", "--max-nodes", "9"), "probe", {"max_nodes": 9, "device": "cpu"}),
        (("--gpu", "cpu", "--batch-size", "3"), "probe", {"gpu": "cpu", "batch_size": [3]}),
        (("--batch-size", "99"), "probe", {"gpu": "h200", "batch_size": [99]}),
        (("--max-nodes", "200"), "probe", {"max_nodes": 200, "batch_size": [1]}),
        (("--dataset", "mine"), "trace", {"dataset": "mine", "prompts": "FILE"}),
        (("--dataset", "human_eval"), "trace", {"dataset": "human_eval", "prompts": ""}),
        (
            ("--temperature", "0.7", "--top-p", "0.9"),
            "trace",
            {"temperature": 0.7, "top_p": 0.9, "rule": "mss"},
        ),
        (
            ("--acceptance-from", TRACE.stem, "--rule", "naive", "--temperature", "1"),
            "trace",
            {"rule": "naive", "temperature": 1.0, "dataset": "gsm8k"},
        ),
    ],
)
def test_what_is_missing_is_recorded_by_the_proposed_command(
    call: Caller, changed: tuple[str, ...], verb: str, expected: dict[str, object]
) -> None:
    found = parsed(call(*ASKED, *changed))
    assert found["verb"] == verb
    assert words_of(found) == WORDS
    assert {key: found[key] for key in expected} == expected


def test_a_stale_or_damaged_file_is_recorded_again_by_force(call: Caller) -> None:
    whole = TRACE.read_bytes()
    TRACE.write_bytes(whole[:-9])
    found = parsed(call(*ASKED))
    assert (found["verb"], found["force"], words_of(found)) == ("trace", True, WORDS)
    TRACE.write_bytes(whole)
    kept = load_runtime_table(TABLE).points
    edit_table(TABLE, points=tuple(p for p in kept if p.term != "draft_root"))
    found = parsed(call(*ASKED))
    assert (found["verb"], words_of(found)) == ("probe", WORDS)
    write_library(Path("my data"), make_table(target="large-target", draft="toy-draft",
                                              kv_bytes_per_token=512))  # fmt: skip
    found = parsed(call(*ASKED, "--context", "4096"))
    assert (found["context"], found["force"]) == (4096, True)
    folder = Path("my data/models/large-target")
    folder.mkdir(parents=True)
    shutil.copy(shipped_root() / "models" / "demo-target" / "config.json", folder)
    named = ("--target", "large-target")
    found = parsed(call(*ASKED, *named))
    assert (found["verb"], found["force"]) == ("probe", True)
    assert found["target"] == "large-target"


def test_a_trace_of_another_model_is_recorded_again(call: Caller) -> None:
    folder = Path("my data/models/large-target")
    folder.mkdir(parents=True)
    shutil.copy(shipped_root() / "models" / "demo-target" / "config.json", folder)
    table = load_runtime_table(TABLE)
    ref = folder_source(folder, "large-target").ref
    timed = table.target.model_copy(
        update={"config_sha256": ref.config_sha256, "shape_sha256": ref.shape_sha256}
    )
    edit_table(TABLE, target=timed)
    found = parsed(call(*ASKED, "--target", "large-target"))
    assert (found["verb"], found["force"], found["dataset"]) == ("trace", True, "gsm8k")


def test_a_table_of_random_weights_is_one_of_shapes(call: Caller) -> None:
    edit_table(TABLE, weights="random", dtype="float16")
    found = parsed(call(*ASKED, "--batch-size", "99"))
    assert found["shapes"] == "large-target,toy-draft"
    assert found["dtype"] == "float16"
    shapes = ("--target", "mamba2-2.7b", "--draft", "mamba2-130m")
    found = parsed(call("--gpu", "cpu", "--dataset", "gsm8k", *shapes))
    assert found["shapes"] == "mamba2-2.7b,mamba2-130m"


@pytest.mark.parametrize("verb", [(), ("analyze",), ("trace",)])
def test_a_draft_is_never_guessed(call: Caller, verb: tuple[str, ...]) -> None:
    gpu = () if verb == ("trace",) else ("--gpu", "h200")
    message = call(*verb, *gpu, "--dataset", "gsm8k", "--target", "some-org/large-target")
    assert "--target some-org/large-target needs its draft" in message
    assert "demo-draft" not in message


def test_a_small_table_is_used_as_far_as_it_goes(call: Caller) -> None:
    table = load_runtime_table(TABLE)
    points = tuple(p for p in table.points if p.size <= 8 and p.batch_size <= 2)
    steps = [s for s in table.steps if s.batch_size <= 2]
    small = {tree.tree for tree in steps if table.trees[tree.tree].build().num_nodes <= 7}
    steps = [s for s in steps if s.tree in small]
    edit_table(TABLE, points=points, steps=tuple(steps))
    text = call(*ASKED, "-o", "p.yaml", code=0)
    assert "the runtime table ends at batch size 2 and 7 nodes, and so does this" in text
    line = next(line for line in text.splitlines() if "the runtime table ends" in line)
    found = parsed(line)
    assert words_of(found) == WORDS
    assert (found["max_nodes"], max(found["batch_size"])) == (64, 64)
    profile = load_profile(Path("p.yaml"))
    assert [row.batch_size for row in profile.policy] == [1, 2]
    assert max(row.tree.build().num_nodes for row in profile.policy) <= 7
    assert "the runtime table ends" in call("analyze", *ASKED, code=0)
    assert "--max-nodes 12" in call(*ASKED, "--batch-size", "1", "--max-nodes", "12")


@pytest.mark.parametrize(
    ("given", "verb", "expected"),
    [
        ((), "", {"gpu": "h100", "dataset": "gsm8k"}),
        (("--gpu", "h200", *HUB), "", {"gpu": "h200", "dataset": "gsm8k", "target": HUB[1]}),
        (("analyze", "--dataset", "a b"), "analyze", {"gpu": "h100", "dataset": "a b"}),
        (("--gpu", "h200", "probe", "--batch-size", "3"), "probe", {"gpu": "h200"}),
        (("--gpu", "h200", "show", "a b.yaml"), "show", {"profiles": ["a b.yaml"]}),
        (("--nothing",), None, {}),
    ],
)
def test_a_call_that_lacks_something_is_completed(
    call: Caller, given: tuple[str, ...], verb: str | None, expected: dict[str, object]
) -> None:
    message = call(*given)
    if verb is None:
        assert "See `stree-tune --help`." in message
        return
    found = parsed(message)
    assert found["verb"] == verb
    assert {key: found[key] for key in expected} == expected


def test_other_places_that_propose_a_command(
    call: Caller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my data" / TRACE.name
    shutil.copy(TRACE, path)
    certify_file(path)
    shutil.copy(
        shipped_root() / "traces" / "demo-target--demo-draft--gsm8k--greedy.safetensors", path
    )
    with pytest.raises(ConfigError) as stale:
        load_certificate(path)
    assert parsed(str(stale.value))["traces"] == [str(path)]

    (tmp_path / "empty library").mkdir()
    with pytest.raises(ConfigError) as empty:
        sync(str(tmp_path / "empty library"))
    assert parsed(str(empty.value))["url"] == str(tmp_path / "empty library")

    data = tmp_path / "borrowed"
    write_profile(data, borrowed=True)
    found = parsed(call("show", NAME, "-v", "--data", str(data), code=0))
    assert (found["verb"], len(found["traces"])) == ("certify", 1)
    export = ("export", NAME, "--to", "speculation-profile", "--data", str(data), *HUB)
    found = parsed(call(*export))
    assert (found["verb"], found["target"]) == ("trace", HUB[1])


def test_estimates_that_cannot_be_made_propose_a_probe() -> None:
    path = next((shipped_root() / "runtime").glob("h200--demo-target--*.yaml"))
    table = load_runtime_table(path)
    gpus = {gpu: load_gpu_spec(shipped_root() / "gpus" / f"{gpu}.yaml") for gpu in ("h200", "h100")}
    few = table.model_copy(update={"points": table.points[:3]})
    with pytest.raises(MissingMeasurement) as err:
        estimate_table(few, gpus["h200"], gpus["h100"], (), WORDS)
    assert words_of(parsed(str(err.value))) == WORDS
    no_rules = StepCost.from_table(
        table.model_copy(update={"rules": ()}), StepRule.MSS, words=WORDS
    )
    with pytest.raises(MissingMeasurement) as err:
        no_rules.step_ms(1, Tree.chain(2))
    assert words_of(parsed(str(err.value))) == WORDS


def test_builders_quote() -> None:
    words = PairWords("my models/a'b", "d", (Path("x y"),))
    sampling = Sampling(rule="naive", temperature=0.5)
    for text in (probe_command("h200", words), trace_command(words, "mine", sampling, "--force")):
        assert words_of(parsed(f"`{text}`")) == words
    assert command("show", "a;b") == "stree-tune show 'a;b'"


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a module that do not document it."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in documents:
            assert isinstance(node, ast.Constant)
            yield str(node.value)


def test_no_message_spells_a_command_by_itself() -> None:
    """Only the examples of --help do, which the test of the documentation parses."""
    folders = (Path(package.__path__[0]) for package in (stree_core, stree_autotune))
    found = [
        (path.name, text)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for text in texts(path)
        if re.search(r"stree-tune [-a-z]", text) and not text.startswith("Example: ")
    ]
    assert not found


def test_the_examples_of_help_are_valid() -> None:
    group: Any = typer.main.get_command(app)
    for call_ in (group, *group.commands.values()):
        parsed(f"`{call_.epilog.removeprefix('Example: ')}`")
