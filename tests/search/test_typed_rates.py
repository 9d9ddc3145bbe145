"""Tuning by typed rates and by shapes alone: what is answered, marked, and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from stree_autotune.search.profile_sources import profile_cost, profile_runtime, profile_trace
from stree_autotune.search.request import TuneRequest
from stree_autotune.search.times import FROM_SHAPES
from stree_autotune.search.tuning import tune
from stree_autotune.store.library import Library
from stree_autotune.store.runtime_table import (
    load_runtime_table,
    runtime_file_name,
    save_runtime_table,
)
from stree_autotune.store.show import title
from stree_autotune.trace.typed_rates import rates_of, rates_source
from stree_core.errors import CheckpointError, ConfigError, MissingMeasurement, NoFeasibleTree
from stree_core.families.shape_spec import load_shape_spec
from stree_core.profile import Sampling

LIBRARY = Library.open()

REQUEST = TuneRequest(
    gpu="h100",
    dataset="",
    target="qwen3.5-35b-a3b",
    draft="mtp",
    sampling=Sampling(),
    context=1024,
    batch_sizes=(1, 8),
    max_nodes=8,
    data=(),
    acceptance_from="",
    seed=0,
    rates=(0.8, 0.6, 0.4),
)
MEASURED = replace(REQUEST, gpu="h200", target="demo-target", draft="demo-draft")


def test_a_shape_and_rates_are_enough_and_all_is_marked() -> None:
    profile = tune(REQUEST)
    assert profile.estimated
    assert profile.gpu.status == "estimated"
    runtime, trace = profile.sources.runtime, profile.sources.trace
    assert runtime.name == f"runtime/h200--{FROM_SHAPES}.yaml"
    assert "true times lie within" in str(runtime.note)
    assert (trace.name, trace.status) == ("rates", "estimated")
    assert trace.note == "typed: 0.8, 0.6, 0.4; chains only, rates as exact"
    assert title(profile).count("estimated") == 2
    for row in profile.policy:
        assert row.verdict in ("off", "chain")
        depth = row.tree.build().depth
        assert row.predicted.tokens_per_step == pytest.approx(1 + sum(REQUEST.rates[:depth]))
        interval = row.predicted.speedup_interval
        assert interval.low <= row.predicted.speedup <= interval.high
    assert tune(REQUEST).policy == profile.policy


def test_weights_in_fp8_make_a_token_cheaper(tmp_path: Path) -> None:
    """By a shape's name with the ending, and by a config that declares them."""
    plain = replace(REQUEST, target="qwen3.5-4b", batch_sizes=(1,))
    shape = load_shape_spec(LIBRARY.find_shape("qwen3.5-4b"))
    declared = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**shape.config_dict, "quantization_config": declared}))
    wide = tune(plain)
    for target in ("qwen3.5-4b-fp8-block", str(path)):
        fp8 = tune(replace(plain, target=target))
        assert (fp8.target.weights, wide.target.weights) == ("fp8-block", None)
        before, after = (profile.policy[0].predicted for profile in (wide, fp8))
        assert after.step_ms < 0.9 * before.step_ms
        assert after.speedup < before.speedup, "a step has more to earn"


def test_weights_of_a_kind_in_no_table_make_the_band_wider() -> None:
    """Blocks are in the table of the 8B pair, scales of whole tensors in none."""
    asked = replace(REQUEST, batch_sizes=(1,))
    blocks, tensors = (
        tune(replace(asked, target=f"qwen3.5-4b-fp8-{kind}")) for kind in ("block", "tensor")
    )
    assert "in no table" not in str(blocks.sources.runtime.note)
    assert "weights in fp8-tensor are in no table" in str(tensors.sources.runtime.note)
    bands = [
        re.search(r"within x([\d.]+) and", str(p.sources.runtime.note)) for p in (blocks, tensors)
    ]
    assert bands[0]
    assert bands[1]
    assert float(bands[0][1]) > float(bands[1][1])


def test_a_table_without_whole_steps_is_as_none(tmp_path: Path) -> None:
    """A probe that was stopped early leaves one: the answer is that of the shapes."""
    whole = load_runtime_table(LIBRARY.find_runtime("h200", "qwen3.5-27b", "mtp").path)
    nothing: dict[str, object] = dict.fromkeys(("points", "steps", "prompts", "no_room"), ())
    empty = whole.model_copy(update={**nothing, "trees": {}, "steps_no_room": ()})
    name = runtime_file_name("h200", "qwen3.5-27b", "mtp")
    save_runtime_table(empty, tmp_path / "runtime" / name)
    asked = replace(REQUEST, gpu="h200", target="qwen3.5-27b", batch_sizes=(1,))
    profile = tune(replace(asked, data=(tmp_path,)))
    assert profile.sources.runtime.status == "estimated"
    assert profile.sources.runtime.name == f"runtime/h200--{FROM_SHAPES}.yaml"
    # nothing but the table knows this target
    save_runtime_table(empty, tmp_path / "runtime" / runtime_file_name("h200", "untold", "mtp"))
    with pytest.raises(MissingMeasurement, match=r"untold--mtp\.yaml has none .*stree-tune probe"):
        tune(replace(asked, target="untold", data=(tmp_path,)))


def test_nothing_pretends_that_files_are_behind_it() -> None:
    profile = tune(REQUEST)
    with pytest.raises(MissingMeasurement, match="its acceptance was typed; record a trace"):
        profile_trace(profile, LIBRARY)
    with pytest.raises(MissingMeasurement, match="its times are of shapes alone; measure"):
        profile_runtime(profile, LIBRARY)


def test_times_of_shapes_are_estimated_again_as_they_were() -> None:
    profile = tune(REQUEST)
    cost = profile_cost(profile, LIBRARY)
    for row in profile.policy:
        tree, tokens = row.tree.build(), row.predicted.tokens_per_step
        again = cost.step_ms(row.batch_size, tree, tokens)
        assert again == pytest.approx(row.predicted.step_ms, rel=1e-5)


def test_one_draft_token_is_enough_of_a_question() -> None:
    profile = tune(replace(REQUEST, max_nodes=1))
    assert {row.tree.build().num_nodes for row in profile.policy} <= {0, 1}


def test_times_of_other_shapes_are_not_taken(tmp_path: Path) -> None:
    """The config is told by name or by flag, and has to be the one of then."""
    path = tmp_path / "mine.json"
    config = dict(load_shape_spec(LIBRARY.find_shape("qwen3.5-35b-a3b")).config)
    path.write_text(json.dumps(config))
    profile = tune(replace(REQUEST, target=str(path)))
    lost = "name the models' folders with --target"
    with pytest.raises(MissingMeasurement, match=lost):
        profile_cost(profile, LIBRARY)
    assert profile_cost(profile, LIBRARY, str(path)).batch_sizes == (1, 8)
    other = tmp_path / "other.json"
    wider = {**config["text_config"], "shared_expert_intermediate_size": 1024}
    other.write_text(json.dumps({**config, "text_config": wider}))
    with pytest.raises(MissingMeasurement, match=lost):
        profile_cost(profile, LIBRARY, str(other))


def test_rates_are_read_back_from_a_profile_or_refused() -> None:
    for rates in ((0.8, 0.6, 0.4), (1.0,), (0.123456, 0.0)):
        assert rates_of(rates_source(rates, "; more")) == rates
        assert rates_of(rates_source(rates)) == rates
    for rates in ((1 / 3,), tuple(0.987654 for _ in range(64))):
        with pytest.raises(MissingMeasurement, match="up to six digits"):
            rates_of(rates_source(rates))


def test_measured_times_stay_measured() -> None:
    profile = tune(MEASURED)
    assert profile.sources.runtime.status == "measured"
    assert profile.estimated, "by the rates"
    useless = tune(replace(MEASURED, rates=(0.01,)))
    assert {row.verdict for row in useless.policy} == {"off"}
    perfect = tune(replace(MEASURED, rates=(1.0,) * 6))
    assert {row.tree.build().label for row in perfect.policy} == {"chain 6"}


def test_a_config_file_is_enough(tmp_path: Path) -> None:
    model = LIBRARY.find_described("nemotron-3-nano-mtp")
    spec = LIBRARY.find_shape("nemotron-3-nano-mtp")
    loaded = load_shape_spec(spec)
    merged = {**loaded.config, **(loaded.mtp or {})}
    path = tmp_path / "my-model.json"
    path.write_text(json.dumps(merged))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(merged))
    for word, name in ((path, "my-model"), (folder, "served"), (folder / "config.json", "served")):
        profile = tune(replace(REQUEST, target=str(word)))
        assert profile.target.name == name
        assert profile.target.shape_sha256 == model.shape.digest


def test_trees_need_a_trace_which_may_be_borrowed() -> None:
    borrowed = "demo-target--mtp--gsm8k--greedy"
    asked = replace(REQUEST, rates=(), acceptance_from=borrowed, target="nemotron-3-nano-mtp")
    profile = tune(asked)
    assert "borrowed from demo-target" in str(profile.sources.trace.note)
    assert profile.sources.runtime.status == "estimated"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dataset": "gsm8k"}, ConfigError, "got --rates and --dataset; drop one"),
        ({"acceptance_from": "x"}, ConfigError, "got --rates and --acceptance-from; drop one"),
        ({"target": "nowhere"}, ConfigError, "nowhere is no known model"),
        ({"draft": "nowhere"}, ConfigError, "nowhere is no known model"),
        ({"target": "nemotron-h-8b"}, CheckpointError, "names none; give a draft model"),
        ({"draft": "mamba2-130m"}, ConfigError, "needs the target's whole vocabulary"),
        ({"gpu": "cpu"}, MissingMeasurement, "no runtime table of qwen3.5-35b-a3b"),
        ({"gpu": "rtx3090"}, NoFeasibleTree, "GB of rtx3090"),
    ],
)
def test_what_cannot_be_answered(
    change: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tune(replace(REQUEST, **change))  # type: ignore[arg-type]
