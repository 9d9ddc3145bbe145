"""Rows of the coverage benchmark: shares of the rows that are not off, pooled by pair."""

from __future__ import annotations

from scripts import script

coverage = script("coverage")


def test_rows_count_only_what_is_not_off() -> None:
    def outcome(size: int, truth: float, *, off: bool = False) -> object:
        return coverage.Outcome("toy", size, off, truth, (1.0, 1.2), 0.02)

    outcomes = [
        outcome(1, 1.1),
        outcome(1, 0.9),  # below the interval, and slower than off
        outcome(1, 1.3),
        outcome(1, 1.05),
        outcome(8, 1.0, off=True),
    ]
    rows = {row["batch"]: row for row in coverage.rows_of("toy", outcomes)}
    shares = {"coverage": 0.5, "optimistic": 0.25, "pessimistic": 0.25, "wrong": 0.25}
    assert {name: rows[1][name] for name in shares} == shares
    assert (rows[8]["repeats"], rows[8]["decided"], rows[8]["coverage"]) == (1, 0, None)
    assert (rows["all"]["repeats"], rows["all"]["decided"]) == (5, 4)
    assert {name: rows["all"][name] for name in shares} == shares
    assert rows["all"]["regret"] == 0.02


def test_populations_have_names_of_their_own() -> None:
    assert len(coverage.known()) == len(coverage.SHIPPED) + len(coverage.SYNTHETIC)
