"""What a report says of prompts: numbers checked by hand, and where it says nothing."""

from __future__ import annotations

import pytest

from stree_autotune.report.data import Evidence, find_evidence
from stree_autotune.report.prompts import prompts_figure, requests_figure
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import PromptPoint, RuntimeTable
from stree_core.profile import Profile, load_profile

NAME = "h200--demo-target--demo-draft--demo"
POINTS = (
    PromptPoint("target", 1, 1000, 20.0, 0.1),
    PromptPoint("pair", 1, 1000, 25.0, 0.1),
    PromptPoint("target", 8, 1000, 80.0, 0.1),
    PromptPoint("pair", 8, 1000, 100.0, 0.1),
    PromptPoint("pair", 8, 64, 8.0, 0.1),
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(shipped_root() / "tuned" / f"{NAME}.yaml")


@pytest.fixture(scope="module")
def evidence(profile: Profile) -> Evidence:
    return find_evidence(profile, Library.open())


def with_prompts(evidence: Evidence) -> RuntimeTable:
    assert evidence.table is not None
    return evidence.table.model_copy(update={"prompts": POINTS})


def test_a_whole_request_gains_less_than_its_output(profile: Profile, evidence: Evidence) -> None:
    table, trace = with_prompts(evidence), evidence.trace
    figure = requests_figure(profile, table, trace)
    assert figure is not None
    assert trace is not None
    output = trace.num_positions / trace.num_prompts
    speculating = [row for row in profile.policy if row.verdict != "off"]
    assert len(figure.rows) == len(speculating)
    assert figure.headers[2:] == ("prompt of 1,000 tokens",)
    for row, (size, alone, whole) in zip(speculating, figure.rows, strict=True):
        # A prompt is read by itself up to batch size 7, and as one of eight from there on.
        target_ms, pair_ms = (20.0, 25.0) if row.batch_size < 8 else (10.0, 12.5)
        fast = row.predicted.tokens_per_s
        off_ms = target_ms + 1e3 * output * row.predicted.speedup / fast
        gain = off_ms / (pair_ms + 1e3 * output / fast) - 1
        assert size == str(row.batch_size)
        assert float(whole.rstrip(" %").replace("−", "-")) == pytest.approx(100 * gain, abs=0.51)
        assert gain < row.predicted.speedup - 1
        assert alone.startswith("+")


def test_the_numbers_behind_prompts_are_the_tables(evidence: Evidence) -> None:
    figure = prompts_figure(with_prompts(evidence))
    assert figure is not None
    assert ("target and draft", "8", "1,000", "100", "80,000") in figure.rows
    assert len(figure.rows) == len(POINTS)


def test_nothing_is_said_without_prompts(profile: Profile, evidence: Evidence) -> None:
    assert evidence.table is not None
    bare = evidence.table.model_copy(update={"prompts": ()})
    assert prompts_figure(bare) is None
    assert requests_figure(profile, bare, evidence.trace) is None
    assert requests_figure(profile, with_prompts(evidence), None) is None
