"""The command line: its flags, its lines, its exit codes, and what it leaves on the disk."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import typer
import yaml
from synthetic_data import make_table, make_trace, write_library

from stree_autotune.cli.commands import app, main
from stree_autotune.cli.verbs import VERBS as VERB_LINES
from stree_autotune.search import tuning as tune_module
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.origin import git_sha
from stree_core.errors import NoFeasibleTree
from stree_core.profile import Profile, load_profile

TOY = ("--target", "toy-target", "--draft", "toy-draft")
QUICK = (*TOY, "--batch-size", "4", "--batch-size", "1", "--max-nodes", "8")
LEAST = (*TOY, "--batch-size", "1", "--max-nodes", "1")
"""For tests that look at no tree."""

SHIPPED = "h200--mamba2-2.7b--mamba2-130m--gsm8k"
VERBS = ["", *typer.main.get_command(app).commands]  # type: ignore[attr-defined]


class Outcome:
    """What one call of the command line did."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.lines = out.splitlines()


class Terminal:
    """Calls the command line in a folder of its own that holds the toy pair's data."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture

    def __call__(self, *arguments: str) -> Outcome:
        self._patch.setattr(sys, "argv", ["stree-tune", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return Outcome(left.value.code, *self._capture.readouterr())

    @property
    def files(self) -> list[str]:
        """Everything in the folder but the data."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(name for name in names if name != "stree-data")


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    """A command line in a folder with the toy pair's data in ./stree-data."""
    write_toy_data(tmp_path / "stree-data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder in which the toy pair was tuned, and what that printed; it is only read."""
    folder = tmp_path_factory.mktemp("tuned")
    write_toy_data(folder / "stree-data")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setattr(
            sys, "argv", ["stree-tune", "--gpu", "h200", "--dataset", "gsm8k", *QUICK, "--json"]
        )
        with pytest.raises(SystemExit) as left:
            main()
    return folder, Outcome(left.value.code, printed.getvalue(), "")


def write_toy_data(folder: Path) -> None:
    """Write a table and two traces of the toy pair, and the table of another one."""
    table = make_table(target="toy-target", draft="toy-draft", spread=0.01)
    traces = [
        make_trace("toy-target", "toy-draft", "gsm8k"),
        make_trace("toy-target", "toy-draft", "mt_bench", num_prompts=10),
    ]
    write_library(folder, table, *traces)
    write_library(folder, make_table(target="large-target", draft="toy-draft"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(terminal: Terminal, verb: str) -> None:
    outcome = terminal(*([verb] if verb else []), "--help")
    assert outcome.code == 0
    assert f"Example: stree-tune {verb}".strip() in outcome.out
    assert outcome.err == ""


def test_tuning_prints_and_writes_a_profile(tuned: tuple[Path, Outcome]) -> None:
    folder, outcome = tuned
    assert outcome.code == 0
    assert outcome.lines[0] == "toy-target + toy-draft on h200 · gsm8k · greedy"
    header = next(line for line in outcome.lines if line.startswith("batch"))
    for name in ("verdict", "tokens/step", "step ms", "ms/token", "gain over off"):
        assert name in header
    behind = outcome.lines[outcome.lines.index(header) + 1 :]
    assert [line.split()[0] for line in behind[:2]] == ["1", "4"]
    assert "profile: stree-profile.yaml" in outcome.lines
    profile = load_profile(folder / "stree-profile.yaml")
    assert Profile.model_validate(json.loads(outcome.lines[-1])) == profile
    assert [row.batch_size for row in profile.policy] == [1, 4]
    assert not profile.estimated
    assert profile.sources.runtime.name == "runtime/h200--toy-target--toy-draft.yaml"
    assert profile.provenance.command.startswith("stree-tune --gpu h200 --dataset gsm8k")
    assert {path.name for path in folder.iterdir()} == {"stree-data", "stree-profile.yaml"}


def test_rows_agree_with_their_own_numbers(tuned: tuple[Path, Outcome]) -> None:
    profile = load_profile(tuned[0] / "stree-profile.yaml")
    for row in profile.policy:
        seen = row.predicted
        rate = 1e3 * row.batch_size * seen.tokens_per_step / seen.step_ms
        assert seen.tokens_per_s == pytest.approx(rate, rel=1e-5)
        off = 1e3 * row.batch_size / (3 + 0.02 * row.batch_size)
        # of prompts without a part in the choice
        assert seen.speedup == pytest.approx(rate / off, rel=0.05)
        assert seen.speedup_interval.low <= seen.speedup <= seen.speedup_interval.high
        assert seen.speedup_interval.low <= seen.speedup_interval.high
        assert row.reason


def test_same_seed_same_bytes_except_provenance(terminal: Terminal) -> None:
    texts = []
    for name in ("a.yaml", "b.yaml"):
        terminal("--gpu", "h100", "--dataset", "gsm8k", *QUICK, "--seed", "3", "-o", name)
        text = (terminal.folder / name).read_text()
        assert yaml.safe_load(text)["provenance"]["seed"] == 3
        texts.append(text[: text.index("\nprovenance:")])
    assert texts[0] == texts[1]
    assert "sources:" in texts[0]


def test_estimates_say_so_wherever_they_show(terminal: Terminal) -> None:
    outcome = terminal("--gpu", "h100", "--dataset", "gsm8k", *QUICK)
    title = "toy-target + toy-draft on h100 (estimated from h200) · gsm8k · greedy"
    assert outcome.lines[0] == title
    assert any(line.startswith("times: estimated, runtime/h200--") for line in outcome.lines)
    profile = load_profile(terminal.folder / "stree-profile.yaml")
    assert (profile.gpu.name, profile.gpu.status) == ("h100", "estimated")
    assert profile.estimated
    assert terminal("show", "stree-profile.yaml").lines[0] == title


def test_a_borrowed_trace_is_an_estimate(terminal: Terminal) -> None:
    name = "toy-target--toy-draft--gsm8k--greedy"
    large = ("--target", "large-target", "--draft", "toy-draft", "--batch-size", "1")
    outcome = terminal("--gpu", "h200", *large, "--max-nodes", "8", "--acceptance-from", name)
    assert " ".join(" ".join(outcome.lines[:2]).split()) == (
        "large-target + toy-draft on h200 · gsm8k "
        "(estimated, borrowed from toy-target + toy-draft) · greedy"
    )
    profile = load_profile(terminal.folder / "stree-profile.yaml")
    assert profile.estimated
    assert profile.gpu.status == "measured"
    assert profile.target.name == "large-target"


def test_few_prompts_are_called_unreliable(terminal: Terminal) -> None:
    outcome = terminal("--gpu", "h200", "--dataset", "mt_bench", *LEAST)
    assert "only 10 prompts; a reliable trace has at least 64" in " ".join(outcome.lines)


def test_smallest_limits(terminal: Terminal) -> None:
    few = (*TOY, "--batch-size", "3", "--max-nodes", "1")
    assert terminal("--gpu", "h200", "--dataset", "gsm8k", *few).code == 0
    profile = load_profile(terminal.folder / "stree-profile.yaml")
    assert profile.policy[0].tree.build().num_nodes <= 1


def test_the_commit_is_named() -> None:
    root = Path(__file__).resolve().parents[2]
    sha = git_sha().removesuffix("-dirty")
    if not (root / ".git").exists():
        assert sha == "unknown"
        return
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    assert sha == subprocess.check_output(command, text=True).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tuning needs --gpu and --dataset"),
        (("--gpu", "h200"), "tuning needs --gpu and --dataset"),
        (("--gpu", "h2000", "--dataset", "gsm8k", *TOY), "no known GPU; did you mean h200"),
        (("--gpu", "h200", "--dataset", "gsm8", *TOY), "did you mean gsm8k"),
        (
            ("--gpu", "h200", "--dataset", "human_eval", *TOY),
            "stree-tune trace --dataset human_eval",
        ),
        (("--gpu", "cpu", "--dataset", "gsm8k", *TOY), "stree-tune probe --gpu cpu"),
        (
            (
                "--gpu",
                "h200",
                "--dataset",
                "gsm8k",
                "--target",
                "toy-targt",
                "--draft",
                "toy-draft",
            ),
            "did you mean toy-target",
        ),
        (("--gpu", "../h200", "--dataset", "gsm8k", *TOY), "a GPU name has letters"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--rule", "mss"), "a temperature above 0"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--temperature", "1"), "no trace of toy"),
        (
            ("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--top-p", "0.9"),
            "rule greedy has temperature 0",
        ),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--rule", "beam"), "greedy, naive or mss"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--top-p", "1.5"), "--top-p: "),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--max-nodes", "256"), "'--max-nodes'"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--max-nodes", "65"), "--max-nodes 65"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--batch-size", "0"), "'--batch-size'"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--batch-size", "99"), "--batch-size 99"),
        (("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--data", "absent"), "existing folder"),
        (
            ("--gpu", "h200", "--acceptance-from", "absent", *TOY),
            "a trace is named by its path or file name",
        ),
        (("--gpu", "h200", "--batch", "1"), "No such option"),
        (("--gpu", "h200", "show"), "flags stand behind their verb, got --gpu before show"),
        (("shwo",), "shwo"),
        (("show", "absent.yaml"), "no profile absent.yaml is there"),
        (("trace",), "--dataset"),
        (("probe", "--effort", "long"), "--effort"),
    ],
)
def test_bad_input_is_one_line_and_code_two(
    terminal: Terminal, arguments: tuple[str, ...], message: str
) -> None:
    outcome = terminal(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert terminal.files == []


def test_bad_files_are_one_line_and_code_two(terminal: Terminal) -> None:
    data = terminal.folder / "stree-data"
    trace = data / "traces" / "toy-target--toy-draft--gsm8k--greedy.safetensors"
    table = data / "runtime" / "h200--toy-target--toy-draft.yaml"
    arguments = ("--gpu", "h200", "--dataset", "gsm8k", *QUICK)
    whole = trace.read_bytes()
    for broken in (whole[:-7], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        trace.write_bytes(broken)
        outcome = terminal(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "stree-tune trace" in outcome.err
    trace.write_bytes(whole)
    table.write_text(table.read_text() + "surprise: 1\n")
    assert "unknown key surprise" in terminal(*arguments).err
    assert terminal.files == []


def test_a_stale_table_is_refused(terminal: Terminal) -> None:
    folder = terminal.folder / "stree-data" / "models" / "toy-target"
    folder.mkdir(parents=True)
    shutil.copy(shipped_root() / "models" / "demo-target" / "config.json", folder)
    outcome = terminal("--gpu", "h200", "--dataset", "gsm8k", *QUICK)
    assert outcome.code == 2
    assert "must be of the same toy-target" in outcome.err
    assert "stree-tune probe --gpu h200" in outcome.err


def test_a_trace_of_another_model_is_refused(terminal: Terminal) -> None:
    other = make_trace("large-target", "toy-draft", "gsm8k")
    ref = other.meta.target.model_copy(update={"config_sha256": "f" * 64})
    meta = other.meta.model_copy(update={"target": ref})
    other = type(other)(other.ranks, other.offsets, meta)
    table = make_table(target="large-target", draft="toy-draft")
    write_library(terminal.folder / "stree-data", table, other)
    large = ("--target", "large-target", "--draft", "toy-draft")
    outcome = terminal("--gpu", "h200", "--dataset", "gsm8k", *large)
    assert outcome.code == 2
    assert "got config" in outcome.err
    assert "ffffffffffff" in outcome.err


def test_context_matters_with_attention_only(terminal: Terminal) -> None:
    arguments = ("--gpu", "h200", "--dataset", "gsm8k", *LEAST, "--context", "2048")
    assert terminal(*arguments).code == 0
    table = make_table(target="toy-target", draft="toy-draft", kv_bytes_per_token=512)
    write_library(terminal.folder / "stree-data", table)
    outcome = terminal(*arguments)
    assert outcome.code == 2
    assert "--context 2048" in outcome.err


def test_only_our_default_output_is_replaced(terminal: Terminal) -> None:
    arguments = ("--gpu", "h200", "--dataset", "gsm8k", *LEAST)
    path = terminal.folder / "stree-profile.yaml"
    assert terminal(*arguments).code == 0
    assert terminal(*arguments).code == 0
    assert "pass --force" in terminal(*arguments, "-o", "stree-profile.yaml").err
    assert terminal(*arguments, "-o", "stree-profile.yaml", "--force").code == 0
    path.write_text("mine: 1\n")
    assert "not a stree profile" in terminal(*arguments).err
    assert path.read_text() == "mine: 1\n"
    assert terminal(*arguments, "--force").code == 0
    assert load_profile(path).dataset == "gsm8k"
    assert terminal.files == ["stree-profile.yaml"]


def test_report_writes_one_page(terminal: Terminal, tuned: tuple[Path, Outcome]) -> None:
    shutil.copy(tuned[0] / "stree-profile.yaml", terminal.folder)
    outcome = terminal("report", "stree-profile.yaml", "--json")
    assert outcome.code == 0
    (profile,) = json.loads(outcome.lines[-1])["profiles"]
    assert profile["missing"] == []
    assert {"speed", "trees", "ranks", "runtime", "steps", "history"} == set(profile["figures"])
    assert f"stree-profile.yaml: {profile['headline']}" in outcome.lines
    assert terminal.files == ["report.html", "stree-profile.yaml"]
    # a page of ours is replaced, anything else is not
    assert terminal("report", "stree-profile.yaml").code == 0
    page = terminal.folder / "report.html"
    page.write_text("mine")
    outcome = terminal("report", "stree-profile.yaml")
    assert (outcome.code, page.read_text()) == (2, "mine")
    assert "pass --force" in outcome.err
    assert terminal("report", "stree-profile.yaml", "--force").code == 0
    assert terminal("report", "nowhere").code == 2


def test_every_verb_makes_json() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        opts = {opt for parameter in command.params for opt in parameter.opts}
        # an export and a plan are documents by themselves
        assert "--json" in opts or name in ("export", "plan"), name


def test_a_shell_completes_verbs_flags_and_names(terminal: Terminal) -> None:
    def offered(words: str) -> set[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "_STREE_TUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"stree-tune {words}",
            "COMP_CWORD": str(len(words.split(" "))),
        }
        script = "from stree_autotune.cli.commands import main; main()"
        command = [sys.executable, "-c", script]
        run = subprocess.run(
            command,
            cwd=terminal.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return set(run.stdout.split())

    assert "report" in offered("re")
    assert offered("--gpu h") == {"h100", "h200"}
    assert "h200--demo-target--demo-draft--demo" in offered("show h200")
    assert "toy-target" in offered("--target toy")


@pytest.mark.parametrize(
    ("on_terminal", "no_color", "coloured"),
    [(True, "", True), (True, "1", False), (False, "", False)],
)
def test_colour_is_for_terminals_that_want_it(
    on_terminal: bool, no_color: str, coloured: bool
) -> None:
    dropped = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"NO_COLOR": no_color} if no_color else {}
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    script = "from stree_autotune.cli.commands import main; main()"
    with open(theirs, "wb") as output:
        subprocess.run(
            [sys.executable, "-c", script, "show", SHIPPED],
            stdout=output,
            env=environment,
            check=True,
        )
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert ("\x1b[32m" in text) == coloured
    assert "    1  tree" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_no_result_is_code_one(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> Profile:
        raise NoFeasibleTree("no tree fits")

    monkeypatch.setattr(tune_module, "tune", refuse)
    outcome = terminal("--gpu", "h200", "--dataset", "gsm8k", *QUICK)
    assert (outcome.code, outcome.err) == (1, "error: no tree fits\n")


def test_sampling_is_not_timed_live(terminal: Terminal) -> None:
    hot = ("--temperature", "1", "--rule", "naive", "--measure")
    outcome = terminal("--gpu", "h200", "--dataset", "gsm8k", *QUICK, *hot)
    assert outcome.code == 2
    assert "--measure times greedy steps, got sampling naive-t1; leave" in outcome.err


def test_show_prints_every_shipped_profile(terminal: Terminal) -> None:
    shipped = Library.open().profile_paths()
    assert shipped, "profiles/tuned holds no profile yet"
    outcome = terminal("show", "--json")
    assert outcome.code == 0
    documents = json.loads(outcome.lines[-1])
    documents = documents if isinstance(documents, list) else [documents]
    assert [Profile.model_validate(d) for d in documents] == [load_profile(p) for p in shipped]


def test_tables_are_not_cut_on_narrow_output(
    terminal: Terminal, tuned: tuple[Path, Outcome]
) -> None:
    shutil.copy(tuned[0] / "stree-profile.yaml", terminal.folder)
    outcome = terminal("show", "stree-profile.yaml")
    row = load_profile(terminal.folder / "stree-profile.yaml").policy[0]
    low = round(100 * (row.predicted.speedup_interval.low - 1))
    assert f"[{low}, " in outcome.out
    assert "…" not in outcome.out
    assert "\x1b" not in outcome.out


def _run_main(folder: Path, before: str, after: str, *arguments: str) -> str:
    """Run the command in a process of its own, between two pieces of code; return its stdout."""
    main = (
        "import sys\n"
        "from stree_autotune.cli.commands import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 0, left.code\n"
    )
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", before + main + after, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_tuning_needs_no_torch(terminal: Terminal) -> None:
    after = (
        "heavy = {'torch', 'triton', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    out = _run_main(terminal.folder, "", after, "--gpu", "h100", "--dataset", "gsm8k", *QUICK)
    assert out.startswith("toy-target + toy-draft on h100 (estimated")


def test_tuning_opens_every_input_once(terminal: Terminal) -> None:
    before = (
        "import os, sys\n"
        "opened = []\n"
        "def note(event, details):\n"
        "    if event == 'open' and isinstance(details[0], str):\n"
        "        opened.append(os.path.realpath(details[0]))\n"
        "sys.addaudithook(note)\n"
    )
    after = (
        "kinds = ('/gpus/', '/runtime/', '/traces/', '/models/')\n"
        "ends = ('.yaml', '.safetensors', '.json')\n"
        "inputs = [p for p in opened if p.endswith(ends) and any(k in p for k in kinds)]\n"
        "print('\\n'.join(['inputs', *inputs]))\n"
    )
    # The demo pair is a whole one: with models, certificate, and times to carry to another GPU.
    asked = ("--gpu", "h100", "--dataset", "gsm8k", "--trials", "8", "--batch-size", "1")
    out = _run_main(
        terminal.folder, before, after, *asked, "--target", "demo-target", "--draft", "demo-draft"
    )
    opened = out.partition("inputs\n")[2].split()
    names = {Path(path).name for path in opened}
    assert {"h100.yaml", "h200.yaml", "h200--demo-target--demo-draft.yaml"} <= names
    assert {"demo-target--demo-draft--gsm8k--greedy.safetensors", "config.json"} <= names
    assert any(name.endswith(".certificate.yaml") for name in names)
    assert sorted(opened) == sorted(set(opened))


def test_help_needs_no_schema(terminal: Terminal) -> None:
    after = (
        "slow = {'numpy', 'pydantic', 'yaml', 'optuna', 'scipy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    _run_main(terminal.folder, "", after, "--help")


def test_a_mistyped_verb_is_helped(terminal: Terminal) -> None:
    for typed, meant in (
        ("tun", "tuning has no verb, write `stree-tune --gpu h100 --dataset gsm8k`"),
        ("exprt", "write `stree-tune export`"),
        ("xyz", "see `stree-tune --help`"),
    ):
        outcome = terminal(typed)
        assert outcome.code == 2
        assert outcome.err.startswith("error: a verb is one of plan, import, probe")
        assert outcome.err.rstrip().endswith(f"got '{typed}'; {meant}")


def test_verbs_stand_in_the_order_of_work_with_whole_lines(terminal: Terminal) -> None:
    outcome = terminal("--help")
    lines = outcome.lines[outcome.lines.index("Commands:") + 1 :]
    listed = [line.split(maxsplit=1) for line in lines if line[2:3].islower()]
    assert [tuple(pair) for pair in listed] == list(VERB_LINES.items())


def test_the_version_is_that_of_the_package(terminal: Terminal) -> None:
    assert terminal("--version").out == f"stree-tune {importlib.metadata.version('stree-tune')}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_in_a_word_what_it_takes(terminal: Terminal, verb: str) -> None:
    out = terminal(*([verb] if verb else []), "--help").out
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert options
    # choices stand between angle brackets, types do not
    assert not [line for line in options if re.search(r"<[\w ]+>", line)]
