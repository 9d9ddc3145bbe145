"""The trace and the step cost that a profile was made from, found by name and by digest."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from stree_autotune.cost import RuntimeInputs, StepCost, read_runtime, runtime_cost
from stree_autotune.search.request import TuneRequest
from stree_autotune.search.times import FROM_SHAPES, times_of_shapes
from stree_autotune.store import SERVERS, Library, RuntimeSource, command
from stree_autotune.trace import RATES, Trace, load_trace
from stree_core.errors import MissingMeasurement, StreeError
from stree_core.files import sha256_of
from stree_core.profile import Profile, Source

MOST_NODES = 64
"""The largest trees whose times are estimated, as far as tuning does by default."""


def profile_trace(profile: Profile, library: Library) -> Trace:
    """Return the very trace that `profile` names; raise MissingMeasurement without it."""
    return load_trace(find_source_file(profile.sources.trace, "traces", library))


def profile_runtime(profile: Profile, library: Library) -> RuntimeInputs:
    """Return the very table that `profile` names, with what estimates need.

    Raises MissingMeasurement without it.
    """
    path = find_source_file(profile.sources.runtime, "runtime", library)
    return read_runtime(library, RuntimeSource(path), profile.gpu.name)


def profile_cost(profile: Profile, library: Library, target: str = "", draft: str = "") -> StepCost:
    """Return the step cost that `profile` was tuned with, carried over where tuning did so.

    Times of shapes alone are estimated again; `target` and `draft` then tell where the models'
    configs are, if the library does not know them by the profile's names.

    Raises MissingMeasurement when the table, a GPU's spec or a config is not at hand.
    """
    if FROM_SHAPES in profile.sources.runtime.name:
        return _shapes_cost(profile, library, target, draft)
    inputs = profile_runtime(profile, library)
    return runtime_cost(inputs, profile.sampling, profile.context)[0]


def _shapes_cost(profile: Profile, library: Library, target: str, draft: str) -> StepCost:
    """Estimate a profile's times again, from the same tables and shapes."""
    missing = MissingMeasurement(
        "this needs the tables and the configs that the profile's times were estimated from, which "
        "are missing or have changed; name the models' folders with --target and --draft, export "
        "one row with --batch-size, or tune again"
    )
    own = profile.target.name, profile.draft.name
    for target_name, draft_name in (own, (target or own[0], draft or own[1])):
        request = TuneRequest(
            gpu=profile.gpu.name,
            dataset=profile.dataset,
            target=target_name,
            draft=draft_name,
            sampling=profile.sampling,
            context=profile.context,
            batch_sizes=tuple(row.batch_size for row in profile.policy),
            max_nodes=max(MOST_NODES, *(row.tree.build().num_nodes for row in profile.policy)),
            data=(),
            acceptance_from="",
            seed=profile.provenance.seed,
        )
        try:
            times = times_of_shapes(library, request, missing)
        except StreeError:
            continue
        if times.source.sha256 == profile.sources.runtime.sha256:
            return times.cost
    raise missing


def is_of_server(source: Source) -> bool:
    """True for a file of what a server measured."""
    return SERVERS in PurePosixPath(source.name).parts


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
    if folder != SERVERS and is_of_server(source):
        raise MissingMeasurement(
            f"this needs a file of {folder}, and the profile has none: a server measured it; tune "
            "without --server for one"
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
