"""List the results files that are not of this code, with the sources that changed.

    python benchmarks/stale.py [--write] [FILE ...]

A file is stale when a source of its measurement (sources.py) says something else than it said when
the file was measured; comments, docstrings and line breaks say nothing. A file without fingerprints
is judged by its commit where that was clean, and otherwise has to be measured again. `--write` puts
the commit into files whose own is not known here: they were measured without git, or before it was
made. Exit status 1 when a file is stale
or one of the set is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fingerprint
from sources import MEASUREMENTS, RESULTS, Measurement, measurement_of, without

from stree_core.files import write_atomically

OTHER_OPTIONS = "measured with other options than those of sources.py"
CUT_SHORT = "the run was cut short: measure again for the rest"
NO_COMMIT = "no commit here has its sources: commit them, then run stale.py --write"
NO_FINGERPRINT = "no fingerprint: measure again"
OF_NO_MEASUREMENT = "no measurement of sources.py makes it: delete it"
SHOWN_SOURCES = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a results file is stale; empty when it is of this code."""

    file: str
    reason: str = ""

    @property
    def is_stale(self) -> bool:
        """Say whether the file is not of this code."""
        return bool(self.reason)


def judge(path: Path, root: Path = fingerprint.ROOT) -> Verdict:
    """Compare a results file's sources with those of a checkout.

    What was kept of a run that did not end says so by a key `cut_short`.
    """
    measurement = measurement_of(path.name)
    if measurement is None:
        return Verdict(path.name, OF_NO_MEASUREMENT)
    document = json.loads(path.read_text())
    then = sources_of(document, list(measurement.hashes(root)), root)
    if then is None:
        return Verdict(path.name, NO_FINGERPRINT)
    changed = fingerprint.changed(then, measurement.hashes(root))
    changed += rewritten(document["rows"], root)
    if not changed and options_of(document["command"], measurement) != measurement.arguments:
        return Verdict(path.name, OTHER_OPTIONS)
    if not changed and document.get("cut_short"):
        return Verdict(path.name, CUT_SHORT)
    return Verdict(path.name, names_of(changed))


def rewritten(rows: list[dict[str, Any]], root: Path) -> list[str]:
    """Return the files that a run wrote beside its results, and that are others now."""
    made = {row["file"]: row["hash"] for row in rows if "hash" in row}
    return [
        file
        for file, value in made.items()
        if not (root / file).exists()
        or fingerprint.hash_of(file, (root / file).read_bytes()) != value
    ]


def options_of(command: str, measurement: Measurement) -> tuple[str, ...]:
    """Return the options of a command that decide what is measured.

    A run that made some files alone (`--only`) has kept those of others, as `rewritten` finds.
    """
    words = shlex.split(command)[2:]
    if measurement.script == "shipped":
        words = without(words, "--only")
    for flag, _ in measurement.peers:
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return tuple(word for word in words if word not in ("--skip-gate", "--resume"))


def sources_of(document: dict[str, Any], paths: list[str], root: Path) -> fingerprint.Hashes | None:
    """Return what a results file was measured on; None where that cannot be known.

    Without hashes, a clean commit tells: none that is unknown, and none with local changes.
    """
    if "source_hashes" in document:
        hashes: fingerprint.Hashes = document["source_hashes"]
        return hashes
    revision = document.get("git_sha", "")
    if re.fullmatch("[0-9a-f]{40}", revision) is None:
        return None
    return fingerprint.hashes_at(revision, paths, root)


def names_of(changed: list[str]) -> str:
    """Return the first of the changed sources, and how many more there are."""
    names = ", ".join(changed[:SHOWN_SOURCES])
    more = len(changed) - SHOWN_SOURCES
    return f"{names} and {more} more" if more > 0 else names


def missing(folder: Path, gpu: str) -> list[str]:
    """Return the files of the set that a folder lacks for a GPU."""
    names = [measurement.file(gpu) for measurement in MEASUREMENTS]
    return [name for name in names if not (folder / name).exists()]


def lacks_commit(path: Path, root: Path = fingerprint.ROOT) -> bool:
    """Say whether a file of this code names a commit of other sources, or none."""
    document = json.loads(path.read_text())
    sources: fingerprint.Hashes | None = document.get("source_hashes")
    if sources is None or not (root / ".git").exists():
        return False
    return fingerprint.hashes_at(document["revision"], list(sources), root) != sources


def write_revision(path: Path, root: Path = fingerprint.ROOT) -> None:
    """Put a commit that has a file's sources into it, unless the one in it has them."""
    document = json.loads(path.read_text())
    sources: fingerprint.Hashes | None = document.get("source_hashes")
    if sources is None:
        return
    if not lacks_commit(path, root):
        return
    revision = fingerprint.head_with(sources, root) or fingerprint.revision_with(sources, root)
    if revision is not None:
        document["revision"] = revision
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def main() -> None:
    """Print the stale files."""
    parser = argparse.ArgumentParser(description="Results files that are not of this code")
    parser.add_argument("files", nargs="*", type=Path, help="these only")
    parser.add_argument("--write", action="store_true", help="put commits into the files")
    parser.add_argument("--gpu", default="h200", help="whose files have to be there")
    options = parser.parse_args()
    paths = options.files or sorted(RESULTS.glob("*.json"))
    if options.write:
        for path in paths:
            write_revision(path)
    verdicts = [verdict for verdict in map(judge, paths) if verdict.is_stale]
    stale = {verdict.file for verdict in verdicts}
    fresh = [path for path in paths if path.name not in stale]
    verdicts += [Verdict(path.name, NO_COMMIT) for path in fresh if lacks_commit(path)]
    absent = [] if options.files else missing(RESULTS, options.gpu)
    for verdict in verdicts:
        print(f"{verdict.file}: {verdict.reason}")
    for name in absent:
        print(f"{name}: not measured")
    if verdicts or absent:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
