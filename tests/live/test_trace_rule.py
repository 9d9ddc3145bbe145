"""Steps that accept what a trace says: live decoding and the walk count the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_data import make_trace
from tiny_models import ours, perturbed, tiny_mamba2

from stree_autotune.live.trace_rule import TraceScript, prompt_for
from stree_autotune.trace.tree_walk import walk
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree

LENGTH = 20


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


def test_slots_begin_anywhere_once_they_are_restarted(tmp_path: Path) -> None:
    target = ours(tiny_mamba2(layers=1), tmp_path / "target")
    script = TraceScript(make_trace(num_prompts=8, length=LENGTH), 4, LENGTH, target.device)
    script.start(2, prompt_for(3))
    assert script.position_B.tolist() == [0, 0, 3 * LENGTH, 0]
    script.restart()
    assert len(set(script.position_B.tolist())) > 1
    assert 0 <= int(script.position_B.min()) <= int(script.position_B.max()) < 8 * LENGTH
