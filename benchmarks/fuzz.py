"""Mutated files for every loader: each ends accepted or in one sentence, in time and in memory.

`make fuzz` runs it. Inputs are made from a seed, so that `--loader NAME --only N` repeats one and
shows its traceback. Each worker process reads many inputs; one that dies or hangs is replaced, and
its input counts as a fault or a timeout.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import selectors
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from fuzz_loaders import LOADERS, Bench, Loader, quiet
from fuzz_mutations import mutate
from report import RESULTS, header, save

from stree_core.errors import StreeError

NUM_INPUTS = 26_000
CPU_SECONDS = 5.0
HANG_SECONDS = 60.0
MEMORY_BYTES = 1 << 30
NUM_WORKERS = 2


class OutOfTimeError(BaseException):
    """An input took more processor time than it may."""


@dataclass
class Tally:
    """What became of one loader's inputs."""

    inputs: int = 0
    accepted: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    timeouts: list[int] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of the result file."""
        return {
            "loader": name,
            "inputs": self.inputs,
            "accepted": self.accepted,
            "faults": len(self.failures),
            "timeouts": len(self.timeouts),
        }


@dataclass
class Worker:
    """A process that reads inputs from `first` up to before `stop` of one loader."""

    loader: Loader
    stop: int
    process: int
    pipe: int
    current: int
    told: float
    left: bytes = b""


def make_input(loader: Loader, seeds: list[bytes], seed: int, number: int) -> bytes:
    """Return input `number` of a loader."""
    generator = random.Random(f"{seed}/{loader.name}/{number}")
    return mutate(generator, generator.choice(seeds), loader.form)


def read_one(loader: Loader, bench: Bench, data: bytes) -> str:
    """Return accepted, refused, timeout, or fault with where it came from."""
    before = signal.signal(signal.SIGPROF, _out_of_time)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            loader.read(bench, data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.signal(signal.SIGPROF, before)
    except StreeError as err:
        return "refused" if "\n" not in str(err) else f"fault two lines: {err}"
    except OutOfTimeError:
        return "timeout"
    # Whatever else is raised is what is looked for, panics of Rust libraries included.
    except BaseException as err:
        frames = traceback.extract_tb(err.__traceback__)
        where = next(
            (f for f in reversed(frames) if "stree_" in f.filename or "fuzz" in f.filename),
            frames[-1],
        )
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"fault {type(err).__name__} at {place}: {' '.join(str(err).split())[:200]}"
    return "accepted"


@quiet()
def fuzz(
    loaders: list[Loader], num_inputs: int, seed: int, root: Path, num_workers: int = NUM_WORKERS
) -> dict[str, Tally]:
    """Read `num_inputs` inputs, spread evenly over the loaders, and return what became of them."""
    bench = Bench(root / "shared")
    seeds = {loader.name: list(loader.seeds(bench)) for loader in loaders}
    for loader in loaders:
        for data in seeds[loader.name]:
            loader.read(bench, data)
    per_loader = -(-num_inputs // len(loaders))
    tallies = {loader.name: Tally() for loader in loaders}
    waiting = deque((loader, 0, per_loader) for loader in loaders)
    running: dict[int, Worker] = {}
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < num_workers:
                loader, first, stop = waiting.popleft()
                worker = _start(loader, first, stop, seeds[loader.name], seed, bench)
                running[worker.pipe] = worker
                selector.register(worker.pipe, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=1.0):
                worker = running[key.fd]
                if not _take(worker, tallies[worker.loader.name]):
                    selector.unregister(key.fd)
                    del running[key.fd]
                    _finish(worker, tallies[worker.loader.name], waiting)
            for worker in running.values():
                if time.monotonic() - worker.told > HANG_SECONDS:
                    os.kill(worker.process, signal.SIGKILL)
    return tallies


def _start(
    loader: Loader, first: int, stop: int, seeds: list[bytes], seed: int, bench: Bench
) -> Worker:
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        _work(loader, range(first, stop), seeds, seed, bench, write)
    os.close(write)
    return Worker(loader, stop, process, read, first, time.monotonic())


def _work(
    loader: Loader, numbers: range, seeds: list[bytes], seed: int, bench: Bench, pipe: int
) -> NoReturn:
    """Be a worker: read inputs and tell what became of each."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    own = Bench(bench.root.parent / f"worker-{os.getpid()}")
    for number in numbers:
        outcome = read_one(loader, own, make_input(loader, seeds, seed, number))
        os.write(pipe, f"{outcome}\n".encode("utf-8", "backslashreplace"))
    os._exit(0)


def _out_of_time(*_: object) -> NoReturn:
    raise OutOfTimeError


def _take(worker: Worker, tally: Tally) -> bool:
    """Count what a worker tells; False when it tells no more."""
    data = os.read(worker.pipe, 1 << 16)
    *lines, worker.left = (worker.left + data).split(b"\n")
    for line in lines:
        _count(tally, worker.current, line.decode())
        worker.current += 1
    worker.told = time.monotonic()
    return bool(data)


def _finish(worker: Worker, tally: Tally, waiting: deque[tuple[Loader, int, int]]) -> None:
    """Count the input that a worker died of, and let another go on behind it."""
    os.close(worker.pipe)
    status = os.waitstatus_to_exitcode(os.waitpid(worker.process, 0)[1])
    if worker.current < worker.stop:
        hung = status == -signal.SIGKILL
        outcome = "timeout" if hung else f"fault the process ended with {status}"
        _count(tally, worker.current, outcome)
        if worker.current + 1 < worker.stop:
            waiting.appendleft((worker.loader, worker.current + 1, worker.stop))


def _count(tally: Tally, number: int, outcome: str) -> None:
    tally.inputs += 1
    if outcome == "accepted":
        tally.accepted += 1
    elif outcome == "timeout":
        tally.timeouts.append(number)
    elif outcome.startswith("fault"):
        tally.failures.append((number, outcome.removeprefix("fault ")))


def repeat(loader: Loader, seed: int, number: int, root: Path) -> None:
    """Read one input in this process, and let what it raises be seen."""
    bench = Bench(root)
    data = make_input(loader, list(loader.seeds(bench)), seed, number)
    sys.stdout.write(f"{data[:2000]!r}\n")
    loader.read(bench, data)


def main() -> int:
    """Run, print what went wrong, write the result file; 1 when anything did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [loader.name for loader in LOADERS]
    parser.add_argument("--inputs", type=int, default=NUM_INPUTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loader", choices=names, action="append", help="only these")
    parser.add_argument("--only", type=int, help="number of one input of one loader to repeat")
    parser.add_argument("--output", type=Path, default=RESULTS / "fuzz.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = header()
    chosen = [loader for loader in LOADERS if loader.name in (options.loader or names)]
    with tempfile.TemporaryDirectory() as place:
        if options.only is not None:
            repeat(chosen[0], options.seed, options.only, Path(place))
            return 0
        tallies = fuzz(chosen, options.inputs, options.seed, Path(place))
    rows = [tally.row(name) for name, tally in tallies.items()]
    for name, tally in tallies.items():
        for number, failure in tally.failures:
            sys.stderr.write(f"{name} {number}: {failure}\n")
        for number in tally.timeouts:
            sys.stderr.write(f"{name} {number}: timeout\n")
    limits = {"cpu_seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES}
    save(options.output, head | {"limits": limits}, rows)
    for row in rows:
        sys.stdout.write(" ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    return 1 if any(row["faults"] or row["timeouts"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
