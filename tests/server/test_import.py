"""Importing results: what is recognised, what is derived, what is warned of, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_results import SGLANG_INFO, metrics_text, response, sglang_line, vllm_result

from stree_autotune.server.gather import Imported, Names, import_files
from stree_core.errors import ConfigError

NAMES = Names(gpu="h100", dataset="mine")
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write content as JSON, or text as it is, under a name."""

    def make(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make


def load(write: Write, *contents: Any, names: Names = NAMES) -> Imported:
    return import_files([write(f"{i}.json", each) for i, each in enumerate(contents)], names)


def refusal(write: Write, *contents: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write, *contents)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_a_vllm_result_gives_step_time_and_rates_by_position(write: Write) -> None:
    found = load(write, vllm_result(tokens=2), vllm_result(tokens=0))
    assert found.table is not None
    assert found.acceptance is not None
    off, chain = found.table.cells
    assert (off.draft_tokens, chain.draft_tokens) == (0, 2)
    assert off.step_ms == (10.0,)
    assert chain.step_ms[0] == pytest.approx(8.0 * 2.1)
    assert found.acceptance.marginal_rates(2) == pytest.approx((0.7, 0.4))
    assert found.table.served.version == "0.33.0"
    assert found.table.served.date == "20261129"


def test_a_sweep_s_summary_is_a_list_of_results(write: Write) -> None:
    found = load(write, [vllm_result(tokens=0), vllm_result(tokens=1)])
    assert found.table is not None
    assert [cell.draft_tokens for cell in found.table.cells] == [0, 1]


def test_rounds_are_numbered_where_results_do_not_say(write: Write) -> None:
    found = load(write, vllm_result(tokens=0), vllm_result(tokens=0), vllm_result(tokens=0))
    assert found.table is not None
    assert found.table.cells[0].rounds == (1, 2, 3)


def test_chunks_that_disagree_with_counters_are_a_finding(write: Write) -> None:
    found = load(write, vllm_result(tokens=2, mean_itl_ms=25.0))
    assert any("a streamed chunk takes 25 ms" in text for text in found.findings)


def test_sglang_lines_take_recorded_step_times(write: Write) -> None:
    lines = "\n".join(json.dumps(sglang_line(tokens, 4)) for tokens in (0, 3))
    found = import_files([write("r.jsonl", lines)], NAMES)
    assert found.table is not None
    off, chain = found.table.cells
    assert off.step_ms == (12.0,)
    assert chain.step_ms == (18.0,)
    assert found.table.served.method == "mtp"
    assert found.acceptance is not None
    assert found.acceptance.runs[0].tokens_per_step == pytest.approx(2.0, rel=1e-3)


def test_metrics_of_one_server_are_subtracted(write: Write) -> None:
    before = write("k2-before.prom", metrics_text(100, 2, (50, 20)))
    after = write("k2-after.prom", metrics_text(1100, 2, (750, 420)))
    found = import_files([before, after], Names("h100", "target", "draft", "", "mine"))
    assert found.table is None
    assert found.acceptance is not None
    assert found.acceptance.marginal_rates(2) == pytest.approx((0.7, 0.4))


def test_a_restart_between_scrapes_is_refused(write: Write) -> None:
    before = write("k2-before.prom", metrics_text(100, 2, (50, 20)))
    after = write("k2-after.prom", metrics_text(90, 2, (60, 30)))
    with pytest.raises(ConfigError, match="falls from 100 to 90, so the server was restarted"):
        import_files([before, after], NAMES)


@pytest.mark.parametrize("kind", ["vllm", "aiperf", "sglang"])
def test_records_of_requests_give_rates_by_position(write: Write, kind: str) -> None:
    path = write("records.jsonl", "\n".join(json.dumps(response(kind)) for _ in range(3)))
    found = import_files([path], Names("h100", "target", "draft", "", "mine"))
    assert found.acceptance is not None
    assert found.acceptance.marginal_rates(2) == pytest.approx((0.7, 0.4))


def test_the_answer_of_server_info_alone_is_no_acceptance(write: Write) -> None:
    assert "no file has a run or an acceptance" in refusal(write, SGLANG_INFO)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"accepted": (0, 0)}, "accept length is exactly 1.000"),
        ({"accepted": (700, 0)}, "position 2 never accepts"),
        ({"median_itl_ms": 10.0}, "prefill of new requests is part of them"),
    ],
)
def test_warnings_are_findings(write: Write, change: dict[str, Any], finding: str) -> None:
    found = load(write, vllm_result(tokens=2, **change))
    assert any(finding in text for text in found.findings)
    assert found.acceptance is not None
    assert any(finding in text for text in found.acceptance.findings)


def test_runs_with_less_concurrency_than_asked_are_left_out(write: Write) -> None:
    capped = vllm_result(tokens=2, batch_size=8, output_throughput=3 * 1000 / 8.0)
    found = load(write, vllm_result(tokens=0, batch_size=8), capped)
    assert found.table is not None
    assert [cell.draft_tokens for cell in found.table.cells] == [0]
    assert any("only 3.0 of 8 requests decode at once" in text for text in found.findings)


def test_a_table_of_k_by_batch_size_dilutes_and_is_left_out(write: Write) -> None:
    changed = vllm_result(tokens=4, drafted=2500)
    found = load(write, vllm_result(tokens=0), changed)
    assert found.acceptance is None
    assert any("K changed while it ran" in text for text in found.findings)


def test_a_throttled_run_is_left_out(write: Write) -> None:
    slow = vllm_result(tokens=0, mean_tpot_ms=13.0, mean_itl_ms=13.0)
    usual = [vllm_result(tokens=0, mean_tpot_ms=10 + 0.01 * i) for i in range(4)]
    found = load(write, *usual, slow)
    assert found.table is not None
    assert len(found.table.cells[0].step_ms) == 4
    assert any("throttled" in text for text in found.findings)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([vllm_result(tokens=0), vllm_result(tokens=0, server_version="0.34.0")], "of one version"),
        ([vllm_result(tokens=0), vllm_result(tokens=0, model_id="other")], "of one target model"),
        ([vllm_result(tokens=0, mean_tpot_ms=math.nan)], "finite mean_tpot_ms"),
        ([vllm_result(tokens=0, mean_tpot_ms=-1.0)], "finite mean_tpot_ms"),
        ([vllm_result(tokens=0, mean_tpot_ms=1e-3)], "must be in milliseconds"),
        ([vllm_result(tokens=0, mean_tpot_ms="10")], "needs a number in mean_tpot_ms"),
        ([vllm_result(tokens=0, failed=3)], "every request must succeed"),
        ([vllm_result(tokens=0, max_concurrency=None)], "without --max-concurrency"),
        ([vllm_result(tokens=0, stree_k="3")], "has no spec_decode_num_drafts"),
        ([vllm_result(tokens=2, stree_k="0")], "named a run with K = 0"),
        ([vllm_result(tokens=0), vllm_result(tokens=0, total_input_tokens=1 << 20)], "one length"),
        ([sglang_line(3, 4, topk=4)], "runs must be chains"),
        ([sglang_line(3, 4, accept_length=9.0)], "accept_length is at most K + 1"),
        ([sglang_line(3, 4, step_s=18.0)], "step_time_dict is in seconds"),
        ([{"some": "thing"}], "no format that is known here"),
        ([[1, 2, 3]], "must hold JSON objects"),
        ([vllm_result(tokens=0), sglang_line(0, 4)], "of one"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    write: Write, contents: list[Any], message: str
) -> None:
    assert message in refusal(write, *contents)


def test_damaged_and_huge_files_are_refused(write: Write, tmp_path: Path) -> None:
    cut = json.dumps(vllm_result(tokens=2))[:-40]
    assert "cut short" in refusal(write, cut)
    assert "neither JSON nor Prometheus" in refusal(write, "batch,ms\n1,2\n")
    assert "at most 100000 records" in refusal(write, "{}\n" * 1_000_000)
    assert "nests too deeply" in refusal(write, "[" * 100_000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="must be text in UTF-8"):
        import_files([tmp_path / "bytes"], NAMES)
    with pytest.raises(ConfigError, match="cut short or damaged at"):
        import_files(
            [write("a.prom", metrics_text(10, 1, (5,)) + "vllm:spec_decode_num_dra")], NAMES
        )


def test_the_gpu_and_the_dataset_are_asked_for(write: Write) -> None:
    with pytest.raises(ConfigError, match="no file says the GPU"):
        load(write, vllm_result(tokens=0), names=Names())
    with pytest.raises(ConfigError, match="acceptance belongs to a dataset"):
        load(write, vllm_result(tokens=1), names=Names(gpu="h100"))


@pytest.mark.parametrize(
    ("ms", "finding"),
    [(16.5, ""), (9.0, "the rest is spent between iterations"), (25.0, "log is of another run")],
)
def test_a_log_of_iterations_is_a_second_opinion(write: Write, ms: float, finding: str) -> None:
    lines = [
        f"Engine 000: Iteration({i}): 0 context requests, 0 context tokens, 1 generation "
        f"requests, 3 generation tokens, iteration elapsed time: {ms:.2f} ms, CPU KV cache: 1%"
        for i in range(30)
    ]
    prefill = "Iteration(1): 1 context requests, 64 context tokens, 0 generation requests, "
    lines.append(f"{prefill}0 generation tokens, iteration elapsed time: 500.00 ms")
    log = write("server.log", "\n".join(lines))
    found = import_files([write("a.json", vllm_result(tokens=2)), log], NAMES)
    told = [text for text in found.findings if "log of iterations" in text]
    assert bool(told) == bool(finding)
    assert finding in "".join(told)
