"""What files keep of a model's weights: retraining is noticed, files that know none still fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_data import make_profile

from stree_autotune.cost.traffic import model_cost
from stree_autotune.search.tuning import TuneRequest, ask
from stree_autotune.store.library import (
    Library,
    require_same_model,
    require_same_shape,
    shipped_root,
    trace_file_name,
)
from stree_autotune.trace.file import load_trace, save_trace
from stree_core.drafting.pair import Runtime, load_pair, require_profile_fits
from stree_core.errors import ConfigError
from stree_core.files import dump_yaml
from stree_core.models.source import ModelSource, find_source
from stree_core.profile import ModelRef, Sampling

NAMES = ("demo-target", "demo-draft")
REQUEST = TuneRequest(
    gpu="h200", dataset="demo", target=NAMES[0], draft=NAMES[1], sampling=Sampling(), context=256,
    batch_sizes=(1,), max_nodes=8, data=(), acceptance_from="", seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> ModelSource:
    return find_source(shipped_root() / "models" / NAMES[0])


def retrained(ref: ModelRef) -> ModelRef:
    return ref.model_copy(update={"weights_sha256": "f" * 64})


def unknown(ref: ModelRef) -> ModelRef:
    return ref.model_copy(update={"weights_sha256": None})


def test_only_hashes_that_both_know_are_compared(demo: ModelSource) -> None:
    for first, second in ((demo.ref, demo.ref), (unknown(demo.ref), demo.ref)):
        require_same_model(first, second, "one", "other", "record again")
        require_same_model(second, first, "one", "other", "record again")
    with pytest.raises(ConfigError, match=r"of the same demo-target, got weights .* and f{12}"):
        require_same_model(demo.ref, retrained(demo.ref), "one", "other", "record again")


def test_time_does_not_depend_on_weights(demo: ModelSource) -> None:
    cost = model_cost(demo.shape, demo.ref, 2)
    assert b"weights_sha256" not in dump_yaml(cost)
    require_same_shape(cost, retrained(demo.ref), "table", "folder", "probe again")


def test_a_profile_knows_the_weights_that_its_trace_was_recorded_with(tmp_path: Path) -> None:
    shipped = Library.open().find_source(NAMES[0])
    assert shipped is not None
    assert [ref.weights_sha256 for ref in ask(REQUEST).refs] == [None, None]
    name = trace_file_name(*NAMES, "demo")
    trace = load_trace(shipped_root() / "traces" / name)
    mine = replace(REQUEST, data=(tmp_path,))
    for ref in (shipped.ref, retrained(shipped.ref)):
        known = replace(trace, meta=trace.meta.model_copy(update={"target": ref}))
        save_trace(known, tmp_path / "traces" / name)
        if ref == shipped.ref:
            assert [r.weights_sha256 for r in ask(mine).refs] == [ref.weights_sha256, None]
        else:
            with pytest.raises(ConfigError, match=r"got weights f{12} and .*stree-tune trace"):
                ask(mine)


def test_a_profile_of_retrained_weights_is_refused(demo: ModelSource) -> None:
    pair = load_pair(demo, find_source(shipped_root() / "models" / NAMES[1]), Runtime("cpu"))
    profile = make_profile().model_copy(
        update={"target": pair.target_ref, "draft": pair.draft_ref},
    )
    require_profile_fits(profile, pair)
    require_profile_fits(profile.model_copy(update={"draft": unknown(pair.draft_ref)}), pair)
    for role, ref in (("target", pair.target_ref), ("draft", pair.draft_ref)):
        other = profile.model_copy(update={role: retrained(ref)})
        with pytest.raises(ConfigError, match=f"for {role} demo-.* with weights f{{12}}, but"):
            require_profile_fits(other, pair)
    without = profile.model_copy(
        update={"target": unknown(pair.target_ref), "draft": unknown(pair.draft_ref)}
    )
    assert b"weights_sha256" not in dump_yaml(without)
