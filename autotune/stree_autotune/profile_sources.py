"""The trace and the step cost that a profile was made from, found by name and by digest."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from stree_autotune.estimate import estimate_table
from stree_autotune.library import Library
from stree_autotune.runtime_table import load_runtime_table
from stree_autotune.step_cost import StepCost
from stree_autotune.trace_file import Trace, load_trace
from stree_core.errors import MissingMeasurement
from stree_core.files import sha256_of
from stree_core.profile import Profile, Source


def profile_trace(profile: Profile, library: Library) -> Trace:
    """Return the very trace that `profile` names; raise MissingMeasurement without it."""
    return load_trace(find_source_file(profile.sources.trace, "trace", library))


def profile_cost(profile: Profile, library: Library) -> StepCost:
    """Return the step cost that `profile` was tuned with, carried over where tuning did so.

    Raises MissingMeasurement when the table, or a GPU's sheet, is not at hand.
    """
    table = load_runtime_table(find_source_file(profile.sources.runtime, "runtime table", library))
    if table.gpu == profile.gpu.name:
        return StepCost.from_table(table)
    measured, wanted = library.gpu_sheet(table.gpu), library.gpu_sheet(profile.gpu.name)
    if measured is None or wanted is None:
        missing = table.gpu if measured is None else profile.gpu.name
        raise MissingMeasurement(
            f"the profile's times were carried over from {table.gpu} to {profile.gpu.name}, and no "
            f"sheet of {missing} is there; name the folder that has gpus/{missing}.yaml with --data"
        )
    return StepCost.from_estimate(estimate_table(table, measured, wanted))


def find_source_file(source: Source, kind: str, library: Library) -> Path:
    """Return the file with the name and the digest of `source`, from any root.

    Raises MissingMeasurement when there is none.
    """
    name = PurePosixPath(source.name)
    inside = not name.is_absolute() and ".." not in name.parts
    found = [path for root in library.roots if inside and (path := root / name).is_file()]
    for path in found:
        if sha256_of(path) == source.sha256:
            return path
    got = "another one lies there" if found else "none lies there"
    raise MissingMeasurement(
        f"this needs the {kind} that the profile was made from, {name} with sha256 "
        f"{source.sha256[:12]}, and {got}; name its folder with --data or its library with "
        "--library, or tune again"
    )
