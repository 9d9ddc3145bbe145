"""Of several drafts the one is kept that is fastest over all batch sizes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from synthetic_data import make_profile, make_table, make_trace, write_library

from stree_autotune.cli.commands import main
from stree_autotune.search.draft_choice import TunedDraft, at_common_sizes, choose
from stree_autotune.search.study import open_storage
from stree_autotune.store.library import trace_file_name
from stree_autotune.store.runtime_table import load_runtime_table, save_runtime_table
from stree_autotune.trace.file import NO_RANK, save_trace
from stree_core.errors import MissingMeasurement
from stree_core.profile import Interval, Sampling, load_profile

ASKED = ("--gpu", "h200", "--dataset", "gsm8k", "--target", "toy-target", "--max-nodes", "8")
SIZES = ("--batch-size", "1", "--batch-size", "8")


def tune(
    patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], *more: str
) -> tuple[object, str]:
    patch.setattr(sys, "argv", ["stree-tune", *ASKED, *SIZES, *more])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capture.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two drafts at one price: that of all tests, and one that misses every second position."""
    for draft, first_miss in (("good-draft", None), ("poor-draft", 0)):
        trace = make_trace("toy-target", draft)
        if first_miss is not None:
            trace.ranks[first_miss::2] = NO_RANK
        table = make_table(target="toy-target", draft=draft)
        write_library(tmp_path / "stree-data", table, trace)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("names", ["poor-draft,good-draft", "good-draft,poor-draft"])
def test_the_best_draft_is_kept(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    names: str,
) -> None:
    caplog.set_level("INFO")
    assert tune(monkeypatch, capsys, "--draft", names)[0] == 0
    profile = load_profile(folder / "stree-profile.yaml")
    assert profile.draft.name == "good-draft"
    assert "draft poor-draft 1." in caplog.text
    assert (
        profile.sources.trace.note == "good-draft 1.803x off, chosen beside poor-draft 1.412x off"
    )
    assert tune(monkeypatch, capsys, "--draft", "poor-draft")[0] == 0
    assert load_profile(folder / "stree-profile.yaml").draft.name == "poor-draft"


def test_a_draft_without_room_loses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "stree-data" / "runtime" / "h200--toy-target--good-draft.yaml"
    table = load_runtime_table(path)
    huge = table.draft.model_copy(update={"held_bytes": 200 * 10**9})
    save_runtime_table(table.model_copy(update={"draft": huge}), path)
    assert tune(monkeypatch, capsys, "--draft", "good-draft,poor-draft")[0] == 0
    profile = load_profile(folder / "stree-profile.yaml")
    assert profile.draft.name == "poor-draft"
    assert "beside good-draft 1.000x off" in (profile.sources.trace.note or "")
    assert {row.verdict for row in profile.policy} <= {"chain", "tree"}


def test_drafts_and_rules_are_categories_of_a_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rule, misses in (("naive", 4), ("mss", 9)):
        trace = make_trace("toy-target", "good-draft")
        trace.ranks[::misses] = NO_RANK
        sampling = Sampling(rule=rule, temperature=1.0)  # type: ignore[arg-type]
        meta = trace.meta.model_copy(update={"sampling": sampling})
        name = trace_file_name("toy-target", "good-draft", "gsm8k", sampling.label)
        save_trace(replace(trace, meta=meta), folder / "stree-data" / "traces" / name)
    asked = ("--draft", "good-draft", "--temperature", "1", "--storage", "studies.log")
    assert tune(monkeypatch, capsys, *asked, "--rule", "naive,mss")[0] == 0
    profile = load_profile(folder / "stree-profile.yaml")
    assert profile.sampling.rule == "mss"
    assert (profile.sources.trace.note or "").startswith("good-draft mss 1.")
    storage = open_storage("studies.log")
    name = "drafts of toy-target on h200, gsm8k: good-draft by naive, mss"
    study = optuna.load_study(study_name=name, storage=storage)
    assert [trial.params["rule"] for trial in study.trials] == ["naive", "mss"]
    assert study.best_trial.params == {"draft": "good-draft", "rule": "mss"}
    # another question in the same storage is a study of its own
    assert tune(monkeypatch, capsys, *asked, "--rule", "mss,naive")[0] == 0
    code, err = tune(monkeypatch, capsys, "--draft", "good-draft", "--rule", "naive,naive")
    assert (code, "list each once" in err) == (2, True)


@pytest.mark.parametrize("names", ["good-draft,", "good-draft,good-draft"])
def test_drafts_are_listed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: str
) -> None:
    code, err = tune(monkeypatch, capsys, "--draft", names)
    assert code == 2
    assert "list each once" in err


def tuned(name: str, speedup: float, half_width: float) -> TunedDraft:
    """Return a draft whose every row is so much faster than off, give or take a share."""
    low, high = speedup / (1 + half_width), speedup * (1 + half_width)
    profile = make_profile()
    rows = [
        row.model_copy(
            update={
                "predicted": row.predicted.model_copy(
                    update={"speedup": speedup, "speedup_interval": Interval(low=low, high=high)}
                )
            }
        )
        for row in profile.policy
    ]
    return TunedDraft(name, profile.model_copy(update={"policy": tuple(rows)}))


@pytest.mark.parametrize(
    ("head", "sibling", "expected"),
    [(1.50, 1.55, "mtp"), (1.55, 1.50, "mtp"), (1.30, 1.55, "sibling"), (1.8, 1.55, "mtp")],
)
def test_the_head_wins_a_tie(head: float, sibling: float, expected: str) -> None:
    """It needs no second model."""
    drafts = [tuned("sibling", sibling, 0.05), tuned("mtp", head, 0.05)]
    for order in (drafts, drafts[::-1]):
        assert choose(order).name == expected


def test_drafts_are_compared_where_all_were_measured(caplog: pytest.LogCaptureFixture) -> None:
    """A draft of one good batch size does not beat another that is better there."""
    wide, narrow = tuned("wide", 1.2, 0.01), tuned("narrow", 1.3, 0.01)
    first, *rest = wide.profile.policy
    assert rest
    best = first.model_copy(update={"predicted": tuned("", 1.35, 0.01).profile.policy[0].predicted})
    wide = replace(wide, profile=wide.profile.model_copy(update={"policy": (best, *rest)}))
    narrow = narrow.at([first.batch_size])
    assert choose([wide, narrow]).name == "narrow"
    assert choose(at_common_sizes([wide, narrow])).name == "wide"
    assert f"at batch sizes {first.batch_size} alone" in caplog.text
    with pytest.raises(MissingMeasurement, match="share none; tune one at a time"):
        at_common_sizes([narrow, wide.at([rest[0].batch_size])])


def test_naive_sampling_wins_a_tie_with_mss() -> None:
    rules = []
    for name, rule, speedup in (("mtp", "mss", 1.5), ("mtp", "naive", 1.48), ("a", "naive", 1.51)):
        draft = tuned(name, speedup, 0.05)
        sampling = Sampling(rule=rule, temperature=1.0)  # type: ignore[arg-type]
        profile = draft.profile.model_copy(update={"sampling": sampling})
        rules.append(TunedDraft(name, profile, rule))
    assert choose(rules) is rules[1]
    assert rules[1].words == "mtp naive 1.480x off"


def test_among_siblings_the_fastest_wins() -> None:
    assert choose([tuned("a", 1.50, 0.05), tuned("b", 1.51, 0.05)]).name == "b"
