"""The whole line on a tiny pair: probe, trace, tune, validate, decode, through the command line."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from tiny_models import random_texts, save_pair

from stree_autotune.cli.commands import main
from stree_autotune.probe.run import BUDGETS, Budget
from stree_autotune.probe.timing import Effort
from stree_autotune.search.certificate import certificate_path, load_certificate
from stree_autotune.store.runtime_table import load_runtime_table
from stree_autotune.trace.file import load_trace
from stree_core.models.text import load_text_codec
from stree_core.profile import Sampling, load_profile, save_profile

PAIR = ("--target", "tiny-target", "--draft", "tiny-draft")
NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line")
    save_pair(root / "stree-data")
    rows = [json.dumps({"question": text}) for text in random_texts(NUM_PROMPTS)]
    (root / "prompts.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    monkeypatch.chdir(folder)
    for effort in BUDGETS:
        monkeypatch.setitem(BUDGETS, effort, Budget(1.0, Effort(1, 1, 0.0)))
    # A stage probes the pair anew: two show that their parts are put together.
    monkeypatch.setattr("stree_autotune.live.validation._STAGES", 2)
    return Runner(monkeypatch, capsys)


class Runner:
    """Calls the command line; returns exit code, stdout and stderr."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *arguments: str) -> tuple[object, str, str]:
        self._patch.setattr(sys, "argv", ["stree-tune", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *self._capture.readouterr()


def test_from_measurement_to_text(run: Runner) -> None:
    small = ("--batch-size", "1", "--max-nodes", "16", "--context", "128")
    assert run("probe", *PAIR, *small)[0] == 0
    table = load_runtime_table(Path("stree-data/runtime/cpu--tiny-target--tiny-draft.yaml"))
    assert table.weights == "real"
    assert {"verify", "draft_root", "draft", "target_store"} <= {p.term for p in table.points}
    assert {point.work for point in table.rules} == {
        "branch", "sample", "sample_truncated", "draw", "draw_truncated", "try", "tries",
    }  # fmt: skip
    rules = {(step.tree, step.rule) for step in table.steps}
    assert {("off", "greedy"), ("off", "naive"), ("default-12", "mss_truncated")} <= rules

    code, _, err = run("probe", *PAIR, *small)
    assert code == 2
    assert "--force" in err
    more = ("--batch-size", "2", "--max-nodes", "2", "--context", "128", "--effort", "quick")
    assert run("probe", *PAIR, *more)[0] == 0
    longer = load_runtime_table(Path("stree-data/runtime/cpu--tiny-target--tiny-draft.yaml"))
    assert longer.batch_sizes == (1, 2)
    assert longer.points[: len(table.points)] == table.points, "measured rows are kept"
    few = {s.rule for s in longer.steps if s.batch_size == 2}
    assert few == {"greedy", "mss", "mss_truncated"}
    path = Path("stree-data/runtime/cpu--tiny-target--tiny-draft.yaml")
    whole = path.read_text()
    path.write_text(whole.replace("held_bytes", "hold_bytes"))
    code, _, err = run("probe", *PAIR, *more)
    assert code == 2
    assert "hold_bytes" in err
    assert "--force" in err, "a table of another version does not stand in the way"
    path.write_text(whole)

    record = ("trace", "--dataset", "toys", "--prompts", "prompts.jsonl", *PAIR)
    code, out, _ = run(*record, "--max-new-tokens", "12", "--json")
    assert code == 0
    first = f"12 prompts from field question; the first begins: {random_texts(NUM_PROMPTS)[0][:80]}"
    assert out.splitlines()[0] == first
    assert json.loads(out.splitlines()[-1])["rank0_share"] > 0
    assert "unreliable" in out
    code, _, err = run(*record)
    assert code == 2
    assert "--force" in err

    code, out, err = run("--gpu", "cpu", "--dataset", "toys", *PAIR, *small)
    assert code == 0, err
    assert out.startswith("tiny-target + tiny-draft on cpu")
    profile = load_profile(Path("stree-profile.yaml"))
    assert not profile.estimated

    live = ("--dataset", "toys", "--prompts", "prompts.jsonl", "--max-new-tokens", "12")
    code, out, err = run("validate", *live, "--dtype", "float64", "--write", "--json")
    assert code == 0, err
    assert out.startswith("tiny-target + tiny-draft on ")
    # A device's long name wraps the line.
    assert "· 12 prompts of toys, greedy · batch size 1 predicted from" in " ".join(out.split())
    assert "\ntokens/step: median error 0.0 %, worst 0.0 %\n" in out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert len(rows) == 7
    for row in rows:
        assert row["predicted_tokens_per_step"] == row["live_tokens_per_step"], row["mode"]
        assert row["texts_differing_from_off"] == 0, row["mode"]
    measured = load_profile(Path("stree-profile.yaml")).measured
    assert measured is not None
    assert len(measured.rows) == 7

    prompt = ("decode", "--prompt", random_texts(1)[0], "--max-new-tokens", "20")
    code, tuned, _ = run(*prompt)
    assert code == 0
    assert run(*prompt, "--mode", "off")[1] == tuned
    folders = ("stree-data/models/tiny-target", "stree-data/models/tiny-draft")
    assert run(*prompt, "--target", folders[0], "--draft", folders[1])[1] == tuned
    code, _, err = run(*prompt, "--target", folders[1])
    assert code == 2
    assert "the profile is for target tiny-target" in err
    code, out, _ = run(*prompt, "--json")
    assert json.loads(out.splitlines()[-1])["text"] == tuned.removesuffix("\n")


def test_a_trace_without_certificate_gets_it(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process was ended between the two; nothing is recorded a second time."""
    record = ("trace", "--dataset", "ended", "--prompts", "prompts.jsonl", *PAIR)
    record = (*record, "--max-new-tokens", "5", "--limit", "3")
    with monkeypatch.context() as patch:
        patch.setattr("stree_autotune.cli.trace.certify_file", interrupted)
        with pytest.raises(Ended):
            run(*record)
    path = Path("stree-data/traces/tiny-target--tiny-draft--ended--greedy.safetensors")
    left = path.with_suffix(".part-0.jsonl")
    left.write_text("{}\n")
    whole = path.read_bytes()
    monkeypatch.setattr("stree_autotune.cli.trace.open_pair", interrupted)
    code, _, err = run(*record[:-1], "2")
    assert code == 2, "another recording's trace stands in the way"
    assert "--force" in err
    code, out, err = run(*record)
    assert code == 0, err
    assert "of 3 prompts" in out
    assert "most tokens per step" in out
    assert path.read_bytes() == whole
    assert not left.exists()
    assert load_certificate(path) is not None
    assert run(*record)[0] == 2, "both are there"
    certificate_path(path).write_text("schema_version: 1\n")
    assert run(*record)[0] == 0, "a certificate that is none is replaced"


class Ended(Exception):
    """Stands for the end of the process."""


def interrupted(*_: object) -> None:
    raise Ended


def test_one_model_is_timed_alone(run: Runner) -> None:
    few = ("--batch-size", "2", "--max-nodes", "3", "--context", "64", "--effort", "quick")
    code, out, err = run("probe", "--target", "stree-data/models/tiny-target", *few, "--json")
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["model"], summary["weights"], summary["dtype"]) == (
        "tiny-target", "real", "float32",
    )  # fmt: skip
    rows = {row["num_tokens"]: row for row in summary["rows"]}
    assert sorted(rows) == [1, 2, 4]
    assert all(row["batch_size"] == 2 and row["ms"] > 0 for row in rows.values())
    assert rows[1]["step_ms"] > 0
    assert "tiny-target, its own weights, context 64" in out
    assert "pass --draft" in out


def test_shapes_are_timed_with_random_weights(run: Runner, folder: Path) -> None:
    specs = folder / "stree-data" / "shapes"
    specs.mkdir(exist_ok=True)
    for name, layers in (("deep", 3), ("flat", 1)):
        spec = {
            "schema_version": 1, "kind": "stree-shape", "name": name, "sources": ["this test"],
            "config": {
                "d_model": 32, "n_layer": layers, "vocab_size": 90,
                "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16},
            },
        }  # fmt: skip
        (specs / f"{name}.yaml").write_text(json.dumps(spec))
    few = ("--batch-size", "1", "--max-nodes", "4", "--context", "64", "--effort", "quick")
    code, out, err = run("probe", "--shapes", "deep", *few)
    assert code == 0, err
    assert "deep, random weights, context 64" in out
    code, out, err = run("probe", "--shapes", "deep,flat", *few)
    assert code == 0, err
    table = load_runtime_table(Path("stree-data/runtime/cpu--deep--flat.yaml"))
    assert table.weights == "random"
    assert table.target.shape_sha256 != table.draft.shape_sha256
    assert table.draft.vocab_size == 96


def test_chats_are_put_into_the_template(
    run: Runner, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}w9 {{ m.content }} w8{% endfor %}"
    model = folder / "stree-data" / "models" / "tiny-target"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run("--gpu", "cpu", "--dataset", "toys", *PAIR, "--context", "128", "--max-nodes", "8",
               "--batch-size", "1")[0] == 0  # fmt: skip
    prompt = ("decode", "--max-new-tokens", "20", "--prompt")
    code, chat, err = run(*prompt, "w3 w4", "--chat")
    assert code == 0, err
    assert run(*prompt, "w9 w3 w4 w8")[1] == chat
    record = ("trace", "--dataset", "chats", "--prompts", "prompts.jsonl", *PAIR, "--chat")
    assert run(*record, "--max-new-tokens", "5")[0] == 0
    path = Path("stree-data/traces/tiny-target--tiny-draft--chats--greedy.safetensors")
    assert load_trace(path).meta.chat
    few = ("--context", "128", "--max-nodes", "8", "--batch-size", "1", "-o", "chats.yaml")
    assert run("--gpu", "cpu", "--dataset", "chats", *PAIR, *few)[0] == 0
    assert load_profile(Path("chats.yaml")).chat
    for flags, warns in (((), True), (("--chat",), False)):
        caplog.clear()
        assert run(*prompt, "w3 w4", "--profile", "chats.yaml", *flags)[0] == 0
        assert ("tuned on prompts in the chat template" in caplog.text) == warns
    turns = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w3 w4"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": turns}))
    record = ("trace", "--dataset", "turns", "--prompts", "chats.jsonl", *PAIR, "--chat")
    with pytest.MonkeyPatch.context() as patch:
        seen: list[list[list[int]]] = []
        patch.setattr("stree_autotune.cli.trace.record_share", partial(keep, seen))
        code, out, err = run(*record)
    assert code == 0, err
    assert out == (
        "1 prompt from field messages; the first (2 turns) begins: system: w5\\nuser: w3 w4\n"
    )
    codec = load_text_codec(model)
    assert seen == [codec.encode(["w9 w5 w8w9 w3 w4 w8"])]
    (model / "tokenizer_config.json").unlink()
    code, _, err = run(*prompt, "w3 w4", "--chat")
    assert code == 2
    assert "tiny-target must hold a chat template" in err


def keep(seen: list[object], pair: object, tokens: object, *_: object, **__: object) -> list[int]:
    """Stand for recording: note the prompts, record none."""
    seen.append(tokens)
    return []


def test_validate_follows_a_profiles_sampling(
    run: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = load_runtime_table(Path("stree-data/runtime/cpu--tiny-target--tiny-draft.yaml"))
    monkeypatch.setattr("stree_autotune.live.validation._known_table", lambda *_: table)
    profile = load_profile(Path("stree-profile.yaml"))
    sampled = {"sampling": Sampling(rule="mss", temperature=0.7, top_p=0.9), "chat": True}
    save_profile(profile.model_copy(update=sampled), Path("sampled.yaml"))
    few = ("--dataset", "toys", "--prompts", "prompts.jsonl", "--limit", "3", "--batch-size", "1")
    code, out, err = run("validate", "-p", "sampled.yaml", *few, "--max-new-tokens", "12", "--json")
    assert code == 0, err
    assert "· 3 prompts of toys, mss-t0.7-p0.9 · batch size 1 " in " ".join(out.split())
    document = json.loads(out.splitlines()[-1])
    assert (document["sampling"], document["chat"]) == ("mss-t0.7-p0.9", False)
    assert all(row["texts_differing_from_off"] is None for row in document["rows"])
    fewest = min(row["timed_steps"] for row in document["rows"])
    assert f"only {fewest} steps of " in out
    assert "give more prompts, or longer texts with" in " ".join(out.split())
    rates = [1e3 * row["live_tokens_per_step"] / row["live_step_ms"] for row in document["rows"]]
    assert rates == pytest.approx([row["live_tokens_per_s"] for row in document["rows"]])
    assert "these are plain prompts" in caplog.text


def test_models_come_from_the_hub_by_their_id(
    run: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the hub, filled by hand: nothing is fetched in a test."""
    models = folder / "stree-data" / "models"
    for name in ("tiny-target", "tiny-draft"):
        repository = folder / "hub" / f"models--toys--{name}"
        shutil.copytree(models / name, repository / "snapshots" / "0123abcd", dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    prompt = ("decode", "--prompt", "w3 w4", "--max-new-tokens", "20")
    local = run(*prompt)
    assert local[0] == 0
    assert run(*prompt, "--target", "toys/tiny-target", "--draft", "toys/tiny-draft") == local
    profile = load_profile(Path("stree-profile.yaml"))
    for name in ("toys/tiny-target", "stree-data/models/tiny-target"):
        named = profile.target.model_copy(update={"name": name})
        save_profile(profile.model_copy(update={"target": named}), Path("named.yaml"))
        for verb in (prompt, ("validate",), ("export", "named.yaml", "--to", "vllm")):
            flags = () if verb[0] == "export" else ("-p", "named.yaml")
            code, _, err = run(*verb, *flags)
            assert code == 2
            assert f"a profile names its models by plain names, this one by {name!r}" in err
    code, _, err = run(*prompt, "--target", "toys/absent")
    assert code == 2
    assert "toys/absent is not whole in the local cache" in err


def test_bad_requests_are_one_sentence_and_leave_nothing(run: Runner, folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    for arguments, message in [
        (("decode", "--prompt", "w1", "--profile", "none.yaml"), "no profile none.yaml is there"),
        (("trace", "--dataset", "x", "--prompts", "none.jsonl", *PAIR), "cannot be read"),
        (("decode", "--prompt", "w1 \udcff", "-p", "stree-profile.yaml"), "valid Unicode"),
        (("trace", "--dataset", "toyz", *PAIR), "not known on the hub"),
        (("trace", "--dataset", "a/b", "--prompts", "prompts.jsonl", *PAIR), "a/b"),
        (("probe", "--target", "tiny-tarket", "--draft", "tiny-draft"), "tiny-target"),
        (("probe", *PAIR, "--backend", "triton"), "needs a CUDA device"),
        (("probe", *PAIR, "--dtype", "float8"), "dtype must be known"),
        (("probe", "--shapes", "granite-4-h-2b"), "did you mean granite-4-h-1b"),
        (("probe", "--shapes", "a,b,c"), "names a target, or a target and a draft"),
        (("probe", "--shapes", "deep", "--target", "x"), "in place of --target"),
        (("probe", "--draft", "tiny-draft"), "needs its target"),
    ]:
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert message in err
        assert err.count("\n") == 1, f"one line, got {err!r}"
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
