"""What is at hand of a profile's sources, and in sentences what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from stree_autotune.library import Library
from stree_autotune.profile_sources import find_source_file, profile_cost, profile_trace
from stree_autotune.runtime_table import RuntimeTable, load_runtime_table
from stree_autotune.step_cost import StepCost
from stree_autotune.trace_file import Trace
from stree_core.errors import StreeError
from stree_core.profile import Profile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The very files that a profile names, and why some are missing."""

    trace: Trace | None
    table: RuntimeTable | None
    cost: StepCost | None
    missing: tuple[str, ...]


def find_evidence(profile: Profile, library: Library) -> Evidence:
    """Return what can be found of the files that a profile was made from."""
    missing: list[str] = []
    runtime = profile.sources.runtime
    trace = _attempt(lambda: profile_trace(profile, library), missing)
    table = _attempt(
        lambda: load_runtime_table(find_source_file(runtime, "runtime", library)), missing
    )
    cost = None if table is None else _attempt(lambda: profile_cost(profile, library), missing)
    return Evidence(trace, table, cost, tuple(missing))


def _attempt(load: Callable[[], T], missing: list[str]) -> T | None:
    try:
        return load()
    except StreeError as err:
        sentence = str(err)
        missing.append(f"{sentence[0].upper()}{sentence[1:]}.")
        return None
