"""Sizes that pay and sizes that do not: known answers, the verb, its picture and its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from synthetic import FakeCost, latent_trace, trace_of
from synthetic_data import make_table, make_trace, memory_for, write_library

from stree_autotune.cli.commands import main
from stree_autotune.report.analyze import Scaling, scaling
from stree_autotune.search.tree_space import TreeSpace
from stree_autotune.trace.tree_walk import walk
from stree_core.extras import install_command
from stree_core.tree import OFF, Tree

TOY = ("--target", "toy-target", "--draft", "toy-draft", "--max-nodes", "12")


def perfect_chain() -> TreeSpace:
    """Return a space in which the first child is always right: only depth helps."""
    return TreeSpace.of(trace_of([[0] * 90] * 8, 4), 8)


def test_a_perfect_draft_pays_for_every_node_it_has_time_for() -> None:
    free = scaling(perfect_chain(), FakeCost(pad=16, per_level_ms=0.0), 1)
    assert free.best.nodes == 8
    assert free.beyond is None
    assert "raise --max-nodes" in free.sentence()
    for before, size in zip(free.sizes, free.sizes[1:], strict=False):
        assert size.gain == pytest.approx(size.tokens_per_step / before.tokens_per_step - 1)
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
    assert found.beyond is not None
    assert found.beyond.nodes == found.best.nodes + 1


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
    document = json.loads(out.splitlines()[-1])
    measured, *others = document["cases"]
    assert {case["estimated"] for case in others} == {"times estimated"}
    carried = next(case for case in others if case["gpu"] == "h100")
    assert (measured["gpu"], measured["estimated"]) == ("h200", "")
    assert (carried["gpu"], carried["estimated"]) == ("h100", "times estimated")
    assert "h100, greedy (times estimated)" in out
    for scale in measured["batch_sizes"]:
        best = max(scale["sizes"], key=lambda size: size["speedup"])
        assert scale["break_even_nodes"] == best["nodes"]
        assert f"batch size {scale['batch_size']}:" in out
    assert (folder / "tree.svg").read_text().startswith("<?xml")
    code, _, err = run(monkeypatch, capsys, *asked[:-3], "--plot", "tree.jpg")
    assert code == 2
    assert ".png or .svg" in err
    code, _, err = run(monkeypatch, capsys, "--gpu", "h200")
    assert code == 2
    assert "--dataset" in err


def test_the_plot_says_what_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = ("--gpu", "h200", "--dataset", "gsm8k", *TOY, "--plot", "tree.png")
    code, _, err = run(monkeypatch, capsys, *asked)
    assert code == 2
    assert install_command("plot") in err
