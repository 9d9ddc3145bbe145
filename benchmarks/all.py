"""Run the set of measurements (sources.py) in order of worth, as far as the minutes go.

    python benchmarks/all.py --gpu [--minutes N] [--only NAME ...] [--peers FOLDER] [--pack FILE]
    python benchmarks/all.py --cpu [--minutes N] [--only NAME ...]
    python benchmarks/all.py --gpu --list

What has a results file of this code and of this GPU is not run again, so a second call goes on
where the first one ended, on another machine of the same kind as well once the files are there. A
file is replaced when its benchmark has ended well; the output is in build/measured/NAME.log. Of a
measurement in parts (parts.py) that ends early the whole parts are kept, and the next call measures
the others. The tests that need a GPU run once, before the first benchmark. `--peers` is a folder of
unpacked wheels of other projects, without which benchmarks beside them are left out. `--pack`
gathers all files that were written into one archive with their paths in the checkout, and
build/gate-passed, by which the next machine of the kind knows that the tests passed. Exit status 1
when something that was asked for is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fingerprint
import torch
from gate import STAMP, require_green
from parts import Parts, parts_of
from report import Row, header, is_of_this_run, read
from sources import MEASUREMENTS, RESULTS, Measurement
from stale import CUT_SHORT, judge, write_revision

from stree_core.drafting.pair import device_name, short_gpu_name
from stree_core.files import write_atomically

WORK = fingerprint.ROOT / "build" / "measured"
NO_GPU = "h200"
"""The GPU whose files are listed on a machine without one."""
NO_PEERS = "needs --peers FOLDER, other projects' wheels"
TAIL_LINES = 12
SECONDS_TO_END = 20.0
"""What a benchmark has after an interrupt to write down what it measured."""


@dataclass(frozen=True, slots=True)
class Task:
    """A measurement, its results file, why it has to run (empty: it has not), and how long.

    Of one in parts, what an earlier run has `kept` is not measured again.
    """

    measurement: Measurement
    path: Path
    reason: str
    minutes: float
    parts: Parts | None = None
    kept: Sequence[Row] = ()

    def line(self) -> str:
        """Return what a list says of it."""
        state = self.reason or "fresh"
        return f"{self.path.name:24} {self.minutes:4.1f} min  {state}"


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = short_gpu_name(device_name(device), device) if device.type == "cuda" else NO_GPU
    tasks = [task_of(each, gpu) for each in chosen(options)]
    if options.list:
        print("\n".join(task.line() for task in tasks))
        return
    if options.gpu and device.type != "cuda":
        raise SystemExit("--gpu needs a CUDA device, there is none; --list says what is missing")
    end = time.monotonic() + 60 * options.minutes
    to_run = [task for task in tasks if task.reason]
    if options.gpu and to_run:
        require_green(skip=options.skip_gate)
    left = run_all(to_run, options, end)
    for task, why in left:
        print(f"missing: {task.path.name} ({why}), about {task.minutes:.1f} min")
    if left:
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    names = [measurement.name for measurement in MEASUREMENTS]
    parser = argparse.ArgumentParser(description="Run the set of measurements")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="those that need a GPU")
    where.add_argument("--cpu", action="store_true", help="those that need none")
    parser.add_argument("--minutes", type=float, default=1e6, help="the tests on the GPU included")
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what is missing and stop")
    parser.add_argument("--peers", type=Path, help="folder of unpacked wheels")
    parser.add_argument("--pack", type=Path, help=".tar to gather what was written in")
    parser.add_argument("--skip-gate", action="store_true", help="for development; is recorded")
    options = parser.parse_args()
    options.peers = options.peers.resolve() if options.peers else None
    return options


def chosen(options: argparse.Namespace) -> list[Measurement]:
    """Return the measurements that are asked for, in order of worth."""
    fitting = [each for each in MEASUREMENTS if each.gpu == options.gpu]
    return [each for each in fitting if not options.only or each.name in options.only]


def task_of(measurement: Measurement, gpu: str, results: Path = RESULTS) -> Task:
    """Say whether a measurement has to run, and for how long the last run says it does."""
    path, minutes = results / measurement.file(gpu), measurement.minutes
    if not path.exists():
        return Task(measurement, path, "not measured", minutes)
    document, reason = read(path), judge(path).reason
    minutes = document.get("seconds", 60 * minutes) / 60
    parts = parts_of(measurement, gpu)
    kept = parts.whole(document["rows"]) if parts and reason == CUT_SHORT else []
    if parts and kept:
        left = parts.share_left(kept)
        minutes *= left / (1 - left)
    return Task(measurement, path, reason, minutes, parts, kept)


def run_all(
    tasks: Sequence[Task], options: argparse.Namespace, end: float
) -> list[tuple[Task, str]]:
    """Run what fits into the time; return what is missing after it, and why."""
    left, written = [], [STAMP] if options.gpu and STAMP.exists() else []
    pack(options.pack, written)
    for task in tasks:
        remaining = end - time.monotonic()
        if task.measurement.peers and options.peers is None:
            left.append((task, NO_PEERS))
        elif remaining < 60 * task.minutes:
            left.append((task, "no time left"))
        else:
            print(f"{task.path.name}: {task.reason}", flush=True)
            failure = run(task, options, remaining)
            if failure:
                left.append((task, failure))
            if not failure or (task.parts and task.path.exists()):
                written += [task.path, *made_by(task.path)]
                pack(options.pack, written)
    return left


def run(task: Task, options: argparse.Namespace, seconds: float) -> str:
    """Run a benchmark and put its file in place; return why it is not whole, empty when it is."""
    WORK.mkdir(parents=True, exist_ok=True)
    output, log = WORK / task.path.name, WORK / f"{task.measurement.name}.log"
    output.unlink(missing_ok=True)
    if task.kept and not is_of_this_run(task.path, header()):
        print(f"{task.path.name} is of another machine: all of it is measured again", flush=True)
        task = replace(task, kept=())
    failure = ended(command_of(task, options, output), log, seconds)
    if not output.exists():
        return failure or "wrote no file"
    if task.parts is not None:
        write_whole(output, task, task.parts, failure)
    elif failure:
        return failure
    reason = judge(output).reason
    if reason not in ("", CUT_SHORT) or not read(output)["rows"]:
        return failure or reason or "measured nothing"
    write_revision(output)
    os.replace(output, task.path)
    return failure


def ended(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command for so long at most; return why it did not end well, empty when it did."""
    with log.open("w") as file:
        running = subprocess.Popen(
            command, cwd=fingerprint.ROOT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(running)
            return f"stopped after {seconds:.0f} s"
    if running.returncode == 0:
        return ""
    print(*log.read_text().splitlines()[-TAIL_LINES:], sep="\n", file=sys.stderr, flush=True)
    return f"ended with {running.returncode}, see {log.relative_to(fingerprint.ROOT)}"


def stop(running: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and what it started, and kill those that have not ended soon after."""
    os.killpg(running.pid, signal.SIGINT)
    try:
        running.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def write_whole(output: Path, task: Task, parts: Parts, failure: str) -> None:
    """Put those that an earlier run kept beside a run's rows; of one that failed whole parts."""
    document, kept = read(output), []
    rows = parts.whole(document["rows"]) if failure else document["rows"]
    if task.kept:
        earlier = read(task.path)
        kept = [{"date": earlier["date"], **row} for row in task.kept]
        document["seconds"] += earlier["seconds"]
    words = shlex.split(document["command"])
    skipped = [word for word in words if word == "--skip-gate"]
    document["command"] = shlex.join([*words[:2], *task.measurement.arguments, *skipped])
    document["rows"] = [*kept, *rows]
    if failure and parts.share_left(document["rows"]):
        document["cut_short"] = True
    write_atomically(output, (json.dumps(document, indent=1) + "\n").encode())


def command_of(task: Task, options: argparse.Namespace, output: Path) -> list[str]:
    """Return the words of a benchmark's command."""
    measurement = task.measurement
    script = fingerprint.ROOT / "benchmarks" / f"{measurement.script}.py"
    arguments: Sequence[str] = measurement.arguments
    if task.parts and task.kept:
        arguments = task.parts.options_left(arguments, task.kept)
    words = [sys.executable, str(script), *arguments, "--output", str(output)]
    for flag, glob in measurement.peers:
        path = options.peers if glob == "." else next(options.peers.glob(glob), None)
        if path is None:
            print(f"{measurement.name} runs without {flag}: no {glob} in the folder", flush=True)
        else:
            words += [flag, str(path)]
    if options.skip_gate and "--skip-gate" in script.read_text():
        words.append("--skip-gate")
    return words


def made_by(path: Path) -> list[Path]:
    """Return the files that ship and that a results file says were written with it."""
    document = json.loads(path.read_text())
    made = [fingerprint.ROOT / row["file"] for row in document["rows"] if "hash" in row]
    if "--write" in shlex.split(document["command"]):
        tuned = fingerprint.ROOT / "profiles" / "tuned"
        made += [tuned / f"{name}.yaml" for name in {row["profile"] for row in document["rows"]}]
    return made


def pack(archive: Path | None, paths: Sequence[Path]) -> None:
    """Write an archive of files with their paths in the checkout; nothing without a name."""
    if archive is None:
        return
    with tarfile.open(archive, "w") as file:
        for path in dict.fromkeys(paths):
            file.add(path, path.relative_to(fingerprint.ROOT).as_posix())


if __name__ == "__main__":
    main()
