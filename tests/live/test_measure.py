"""Steps that follow a trace, and tuning by live measurements, on a tiny pair."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mtp_models import nemotron_with_head
from synthetic import latent_trace
from synthetic_data import make_trace
from tiny_models import ours, perturbed, random_texts, save_pair, tiny_mamba2

from stree_autotune.cli.commands import main
from stree_autotune.live.measure import (
    TraceScript,
    measure_steps,
    prompt_for,
    script_of,
    traced_engine,
)
from stree_autotune.probe.run import BUDGETS, Budget
from stree_autotune.probe.stepper import Stepper
from stree_autotune.probe.timing import Effort
from stree_autotune.store.library import Library
from stree_autotune.trace.file import Trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import Pair, Runtime, load_pair
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.models.source import folder_source
from stree_core.profile import load_profile
from stree_core.tree import DEFAULT_TREE, OFF, Tree

PAIR = ("--target", "tiny-target", "--draft", "tiny-draft")
SMALL = ("--batch-size", "1", "--max-nodes", "6", "--context", "64")
WIDE = Tree.from_paths([[0], [1], [2], [0, 0]])
LENGTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure")
    save_pair(root / "stree-data")
    return root


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    models = folder / "stree-data" / "models"
    sources = (folder_source(models / name) for name in ("tiny-target", "tiny-draft"))
    return load_pair(*sources, Runtime("cpu", "float32", "torch"))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return latent_trace(2, num_prompts=6, length=30, num_children=4)


def traced(
    pair: Pair, trace: Trace, context: int, num_slots: int, trees: list[Tree]
) -> tuple[Stepper, TraceScript]:
    script = TraceScript(trace, num_slots, context, pair.device)
    engine = traced_engine(pair, script, EngineConfig(num_slots, context), trees)
    return Stepper(engine, SamplingParams()), script


def test_steps_accept_what_the_trace_says(pair: Pair, trace: Trace) -> None:
    trees = [WIDE, Tree.chain(3), DEFAULT_TREE]
    steps, script = traced(pair, trace, 512, 2, trees)
    expected = np.minimum(trace.ranks, trace.meta.num_children).tolist()
    expected *= 3
    written: list[list[int]] = [[], []]
    keep, starts = steps.engine.collect, []

    def collect() -> object:
        result = keep()
        for own, tokens in zip(written, result.tokens, strict=True):
            own += tokens
        return result

    steps.engine.collect = collect  # type: ignore[method-assign]
    for number in range(40):
        steps.step(number % len(trees))
        starts += script.position_B.tolist() if number == 0 else []
    for own, behind in zip(written, starts, strict=True):
        assert len(own) > 40, "some children were accepted"
        # After the first step a slot stands as far behind its start as it has written.
        lengths = [n for n in range(1, 6) if expected[behind - n : behind] == own[:n]]
        assert lengths
        start = behind - lengths[0]
        assert own == expected[start : start + len(own)]


@pytest.mark.parametrize("depths", [1, 4])
@pytest.mark.parametrize("tree", [WIDE, Tree.chain(2), DEFAULT_TREE], ids=["wide", "chain", "12"])
def test_tokens_per_step_are_those_of_the_walk(pair: Pair, tree: Tree, depths: int) -> None:
    trace = latent_trace(2, num_prompts=6, length=30, num_children=4, depths=depths)
    one = Trace(
        trace.ranks,
        np.array([0, len(trace.ranks)]),
        trace.meta.model_copy(update={"num_prompts": 1}),
    )
    steps, script = traced(pair, one, 1024, 1, [tree])
    walked = walk(one, tree)
    steps.step(0)
    script.position_B.zero_()
    for _ in range(len(walked.starts)):
        steps.step(0)
    assert abs(int(script.position_B[0]) - len(one.ranks)) <= tree.depth


def test_times_of_many_trees(pair: Pair, trace: Trace) -> None:
    trees = [OFF, WIDE, Tree.chain(2), WIDE]
    steps = measure_steps(pair, trace, 64, 2, trees, Effort(2, 3, 0.0))
    assert set(steps) == set(trees)
    assert all(step.ms > 0 for step in steps.values())


@pytest.mark.parametrize("tree", [Tree.chain(0), Tree.chain(3), DEFAULT_TREE], ids=repr)
def test_live_steps_accept_what_the_walk_says(tree: Tree, tmp_path: Path) -> None:
    trace = make_trace(num_prompts=8, length=LENGTH)
    target = ours(tiny_mamba2(layers=1), tmp_path / "target")
    draft = ours(perturbed(tiny_mamba2(layers=1), 0.1), tmp_path / "draft")
    script = TraceScript(trace, 3, LENGTH, target.device)
    engine = Engine(target, draft, tree, EngineConfig(3, 64), rules=script.rules)
    chosen = [0, 5, 2, 7]
    # The first token is none of the trace's positions.
    run = generate(engine, [prompt_for(index) for index in chosen], StopRule(LENGTH + 1))
    assert [len(g.tokens) for g in run.generations] == [LENGTH + 1] * 4
    assert run.tokens_per_step == pytest.approx(walk(trace, tree, np.array(chosen)).tokens_per_step)


@pytest.mark.parametrize("depths", [1, 4])
@pytest.mark.parametrize("tree", [Tree.chain(3), WIDE], ids=repr)
def test_experts_see_other_tokens_at_every_position(
    tree: Tree, depths: int, tmp_path: Path
) -> None:
    trace = latent_trace(2, num_prompts=3, length=LENGTH, num_children=4, depths=depths)
    pair = nemotron_with_head(tmp_path).pair
    script = script_of(pair, trace, 2, LENGTH)
    engine = Engine(pair.target, pair.draft, tree, EngineConfig(2, 64), rules=script.rules)
    prompts = [prompt_for(index) for index in range(3)]
    run = generate(engine, prompts, StopRule(LENGTH + 1))
    assert run.tokens_per_step == pytest.approx(walk(trace, tree).tokens_per_step)
    assert len({token for each in run.generations for token in each.tokens}) > 2 * LENGTH // 3
    without = script_of(pair_without_experts(pair, tmp_path / "plain"), trace, 2, LENGTH)
    assert int(without.tokens(torch.zeros(1, 1, dtype=torch.int64)).max()) <= 4


def pair_without_experts(pair: Pair, folder: Path) -> Pair:
    return replace(pair, target=ours(tiny_mamba2(layers=1), folder))


def test_slots_begin_anywhere_once_they_are_restarted(tmp_path: Path) -> None:
    target = ours(tiny_mamba2(layers=1), tmp_path / "target")
    script = TraceScript(make_trace(num_prompts=8, length=LENGTH), 4, LENGTH, target.device)
    script.start(2, prompt_for(3))
    assert script.position_B.tolist() == [0, 0, 3 * LENGTH, 0]
    script.restart()
    assert len(set(script.position_B.tolist())) > 1
    assert 0 <= int(script.position_B.min()) <= int(script.position_B.max()) < 8 * LENGTH


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["stree-tune", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, *capsys.readouterr()


def test_tuning_by_measurement(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    monkeypatch.setitem(BUDGETS, "quick", Budget(1.0, Effort(1, 1, 0.0)))
    caplog.set_level(logging.INFO)
    (folder / "prompts.jsonl").write_text(
        "\n".join(f'{{"question": "{text}"}}' for text in random_texts(8))
    )
    record = ("--dataset", "toys", "--prompts", "prompts.jsonl", "--max-new-tokens", "30")
    assert run(monkeypatch, capsys, "probe", *PAIR, *SMALL, "--effort", "quick")[0] == 0
    assert run(monkeypatch, capsys, "trace", *record, *PAIR)[0] == 0
    asked = ("--gpu", "cpu", "--dataset", "toys", *PAIR, *SMALL, "--measure", "--trials", "4")
    code, out, err = run(monkeypatch, capsys, *asked)
    assert code == 0, err
    profile = load_profile(Path("stree-profile.yaml"))
    assert profile.measured is not None
    rows = profile.measured.rows
    assert len(rows) == 4
    assert rows[0].tokens_per_s == max(row.tokens_per_s for row in rows)
    assert {"off", "chain 1"} <= {row.mode for row in rows}
    assert all(row.spread_ms is not None for row in rows)
    (row,) = profile.policy
    assert row.predicted.step_ms in {measured.step_ms for measured in rows}
    assert "measured live on" in out
    assert "trial 0: 0 nodes" in caplog.text

    caplog.clear()
    assert run(monkeypatch, capsys, *asked)[0] == 0
    assert "going on after 4 measured trees" in caplog.text
    assert "trial 0: " not in caplog.text
    journals = list(Path("stree-data/studies").iterdir())
    assert [path.name for path in journals if path.suffix == ".journal"] == [
        "cpu--tiny-target--tiny-draft.journal"
    ]


def test_measuring_needs_the_gpu_that_is_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    code, _, err = run(monkeypatch, capsys, "--gpu", "h100", "--dataset", "gsm8k", "--measure")
    assert code == 2
    assert "on the GPU that it is asked about" in err
    assert Library.open().gpu_spec("h100") is not None
