"""plan, import, tuning with --server and the export back, on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from server_results import sglang_line, vllm_result
from synthetic_server import SyntheticServer

from stree_autotune.cli.commands import main
from stree_autotune.server.tables import load_server_acceptance, load_server_table
from stree_core.profile import load_profile

PAIR = ("--gpu", "h100", "--dataset", "mine")
Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Call:
    """Call the command line in a folder of its own; return exit code, stdout, log and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def make(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["stree-tune", *words])
        caplog.clear()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
        return left.value.code, out, "\n".join([*warnings, err])

    return make


@pytest.fixture
def imported(call: Call, tmp_path: Path) -> Call:
    """A command line whose folder has the tables of a synthetic server."""
    (tmp_path / "results").mkdir()
    files = SyntheticServer(5).write(tmp_path / "results")
    code, out, _ = call("import", *map(str, files), *PAIR)
    assert code == 0
    assert "wrote stree-data/servers/h100--vllm--target--draft.times.yaml" in out
    return call


def test_import_writes_a_table_and_an_acceptance(imported: Call, tmp_path: Path) -> None:
    folder = tmp_path / "stree-data" / "servers"
    table = load_server_table(folder / "h100--vllm--target--draft.times.yaml")
    assert table.batch_sizes == (1, 2, 4, 8, 16, 32, 64)
    accepted = load_server_acceptance(folder / "h100--vllm--target--draft--mine.acceptance.yaml")
    rates = accepted.marginal_rates(8)
    assert rates == pytest.approx(SyntheticServer(5).rates, abs=0.02)
    result = next((tmp_path / "results").iterdir())
    code, _, err = imported("import", str(result), *PAIR)
    assert code == 2
    assert "exists already; pass --force" in err


def test_tuning_says_whose_times_they_are(imported: Call) -> None:
    code, out, _ = imported("--server", "vllm", *PAIR)
    assert code == 0
    lines = out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.lstrip().startswith("64 "))
    assert lines[place + 1 : place + 3] == ["", "measured on vLLM 0.33.0, 2026-11-14"]
    assert any(line.startswith("to measure next: ") for line in lines)
    profile = load_profile("stree-profile.yaml")
    assert profile.server is not None
    assert (profile.server.name, profile.server.method) == ("vllm", "draft_model")
    assert not profile.estimated


def test_typed_rates_are_marked(imported: Call) -> None:
    code, out, _ = imported("--server", "vllm", "--rates", "0.8,0.6,0.4", "--json")
    assert code == 0
    assert "acceptance: estimated, rates (typed: 0.8, 0.6, 0.4)" in out
    document = json.loads(out.splitlines()[-1])
    assert {row["predicted"]["tokens_per_step"] for row in document["policy"]} <= {
        1.0, 1.8, 2.4, 2.8
    }  # fmt: skip


def test_a_trace_can_give_the_acceptance(imported: Call) -> None:
    trace = "demo-target--demo-draft--gsm8k--greedy"
    code, out, _ = imported("--server", "vllm", "--acceptance-from", trace)
    assert code == 0
    borrowed = "borrowed from demo-target + demo-draft, gsm8k, walked as chains"
    assert f"gsm8k (estimated, {borrowed})" in " ".join(out.split())
    assert load_profile("stree-profile.yaml").estimated
    code, out, _ = imported("export", "stree-profile.yaml", "--to", "sglang", "--draft", "a/b")
    assert code in (0, 1)


@pytest.mark.parametrize(
    "words",
    [
        ("--max-token-ms", "8"), ("--max-nodes", "1"), ("--context", "2048"), ("--trials", "3"),
        ("--prefer", "fast"), ("--top-k", "4"), ("--measure",), ("--storage", "here.log"),
    ],
)  # fmt: skip
def test_what_changes_nothing_on_a_server_is_refused(
    imported: Call, words: tuple[str, ...]
) -> None:
    code, _, err = imported("--server", "vllm", *PAIR, *words)
    assert code == 2
    assert f"{words[0]} changes none of them; drop it" in err


def test_acceptance_that_a_server_counted_is_exported(imported: Call) -> None:
    imported("--server", "vllm", *PAIR)
    for name in ("vllm-synthetic", "aiconfigurator", "dynamo"):
        code, out, _ = imported("export", "stree-profile.yaml", "--to", name)
        assert code == 0
        if name == "vllm-synthetic":
            rates = json.loads(out)["synthetic_acceptance_rates"]
            truth = SyntheticServer(5).rates[: len(rates)]
            assert rates == pytest.approx(truth, abs=0.02)
    code, _, err = imported("export", "stree-profile.yaml", "--to", "speculation-profile")
    assert code == 2
    assert "a server measured it; tune without --server" in err


@pytest.mark.parametrize("verb", ["decode", "validate"])
def test_our_engine_refuses_a_server_s_profile(imported: Call, verb: str) -> None:
    imported("--server", "vllm", *PAIR)
    more = ("--prompt", "a") if verb == "decode" else ()
    code, _, err = imported(verb, *more)
    assert code == 2
    assert "its times are those of vllm 0.33.0" in err
    assert "`stree-tune export stree-profile.yaml --to vllm`" in err


def test_exports_are_the_measured_settings(imported: Call) -> None:
    imported("--server", "vllm", *PAIR)
    pair = ("--target", "org/target", "--draft", "org/draft")
    code, out, err = imported("export", "stree-profile.yaml", "--to", "vllm", *pair)
    assert code == 0
    assert err.splitlines()[0].startswith("note: times were measured on vLLM 0.33.0, 2026-11-14")
    config = json.loads(out)
    rows = load_profile("stree-profile.yaml").policy
    counts = {row.batch_size: row.tree.build().num_nodes for row in rows}
    for first, last, count in config["num_speculative_tokens_per_batch_size"]:
        assert all(counts[size] == count for size in counts if first <= size <= last)
    code, out, err = imported("export", "stree-profile.yaml", "--to", "sglang", *pair)
    assert code == 0
    assert "stree's own decoder" not in err + out
    assert "times are vLLM's, not SGLang's" in err
    assert "--max-running-requests 64" in err


def test_a_head_is_exported_without_a_model(call: Call, tmp_path: Path) -> None:
    lines = "\n".join(
        json.dumps(sglang_line(tokens, size)) for tokens in (0, 3) for size in (1, 4, 16)
    )
    (tmp_path / "r.jsonl").write_text(lines)
    assert call("import", "r.jsonl", *PAIR)[0] == 0
    assert call("--server", "sglang", *PAIR)[0] == 0
    code, out, _ = call("export", "stree-profile.yaml", "--to", "sglang", "--target", "org/t")
    assert code == 0
    assert "--speculative-algorithm NEXTN" in out
    assert "draft-model-path" not in out
    config = json.loads(call("export", "stree-profile.yaml", "--to", "vllm")[1])
    assert config == {"method": "mtp", "num_speculative_tokens": 3}


def test_findings_go_to_stderr_and_into_json(call: Call, tmp_path: Path) -> None:
    results = [vllm_result(0), vllm_result(2, accepted=(0, 0))]
    (tmp_path / "r.json").write_text(json.dumps(results))
    code, out, err = call("import", "r.json", *PAIR, "--json")
    assert code == 0
    assert "finding: K = 2: accept length is exactly 1.000" in err
    assert any("exactly 1.000" in text for text in json.loads(out.splitlines()[-1])["findings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--smooth",), "--smooth belongs to --server"),
        (("--rates", "0.5"), "--rates 0.5 --gpu h100`"),
        (("--server", "tgi", *PAIR), "--server is vllm or sglang, got tgi"),
        (("--server", "sglang", *PAIR), "make one with `stree-tune plan --server sglang"),
        (("--server", "vllm", "--gpu", "h100"), "pass one of them"),
        (("--server", "vllm", "--rates", "0.5", "--acceptance-from", "x"), "drop one"),
        (("--server", "vllm", "--gpu", "h100", "--dataset", "other"), "`stree-tune import FILES"),
        (("--server", "vllm", *PAIR, "--batch-size", "128"), "not 128; run the plan"),
        (("plan", "--target", "t"), "pass --gpu"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    imported: Call, words: tuple[str, ...], message: str
) -> None:
    code, _, err = imported(*words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_plan_is_written_and_not_replaced(call: Call, tmp_path: Path) -> None:
    words = ("plan", "--target", "org/t", "--gpu", "h100", "--batch-size", "2", "-o", "plan.sh")
    code, out, _ = call(*words)
    assert code == 0
    assert out.startswith("plan.sh: about ")
    assert 'SIZES=${SIZES:-"2"}' in (tmp_path / "plan.sh").read_text()
    code, _, err = call(*words)
    assert code == 2
    assert "plan.sh exists already" in err
    assert call(*words[:-2])[1].startswith("#!/bin/sh")
