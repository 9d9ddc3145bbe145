"""Who made a file, with what: the block that a reader needs to make it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from stree_core.extras import DISTRIBUTION
from stree_core.profile import Provenance
from stree_core.shown_text import MAX_COMMAND_CHARS, clean_word, printable

SERVERS = "servers"
"""The folder, in a data folder, of what servers measured."""
PACKAGES = ("torch", "triton", "numpy", "scipy", "optuna")


def provenance(seed: int) -> Provenance:
    """Return the provenance of the running command."""
    return Provenance(
        version=version_of(DISTRIBUTION),
        git_sha=git_sha(),
        versions=versions(),
        seed=seed,
        command=command_line(),
        date=utc_now(),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results, importing none."""
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def git_sha() -> str:
    """Return the checkout's commit, `-dirty` with local changes, `unknown` when not in a checkout.

    An installed package may lie below somebody else's checkout, so only our own layout counts.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "autotune" / "stree_autotune").is_dir():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()


def command_line() -> str:
    """Return the command as its user typed it, without passwords and without absolute paths."""
    words = [clean_word(word) for word in sys.argv]
    is_script = words[0].endswith(".py") and not words[0].endswith("__main__.py")
    program = ["python", words[0]] if is_script else ["stree-tune"]
    return printable(shlex.join([*program, *words[1:]]))[:MAX_COMMAND_CHARS]


def utc_now() -> str:
    """Return the date and time, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version_of(package: str) -> str:
    """Return the version of an installed distribution, `absent` without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
