"""The trace and the step cost that a profile was made from, found by name and by digest."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from stree_autotune.cost import RuntimeInputs, StepCost, read_runtime, runtime_cost
from stree_autotune.search.times import FROM_SHAPES
from stree_autotune.store import Library, RuntimeSource, command
from stree_autotune.trace import RATES, Trace, load_trace
from stree_core.errors import MissingMeasurement
from stree_core.files import sha256_of
from stree_core.profile import Profile, Source


def profile_trace(profile: Profile, library: Library) -> Trace:
    """Return the very trace that `profile` names; raise MissingMeasurement without it."""
    return load_trace(find_source_file(profile.sources.trace, "traces", library))


def profile_runtime(profile: Profile, library: Library) -> RuntimeInputs:
    """Return the very table that `profile` names, with what estimates need.

    Raises MissingMeasurement without it.
    """
    path = find_source_file(profile.sources.runtime, "runtime", library)
    return read_runtime(library, RuntimeSource(path), profile.gpu.name)


def profile_cost(profile: Profile, library: Library) -> StepCost:
    """Return the step cost that `profile` was tuned with, carried over where tuning did so.

    Raises MissingMeasurement when the table, or a GPU's spec, is not at hand.
    """
    inputs = profile_runtime(profile, library)
    return runtime_cost(inputs, profile.sampling, profile.context)[0]


def find_source_file(source: Source, folder: str, library: Library) -> Path:
    """Return the file with the name and the digest of `source`, from `folder` of any root.

    Raises MissingMeasurement when there is none.
    """
    if source.name == RATES or FROM_SHAPES in source.name:
        made = "acceptance was typed" if source.name == RATES else "times are of shapes alone"
        made_by = "record a trace" if source.name == RATES else f"measure with `{command('probe')}`"
        raise MissingMeasurement(
            f"this needs a file of {folder}, and the profile has none: its {made}; {made_by} and "
            "tune again"
        )
    name = PurePosixPath(source.name).name
    found = [path for root in library.roots if (path := root / folder / name).is_file()]
    for path in found:
        if sha256_of(path) == source.sha256:
            return path
    got = "has another one" if found else "has none"
    raise MissingMeasurement(
        f"this needs {folder}/{name} with sha256 {source.sha256[:12]}, which the profile was made "
        f"from, and the search path {got}; name the folder that has it with --data or the library "
        "with --library, or tune again"
    )
