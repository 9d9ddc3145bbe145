"""What a real vLLM wrote (`make server-test`, recorded with --record), as it is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stree_autotune.server.counters import read_metrics
from stree_autotune.server.files import read_documents
from stree_autotune.server.gather import Imported, Names, import_files
from stree_autotune.server.tables import log_spread

RECORDED = Path(__file__).with_name("recorded")
RESULTS = RECORDED / "vllm-0.32.0.jsonl"
SCRAPES = [RECORDED / "k2-r1-before.prom", RECORDED / "k2-r1-after.prom"]


@pytest.fixture(scope="module")
def recorded() -> Imported:
    """The recorded results and scrapes, imported together."""
    return import_files([RESULTS, *SCRAPES], Names(dataset="random"))


def test_results_say_whose_they_are(recorded: Imported) -> None:
    assert recorded.table is not None
    served = recorded.table.served
    assert (served.server, served.gpu, served.method) == ("vllm", "cpu", "draft_model")
    assert served.version.startswith("0.32.0")
    assert served.date.startswith("2026")


def test_chunks_counters_and_scrapes_agree(recorded: Imported) -> None:
    told = " ".join(recorded.findings)
    assert "a streamed chunk takes" not in told
    assert "it counts other requests as well" not in told
    assert "K changed" not in told
    (scraped,) = read_metrics([each for path in SCRAPES for each in read_documents(path)])
    assert recorded.acceptance is not None
    runs = [r for r in recorded.acceptance.runs if (r.draft_tokens, r.round) == (2, 1)]
    assert scraped.draft_tokens == 2
    assert scraped.steps == sum(run.steps for run in runs)
    assert scraped.accepted == sum(run.accepted for run in runs)


def test_every_k_and_concurrency_is_a_cell(recorded: Imported) -> None:
    assert recorded.table is not None
    assert recorded.table.batch_sizes == (1, 4)
    for size in (1, 4):
        assert recorded.table.draft_tokens_at(size) == (0, 1, 2, 4)
    for cell in recorded.table.cells:
        assert cell.spread == pytest.approx(log_spread(cell.step_ms), rel=1e-3, abs=1e-4)


def test_rates_fall_with_the_position_and_agree_over_k(recorded: Imported) -> None:
    assert recorded.acceptance is not None
    rates = {tokens: recorded.acceptance.marginal_rates(tokens) for tokens in (1, 2, 4)}
    assert list(rates[4]) == sorted(rates[4], reverse=True)
    assert 0.5 < rates[1][0] < 0.8
    assert rates[4][0] == pytest.approx(rates[1][0], abs=0.15)


def test_fixtures_are_small_and_tell_no_machine() -> None:
    for path in RECORDED.iterdir():
        text = path.read_text()
        assert len(text) < 64 << 10
        assert "/tmp" not in text
        assert "/home" not in text
    lines = RESULTS.read_text().splitlines()
    assert all(json.loads(line)["tokenizer_id"] == "target" for line in lines)
