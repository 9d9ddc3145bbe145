"""Rows of the regret benchmark: what a pick lacks to the fastest, and who picked it."""

from __future__ import annotations

import pytest
from scripts import script

from stree_autotune.search.study import Trial
from stree_core.tree import Tree

regret = script("regret")


def test_regret_is_what_a_pick_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    off, chain, wide = Tree.chain(0), Tree.chain(2), Tree.from_paths([[0], [1], [0, 0]])
    trials = [
        Trial.at(8, tree, tokens, 2.0) for tree, tokens in ((off, 1.0), (chain, 1.98), (wide, 2.0))
    ]
    picks = {"offline point": wide, "offline verdict": chain, "measured verdict": chain}
    rows = regret.as_rows(trials, dict.fromkeys((off, chain, wide), 0.01), "second", picks)
    assert [row["config"] for row in rows] == ["depth 2 tree of 3", "chain 2", "off"]
    assert [row["regret"] for row in rows] == [0.0, 0.01, 0.5]
    assert [row["live_tokens_per_s"] for row in rows] == [8000.0, 7920.0, 4000.0]
    chosen = [row["chosen_by"] for row in rows]
    assert chosen == ["offline point", "offline verdict, measured verdict", ""]
    for chooser, verdict in (("offline point", "met"), ("measured verdict", "met")):
        regret.print_regret({"pair": "toy", "batch": 8} | rows[1], chooser)
        assert f"{chooser}: chain 2, regret 1.00%" in (out := capsys.readouterr().out)
        assert verdict in out
    regret.print_regret({"pair": "toy", "batch": 8} | rows[2], "offline point")
    assert "missed" in capsys.readouterr().out
