"""Sizes that pay and sizes that do not: known answers, the verb, its picture and its JSON."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic import FakeCost, latent_trace, trace_of
from synthetic_data import make_table, make_trace, memory_for, write_library

from stree_autotune.cli.commands import main
from stree_autotune.report import analyze
from stree_autotune.report.sizes import Bands, Scaling, best_of_sizes, scaling, trials
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.trace.tree_walk import walk
from stree_core.tree import OFF, Tree

TOY = ("--target", "toy-target", "--draft", "toy-draft", "--max-nodes", "12")


def perfect_chain() -> TreeSpace:
    """Return a space in which the first child is always right: only depth helps."""
    return TreeSpace.of(trace_of([[0] * 90] * 8, 4), 8)


def test_a_perfect_draft_pays_for_every_node_it_has_time_for() -> None:
    free = scaling(perfect_chain(), FakeCost(pad=16, per_level_ms=0.0), 1)
    assert free.best.nodes == 8
    assert free.best.gain is None
    assert "raise --max-nodes" in free.sentence()
    # chains contain each other, so the next node makes the next size of a chain
    for size, more in pairwise(free.sizes):
        assert size.gain == pytest.approx(more.tokens_per_step / size.tokens_per_step - 1)
    dear = scaling(perfect_chain(), FakeCost(per_level_ms=99.0), 1)
    assert dear.best.nodes == 0
    assert dear.faster_up_to == 0
    assert "do not speculate" in dear.sentence()


def test_sizes_are_those_of_the_best_surveyed_tree() -> None:
    trace = latent_trace(0, num_prompts=32, length=60)
    space, cost = TreeSpace.of(trace, 12), FakeCost(pad=4, per_token_ms=0.2)
    found: Scaling = scaling(space, cost, 2)
    assert [size.nodes for size in found.sizes] == list(range(13))
    off_ms = cost.step_ms(2, OFF)
    for size in found.sizes[1:]:
        rates = [
            walk(trace, tree).tokens_per_step / cost.step_ms(2, tree)
            for _, tree in space.survey
            if tree.num_nodes == size.nodes
        ]
        assert size.speedup == pytest.approx(off_ms * max(rates))
    assert found.best.speedup == max(size.speedup for size in found.sizes)


def test_the_next_node_is_one_of_a_tree_that_contains_this_one() -> None:
    trace = latent_trace(2, num_prompts=32, length=60, phi=0.9)
    space, cost = TreeSpace.of(trace, 12), FakeCost(pad=8, per_level_ms=0.3, per_token_ms=0.02)
    found = trials(space, cost, 2)
    best = best_of_sizes(found.values())
    sizes = scaling(space, cost, 2).sizes
    falls = 0
    for size, trial in zip(sizes[:-1], best[:-1], strict=True):
        nested = [
            found[tree].tokens_per_step / trial.tokens_per_step - 1
            for tree in found
            if tree.num_nodes == trial.tree.num_nodes + 1
            and set(trial.tree.paths) < set(tree.paths)
        ]
        assert size.gain in [pytest.approx(gain) for gain in nested]
        assert size.gain is not None
        assert size.gain > -0.01
        falls += best[size.nodes + 1].tokens_per_step < trial.tokens_per_step
    # the fastest trees of neighbouring sizes do not contain each other: some emit fewer tokens
    assert falls
    assert sizes[-1].gain is None


def test_bands_hold_what_they_are_around() -> None:
    trace = latent_trace(0, num_prompts=32, length=60)
    space, cost = TreeSpace.of(trace, 6), FakeCost(spread=0.1)
    bands = Bands.of(space, cost)
    for trial in trials(space, cost, 1).values():
        banded = bands.around(1, trial)
        low, high = banded.tokens
        assert low <= trial.tokens_per_step <= high
        assert (low < high) == (trial.tree != OFF)
        assert banded.step_ms[0] < trial.step_ms < banded.step_ms[1]


def test_sizes_that_do_not_fit_are_left_out() -> None:
    memory = memory_for(Tree.chain(3), 2)
    space = perfect_chain()
    assert memory.excess(2, Tree.chain(4)) > 0
    cost = FakeCost(pad=16, per_level_ms=0.0)
    assert scaling(space, cost, 2, memory).best.nodes == 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = make_table(target="toy-target", draft="toy-draft")
    write_library(tmp_path / "stree-data", table, make_trace("toy-target", "toy-draft"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["stree-tune", "analyze", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, *capsys.readouterr()


def test_the_verb(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--plot", "tree.svg", "--json")
    code, out, err = run(monkeypatch, capsys, *asked)
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    assert max(map(len, lines)) <= 80
    document = json.loads(last)
    measured, *others = document["cases"]
    assert {case["estimated"] for case in others} == {"step times estimated"}
    carried = next(case for case in others if case["gpu"] == "h100")
    assert (measured["gpu"], measured["estimated"]) == ("h200", "")
    assert (carried["gpu"], carried["estimated"]) == ("h100", "step times estimated")
    estimated = next(line for line in lines if line.startswith("h100"))
    assert estimated.count("≈") == len(measured["batch_sizes"])
    assert not any("≈" in line for line in lines if line.startswith("h200"))
    for scale in measured["batch_sizes"]:
        best = max(scale["sizes"], key=lambda size: size["speedup"])
        assert scale["break_even_nodes"] == best["nodes"]
        assert f"batch size {scale['batch_size']}:" in out
        assert scale["sizes"][-1]["gain"] is None
    code, _, err = run(monkeypatch, capsys, *asked[:-3], "--plot", "tree.jpg")
    assert code == 2
    assert ".html or .svg" in err
    code, _, err = run(monkeypatch, capsys, "--gpu", "h200")
    assert code == 2
    assert "--dataset" in err


def test_a_trace_of_few_prompts_is_called_unreliable_and_an_empty_one_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(analyze, "_other_gpus", lambda *_: [])
    table = make_table(target="toy-target", draft="toy-draft")
    asked = ("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--json")
    few = make_trace("toy-target", "toy-draft", num_prompts=2)
    write_library(folder / "stree-data", table, few)
    code, out, _ = run(monkeypatch, capsys, *asked)
    assert code == 0
    assert "tokens per step are unreliable: only 2 prompts" in " ".join(out.split())
    assert json.loads(out.splitlines()[-1])["reliable"] is False
    nothing = make_trace("toy-target", "toy-draft", num_prompts=2, length=0)
    write_library(folder / "stree-data", table, nothing)
    code, _, err = run(monkeypatch, capsys, *asked)
    assert code != 0
    assert "the trace has none; record it again" in err


def test_prompts_without_output_are_not_resampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resample of such prompts alone has no rate."""
    monkeypatch.setattr(analyze, "_other_gpus", lambda *_: [])
    trace = make_trace("toy-target", "toy-draft", num_prompts=2)
    meta = trace.meta.model_copy(update={"num_prompts": 4})
    offsets = np.append(trace.offsets, [trace.offsets[-1]] * 2)
    mostly_empty = replace(trace, offsets=offsets, meta=meta)
    table = make_table(target="toy-target", draft="toy-draft")
    write_library(folder / "stree-data", table, mostly_empty)
    code, _, err = run(
        monkeypatch, capsys, "--gpu", "h200", "--dataset", "gsm8k", *TOY, "--plot", "tree.svg"
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("gpu", "estimated"), [("h200", False), ("h100", True)])
def test_the_picture_shows_every_batch_size_and_marks_estimates(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: str,
    estimated: bool,
) -> None:
    # other GPUs fill a table, and take their time
    monkeypatch.setattr(analyze, "_other_gpus", lambda *_: [])
    asked = ("--gpu", gpu, "--dataset", "gsm8k", *TOY)
    for name in ("tree.html", "tree.svg"):
        assert run(monkeypatch, capsys, *asked, "--plot", name)[0] == 0
    page = (folder / "tree.html").read_text()
    drawing = ElementTree.fromstring((folder / "tree.svg").read_text())
    sizes = re.findall(r"Batch size (\d+):", page)
    assert len(sizes) >= 2
    svg = "{http://www.w3.org/2000/svg}svg"
    assert page.count('<svg width="340"') == len(drawing.findall("svg") + drawing.findall(svg))
    assert page.count('<svg width="340"') == 3 * len(set(sizes))
    for words in ("tree-line", "chain-line", "band", "ray", "1×"):
        assert words in page
    # steps of this GPU were measured, those of the other were not
    assert ("measured with" in page) is not estimated
    assert ("Estimated. Milliseconds" in page) is estimated
    assert ("≈ step times are estimated" in page) is estimated
    assert not re.search(r"<script|url\(|@import|https?://(?!www\.w3\.org)", page)
