"""Make the runtime tables and the tuned profiles that ship anew, by the commands that made them.

    python benchmarks/shipped.py tables [--device cpu] [--only NAME ...] [--resume]
    python benchmarks/shipped.py profiles [--only NAME ...]

Tables are of the GPU at hand, profiles can be made anywhere.

Tables are probed (`stree-tune probe --effort quick`) and written into profiles/runtime. A probe
says when a target's tables disagree on its steps without speculation: something ran beside one.
Profiles run the command that each has in its provenance and are written into profiles/tuned. One
that comes out as it was stays; of another, rows whose tree is the same keep what was measured live
of them. The results file says which files were made; it is stale when one of them is another now.
With `--only` it keeps what it says of other files.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import fingerprint
import torch
from gpus import Environment, side_by_side, visible_gpus
from report import RESULTS, Row, header, is_of_this_run, read, save, table

from stree_autotune.store.runtime_table import runtime_file_name
from stree_core.drafting.pair import device_name, short_gpu_name
from stree_core.models.backend import resolve_device
from stree_core.profile import Profile, load_profile, save_profile

PAIRS = (
    ("mamba2-2.7b", "mamba2-130m", True),
    ("mamba-in-llama-8b", "mamba2-distilled-small", True),
    ("mamba-in-llama-8b-fp8-block", "mamba2-distilled-small", True),
    ("demo-target", "demo-draft", False),
    ("demo-target", "mtp", False),
    ("demo-gdn", "mtp", False),
    ("qwen3.5-27b", "mtp", True),
    ("nemotron-3-nano-mtp", "mtp", True),
    ("qwen3.5-4b", "mtp", True),
)
"""Targets, drafts, and whether they are shapes with random weights."""
MANY_SLOTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256")
"""Batch sizes of trained targets, which are small; of others a probe's own."""
PROFILES = fingerprint.ROOT / "profiles"
ON_CPU = tuple(pair for pair in PAIRS if not pair[2])
NOTHING_MISSING = "exists already"
SHOWN = ("file", "hash", "seconds", "command")


def main() -> None:
    options = parse()
    head = header(device=options.device)
    work = [each for each in commands(options) if not options.only or each[0].stem in options.only]
    rows = others(options.output, head, {place_of(path) for path, _ in work})
    device = resolve_device(options.device)
    probing = options.what == "tables" and device.type == "cuda"

    def make(path: Path, command: list[str], environment: Environment) -> Row:
        start, before = time.monotonic(), path.read_bytes() if path.exists() else b""
        known = load_profile(path) if before and options.what == "profiles" else None
        run(command, environment, resumes=options.resume)
        if known is not None and hash_of(path) == hash_of(path, before):
            path.write_bytes(before)
        elif known is not None:
            save_profile(with_kept(load_profile(path), known), path)
        return row_of(path, command, time.monotonic() - start)

    failures = []
    works = [functools.partial(make, *each) for each in work]
    for done in side_by_side(works, visible_gpus() if probing else []):
        if failure := done.exception():
            failures.append(str(failure))
            continue
        rows.append(done.result())
        print(table(rows[-1:], SHOWN).splitlines()[-1], flush=True)
        save(options.output, head, rows)
    if failures:
        raise SystemExit("\n".join(failures))


def with_kept(profile: Profile, before: Profile) -> Profile:
    """Return a profile with what was measured live of those rows that it shares with one before."""
    old, new = ({row.batch_size: row.tree for row in each.policy} for each in (before, profile))
    block = before.measured
    if block is None:
        return profile
    rows = [row for row in block.rows if old[row.batch_size] == new.get(row.batch_size)]
    kept = block.model_copy(update={"rows": tuple(rows)}) if rows else None
    return profile.model_copy(update={"measured": kept})


def others(output: Path, head: Row, made: Collection[str]) -> list[Row]:
    """Return the rows of files that this run leaves alone, where they are of the same code."""
    known = read(output)["rows"] if is_of_this_run(output, head) else []
    return [row for row in known if row["file"] not in made]


def place_of(path: Path) -> str:
    """Return a file's place in the checkout."""
    return path.relative_to(fingerprint.ROOT).as_posix()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tables and profiles that ship, made anew")
    parser.add_argument("what", choices=("tables", "profiles"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", default=[], help="names of files, without suffix")
    parser.add_argument("--resume", action="store_true", help="go on with tables cut short")
    parser.add_argument("--output", type=Path, help="the results file")
    options = parser.parse_args()
    options.output = options.output or RESULTS / f"{options.what}.json"
    return options


def commands(options: argparse.Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Yield every file with the words of the command that makes it."""
    if options.what == "tables":
        device = resolve_device(options.device)
        anew = [] if options.resume else ["--force"]
        for path, words in table_commands(short_gpu_name(device_name(device), device), device):
            yield path, [*words, *anew]
    else:
        for path in sorted((PROFILES / "tuned").glob("*.yaml")):
            yield path, profile_command(path)


def table_commands(gpu: str, device: torch.device) -> Iterator[tuple[Path, list[str]]]:
    """Yield the tables of a device; of a processor those of demo models alone."""
    for target, draft, is_shape in PAIRS if device.type == "cuda" else ON_CPU:
        pair = ["--shapes", f"{target},{draft}"]
        if not is_shape:
            pair = ["--target", target, "--draft", draft]
            if device.type == "cuda":
                pair += [word for size in MANY_SLOTS for word in ("--batch-size", size)]
        words = ["probe", "--gpu", gpu, *pair, "--effort", "quick", "--data", "profiles"]
        path = PROFILES / "runtime" / runtime_file_name(gpu, target, draft)
        yield path, [*words, "--device", device.type]


def profile_command(path: Path) -> list[str]:
    """Return the words of the command that made a profile, to write where it lies."""
    words = shlex.split(load_profile(path).provenance.command)[1:]
    for flag in ("-o", "--output"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    words = [word for word in words if word != "--force"]
    return [*words, "-o", place_of(path), "--force"]


def run(words: Sequence[str], environment: Environment, *, resumes: bool) -> None:
    """Run a command of stree-tune in the checkout, with some variables of its own.

    One that `resumes` a table may find that nothing is missing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "stree_autotune", *words],
        cwd=fingerprint.ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, **environment}, text=True,
    )  # fmt: skip
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode and not (resumes and NOTHING_MISSING in done.stderr):
        raise SystemExit(f"stree-tune {shlex.join(words)} ended with {done.returncode}; mend it")


def hash_of(path: Path, content: bytes | None = None) -> str:
    """Return the hash of a file, or of what it held before."""
    return fingerprint.hash_of(path.name, path.read_bytes() if content is None else content)


def row_of(path: Path, words: Sequence[str], seconds: float) -> Row:
    return {
        "file": place_of(path),
        "hash": hash_of(path),
        "seconds": round(seconds, 1),
        "command": shlex.join(["stree-tune", *words]),
    }


if __name__ == "__main__":
    main()
