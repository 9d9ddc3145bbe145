"""A disk that fails at a chosen write, and the verbs that write, their long work replaced.

`python tests/faulty_disk.py` prints the table of docs/log.md: every verb, every write, every fault.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import optuna.storages.journal  # noqa: F401 - loaded before processes are forked
import torch
from synthetic_data import make_table, make_trace
from synthetic_profile import PAIR, PROFILE, TRACE, write_profile

from stree_autotune.cli.commands import main
from stree_autotune.live.rows import ValidationRow
from stree_autotune.search.certificate import Certificate, DepthBound, Line
from stree_autotune.share.check import check_shared
from stree_autotune.share.files import own_files
from stree_autotune.share.index import INDEX, read_index
from stree_autotune.share.remote import push
from stree_autotune.store.library import Library
from stree_autotune.store.origin import provenance
from stree_autotune.store.prompt_rows import Prompt
from stree_autotune.store.prompts import PromptSet
from stree_autotune.trace.record import Recording
from stree_core.errors import ConfigError
from stree_core.models.text import Chat
from stree_core.profile import load_profile

Fault = Literal["no space", "read-only", "killed"]
FAULTS: tuple[Fault, ...] = ("no space", "read-only", "killed")
ERRORS = {"no space": errno.ENOSPC, "read-only": errno.EROFS}
KILLED = 137
TOY = ("--target", PAIR[0], "--draft", PAIR[1])
STREE_DATA = Path("stree-data")


@dataclass
class FaultyDisk:
    """Counts what changes the disk; from number `first` on it fails, or the process ends there."""

    first: int
    fault: Fault = "no space"
    num_writes: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[FaultyDisk]:
        """Stand between the process and the system calls that write."""
        with contextlib.ExitStack() as stack:
            for name in ("mkdir", "write", "fsync", "replace", "rename", "ftruncate", "symlink"):
                guarded = self._guarded(getattr(os, name), lambda *_: True)
                stack.enter_context(mock.patch.object(os, name, guarded))
            opened = self._guarded(os.open, lambda _path, flags, *_: bool(flags & _CHANGES))
            stack.enter_context(mock.patch.object(os, "open", opened))
            for module in (builtins, io):
                plain = self._guarded(module.open, lambda _file, mode="r", *_: mode[:1] in "wax")
                stack.enter_context(mock.patch.object(module, "open", plain))
            yield self

    def _guarded(self, call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if writes(*arguments) and not _is_device(arguments[0]):
                with self._lock:
                    self.num_writes += 1
                    failing = self.num_writes >= self.first
                if failing:
                    self._fail(call, arguments)
            return call(*arguments, **keywords)

        return guarded

    def _fail(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.fault == "killed":
            if call.__name__ == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(KILLED)
        code = ERRORS[self.fault]
        raise OSError(code, os.strerror(code))


_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _is_device(file: object) -> bool:
    return isinstance(file, str | os.PathLike) and str(file).startswith("/dev/")


@dataclass(frozen=True)
class Verb:
    """A call of the command line; `work` are names to patch, and what stands in for them."""

    name: str
    arguments: tuple[str, ...]
    work: dict[str, Any]
    output: str = ""


def verbs(root: Path) -> list[Verb]:
    """Return every verb that writes; `root` holds the data folder and a library."""
    profile = load_profile(root / STREE_DATA / PROFILE)
    table, trace = make_table(target=PAIR[0], draft=PAIR[1]), make_trace(*PAIR, num_prompts=2)
    bound = Certificate(
        trace_sha256="0" * 64,
        num_positions=10,
        chains=(9,),
        stars=(9,),
        bounds=(DepthBound(lines=(Line(5.0, 0.5),)),),
        provenance=provenance(0),
    )
    refs = {"target_ref": SimpleNamespace(name=PAIR[0]), "draft_ref": SimpleNamespace(name=PAIR[1])}
    pair = SimpleNamespace(device=torch.device("cpu"), encode=lambda *_, **__: [[1], [2]], **refs)
    row = ValidationRow("off", 0, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 200, 0)
    recorded = [(i, Recording(b"\x00", 0)) for i in range(2)]
    prompts = PromptSet((Prompt(("prompt",), Chat.of_user("a")),))
    room = "stree_autotune."
    plotted = ("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--batch-size", "1")
    validated = {
        room + "live.validation.open_profile_pair": lambda *_: pair,
        room + "live.validation.open_prompts": lambda *_, **__: prompts,
        room + "live.validation._record": lambda *_: SimpleNamespace(trace=trace, batch_size=1),
        room + "live.validation._known_table": lambda *_: None,
        room + "live.validation._parts": lambda *_: [[]],
        room + "live.validation._stage": lambda *_: SimpleNamespace(table=table),
        room + "live.validation._rows": lambda *_: [row],
    }
    return [
        Verb(
            "tune",
            (*plotted, "-o", "out/x.yaml"),
            {room + "search.tuning.tune": lambda _: profile},
        ),
        Verb(
            "tune --storage",
            (*plotted, "--max-nodes", "2", "--trials", "1", "--storage", "s/x.journal"),
            {},
        ),
        Verb(
            "probe",
            ("probe", "--gpu", "h200", *TOY, "--data", "new"),
            {
                room + "probe.report.open_pair": lambda _: pair,
                room + "probe.report.probe": lambda *_: iter([table, table]),
            },
        ),
        Verb(
            "trace",
            ("trace", "--dataset", "d", "--prompts", "prompts.jsonl", *TOY, "--data", "new"),
            {
                room + "cli.trace.open_sources": lambda _: [SimpleNamespace(name=n) for n in PAIR],
                room + "cli.trace.open_pair": lambda _: pair,
                room + "cli.trace.settings_of": lambda *_: {"target": "t"},
                room + "cli.trace.record_prompts": lambda *_: iter(recorded),
                room + "cli.trace.make_trace": lambda *_: trace,
                room + "search.certificate.certify": lambda *_: bound,
            },
        ),
        Verb("certify", ("certify", str(STREE_DATA / TRACE)), {
            room + "search.certificate.certify": lambda *_: bound}),
        Verb("analyze --plot", ("analyze", *plotted, "--max-nodes", "2", "--plot", "x.svg"), {
            room + "report.analyze._other_gpus": lambda *_: [],
            room + "report.analyze._other_samplings": lambda *_: []}),
        Verb("validate -o", ("validate", "-p", PROFILE_FILE, "-o", "rows.json"), validated),
        Verb("validate --write", ("validate", "-p", PROFILE_FILE, "--write"), validated),
        Verb("report", ("report", PROFILE_FILE, "-o", "out/r.html"), {
            room + "report.page._scans": lambda *_: ((), ())}),
        Verb("export -o", ("export", PROFILE_FILE, "--to", "vllm", "-o", "out/v.json"), {}),
        Verb("push", ("push", "shelf", PROFILE_FILE), {}),
        Verb("pull", ("pull", "library", "--data", "new"), {}),
        Verb("list --library", ("list", "--library", "library"), {}),
    ]  # fmt: skip


PROFILE_FILE = str(STREE_DATA / PROFILE)


def prepare(root: Path) -> Path:
    """Lay out a folder with data, a library and prompts, and return it."""
    write_profile(root / STREE_DATA)
    push(str(root / "library"), own_files([root / STREE_DATA], Library((root / STREE_DATA,))),
         force=False)  # fmt: skip
    (root / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return root


@dataclass(frozen=True)
class Outcome:
    """What a call did: its exit code, its lines on stderr, its writes, and the files it left."""

    code: int
    err: str
    num_writes: int
    problems: tuple[str, ...]


def attempt(verb: Verb, pristine: Path, first: int, fault: Fault) -> Outcome:
    """Run a verb on a copy of a folder whose disk fails from write number `first` on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "here"
        shutil.copytree(pristine, folder)
        before = contents(folder)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _run_and_leave(verb, folder, FaultyDisk(first, fault), write)
        os.close(write)
        with os.fdopen(read, "r") as told:
            text = told.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        num_writes, _, err = text.partition("\n")
        return Outcome(code, err, int(num_writes or 0), tuple(_problems(folder, before, fault)))


def _run_and_leave(verb: Verb, folder: Path, disk: FaultyDisk, write: int) -> None:
    """Be the child: run the verb, tell its writes and its stderr, and end without clean-up."""
    os.chdir(folder)
    err, code, real_write = io.StringIO(), 1, os.write
    sys.argv = ["stree-tune", *verb.arguments]
    sys.stdout, sys.stderr = io.StringIO(), err
    import logging

    logging.getLogger().handlers.clear()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Path, "home", return_value=folder / "home"))
            for name, stand_in in verb.work.items():
                stack.enter_context(mock.patch(name, stand_in))
            stack.enter_context(disk.mounted())
            main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException as raised:
        err.write(f"Traceback: {raised!r}\n")
    real_write(write, f"{disk.num_writes}\n{err.getvalue()}".encode())
    os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _problems(folder: Path, before: dict[str, bytes], fault: Fault) -> Iterator[str]:
    """Yield what is left half-written: no file of before may be gone, every new one is whole."""
    after = contents(folder)
    for name in before:
        if name not in after:
            yield f"{name} is gone"
    for name, data in after.items():
        if data == before.get(name) or name.endswith((".lock", ".journal")):
            continue
        if ".tmp-" in name:
            # a killed process cannot clean up; the next write does
            if fault != "killed" or not Path(name).name.startswith("."):
                yield f"{name} is left"
        elif not _is_whole(name, data):
            yield f"{name} is half-written"


def _is_whole(name: str, data: bytes) -> bool:
    path = Path(name)
    if ".part-" in path.name:
        # a part is read up to its last whole line
        return True
    ends = {".html": b"</html>", ".svg": b"</svg>\n", ".json": b"}\n"}
    try:
        if path.name == INDEX:
            read_index(data, name)
        elif path.suffix in ends:
            return data.endswith(ends[path.suffix])
        else:
            folder = path.parent.name if path.parent.name in ("runtime", "traces") else "tuned"
            check_shared(f"{folder}/{path.name}", data)
    except ConfigError:
        return False
    return True


def survey(verb: Verb, pristine: Path, most: int | None = None) -> list[tuple[Fault, int, Outcome]]:
    """Let every write of a verb fail in every way; with `most`, that many writes spread evenly."""
    whole = attempt(verb, pristine, sys.maxsize, "no space")
    assert whole.code == 0, whole.err
    numbers = range(1, whole.num_writes + 1)
    if most is not None and len(numbers) > most:
        numbers = sorted({round(1 + i * (len(numbers) - 1) / (most - 1)) for i in range(most)})
    tried = ((fault, n, attempt(verb, pristine, n, fault)) for fault in FAULTS for n in numbers)
    # Threads that make one folder count it once or twice: a run may end before write n.
    return [each for each in tried if each[2].code != 0 or each[2].num_writes >= each[1]]


def is_right(fault: Fault, outcome: Outcome) -> bool:
    """True for one sentence, or a killed process, with nothing half-written left."""
    if outcome.problems:
        return False
    if fault == "killed":
        return outcome.code == KILLED
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    reason = os.strerror(ERRORS[fault])
    return (
        outcome.code == 2
        and len(errors) == 1
        and reason in errors[0]
        and "Traceback" not in outcome.err
    )


def print_table() -> None:
    """Print the table: by verb, the writes, and of each fault how many ended as they should."""
    sys.stdout.write("| verb | writes | " + " | ".join(FAULTS) + " |\n|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as place:
        pristine = prepare(Path(place) / "here")
        for verb in verbs(pristine):
            found = survey(verb, pristine)
            counts = []
            for fault in FAULTS:
                right = [is_right(fault, o) for f, _, o in found if f == fault]
                counts.append(f"{sum(right)} of {len(right)}")
            row = (verb.name, str(len(found) // len(FAULTS)), *counts)
            sys.stdout.write(f"| {' | '.join(row)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    print_table()
