"""A profile of a toy pair whose table and trace lie beside it, by formula."""

from __future__ import annotations

from pathlib import Path

from synthetic_data import (
    make_profile,
    make_table,
    make_trace,
    model_ref,
    policy_row,
    write_library,
)

from stree_core.files import sha256_of
from stree_core.profile import Profile, Source, Sources, save_profile
from stree_core.tree import Tree

PAIR = ("toy-target", "toy-draft")
NAME = "h200--toy-target--toy-draft--gsm8k"
PROFILE = f"tuned/{NAME}.yaml"
TABLE = "runtime/h200--toy-target--toy-draft.yaml"
TRACE = "traces/toy-target--toy-draft--gsm8k--greedy.safetensors"

RAGGED = Tree.from_paths([[0], [1], [0, 0]])
ROWS = {1: RAGGED, 4: Tree.chain(2), 16: Tree.chain(0)}


def write_profile(root: Path, *, borrowed: bool = False) -> Profile:
    """Write table, trace and profile into the data folder `root` and return the profile."""
    target, draft = PAIR
    write_library(root, make_table(target=target, draft=draft), make_trace(target, draft))
    times, ranks = (
        Source(name=name, sha256=sha256_of(root / name), status="measured")
        for name in (TABLE, TRACE)
    )
    if borrowed:
        ranks = ranks.model_copy(update={"status": "estimated", "note": "borrowed"})
    profile = make_profile(*(policy_row(size, tree) for size, tree in ROWS.items())).model_copy(
        update={
            "target": model_ref(target),
            "draft": model_ref(draft),
            "sources": Sources(runtime=times, trace=ranks),
        }
    )
    save_profile(profile, root / PROFILE)
    return profile
