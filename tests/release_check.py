"""The release checklist, on a clean clone of the commit that is checked out.

Run as a script (`make release-check [STEPS="changelog stale"]`); needs a package index, and some
twenty minutes for all steps. Every step runs, whatever became of the others; the last lines say
which failed and why. The snippets of README and docs run within `make test`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 40


class StepFailedError(Exception):
    """What a step found amiss, in one or more lines."""


def main() -> None:
    """Run the steps that are named, or all; exit with 1 when one fails."""
    chosen = sys.argv[1:] or list(STEPS)
    unknown = set(chosen) - set(STEPS)
    if unknown:
        sys.exit(f"release-check: steps are {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    failures = {}
    with tempfile.TemporaryDirectory(prefix="stree-release-") as folder:
        clone = Path(folder) / "stree"
        run("git", "clone", "--quiet", str(ROOT), str(clone), folder=ROOT)
        for name in chosen:
            start = time.monotonic()
            try:
                STEPS[name](clone)
            except StepFailedError as failure:
                failures[name] = str(failure)
            state = "failed" if name in failures else "ok"
            sys.stdout.write(f"{name}: {state}, {time.monotonic() - start:.0f} s\n")
            sys.stdout.flush()
    for name, failure in failures.items():
        sys.stdout.write(f"\n{name}:\n{failure}\n")
    if failures:
        sys.exit(1)


def no_changes(_: Path) -> None:
    """The checkout is its commit: what is released is what was tried."""
    changes = run("git", "status", "--porcelain", folder=ROOT)
    if changes:
        raise StepFailedError(f"commit these or put them away:\n{changes}")


def changelog(clone: Path) -> None:
    """The newest section of the changelog is of the project's version."""
    project = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (clone / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest is None or newest[1] != project["version"]:
        told = newest[1] if newest else "no version"
        raise StepFailedError(
            f"CHANGELOG.md begins with {told}, pyproject.toml has version {project['version']}"
        )


def readme_command(number: int) -> Callable[[Path], None]:
    """Return the step that runs one of README's two commands in the clone."""

    def step(clone: Path) -> None:
        commands = readme_commands((clone / "README.md").read_text())
        run(*commands[number], folder=clone)

    return step


def readme_commands(readme: str) -> list[list[str]]:
    """Return the words of the commands that README's first block of shell has."""
    block = re.search(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = block[1].splitlines() if block else []
    commands = [line.partition("#")[0].split() for line in lines]
    if [words[:1] for words in commands] != [["make"], ["make"]]:
        raise StepFailedError(f"README must begin with two make commands, it has {lines}")
    return commands


def archives(clone: Path) -> None:
    """Sdist and wheel are whole, and each runs in an environment of its own."""
    run("make", "setup", folder=clone)
    run(".venv/bin/python", "tests/wheel_smoke.py", "--sdist", folder=clone)


def stale(clone: Path) -> None:
    """Every results file is of this code, and none is missing."""
    run("make", "setup", folder=clone)
    run(".venv/bin/python", "benchmarks/stale.py", folder=clone)


def run(*command: str, folder: Path) -> str:
    """Run a command without this environment on its path; return stdout, raise what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stdout.splitlines()
        raise StepFailedError("\n".join([" ".join(command), *lines[-TAIL_LINES:]]))
    return done.stdout


STEPS: dict[str, Callable[[Path], None]] = {
    "no-changes": no_changes,
    "changelog": changelog,
    "tune": readme_command(0),
    "test": readme_command(1),
    "archives": archives,
    "stale": stale,
}


if __name__ == "__main__":
    main()
