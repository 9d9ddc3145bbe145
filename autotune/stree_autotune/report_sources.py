"""The files that a profile was made from, found again for its report and checked by digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stree_autotune.estimate import estimate_table
from stree_autotune.library import Library
from stree_autotune.runtime_table import RuntimeTable, load_runtime_table
from stree_autotune.show import measured_gpu
from stree_autotune.step_cost import StepCost
from stree_autotune.trace_file import Trace, load_trace
from stree_core.errors import StreeError
from stree_core.files import sha256_of
from stree_core.profile import Profile, Source


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is at hand of a profile's sources; `missing` says in sentences what is not, and why."""

    trace: Trace | None
    table: RuntimeTable | None
    cost: StepCost | None
    missing: tuple[str, ...]


def find_evidence(profile: Profile, library: Library) -> Evidence:
    """Return the very files that the profile names; others of the same name are left out."""
    missing: list[str] = []
    trace = table = cost = None
    path = _find("trace", profile.sources.trace, library, missing)
    if path is not None:
        try:
            trace = load_trace(path)
        except StreeError as err:
            missing.append(f"The trace cannot be used: {err}.")
    path = _find("runtime table", profile.sources.runtime, library, missing)
    if path is not None:
        try:
            table = load_runtime_table(path)
            cost = _step_cost(profile, table, library)
        except StreeError as err:
            missing.append(f"The runtime table cannot be used: {err}.")
    return Evidence(trace, table, cost, tuple(missing))


def _step_cost(profile: Profile, table: RuntimeTable, library: Library) -> StepCost:
    """Return the step cost as tuning made it: measured, or carried over to the profile's GPU."""
    if profile.sources.runtime.status == "measured":
        return StepCost.from_table(table)
    measured = library.gpu_sheet(measured_gpu(profile.sources.runtime))
    wanted = library.gpu_sheet(profile.gpu.name)
    if measured is None or wanted is None:
        raise StreeError(
            f"no GPU sheet of {profile.gpu.name} is there to carry its times over with"
        )
    return StepCost.from_estimate(estimate_table(table, measured, wanted))


def _find(kind: str, source: Source, library: Library, missing: list[str]) -> Path | None:
    """Return the file whose digest the profile names, looking in every root."""
    name = PurePosixPath(source.name)
    if name.is_absolute() or ".." in name.parts:
        missing.append(f"The {kind} {source.name} lies outside every data folder.")
        return None
    found = [path for path in (root / name for root in library.roots) if path.is_file()]
    for path in found:
        if sha256_of(path) == source.sha256:
            return path
    if found:
        missing.append(
            f"The {kind} {source.name} that is at hand is not the one that the profile was made "
            f"from (sha256 {source.sha256[:12]}); it was recorded again since, so tune again."
        )
    else:
        missing.append(
            f"The {kind} {source.name} is not at hand; name the folder that holds it with --data."
        )
    return None
