"""The benchmarks' own arithmetic, and their candidates on the CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scripts import script
from synthetic import trace_of
from synthetic_data import make_profile, make_trace, policy_row

from stree_autotune.probe.timing import Effort
from stree_autotune.trace.file import NO_RANK, Trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.checkpoint import random_model
from stree_core.drafting.pair import Pair
from stree_core.errors import NotEnoughMemory
from stree_core.families.model_shape import Block, Mamba2Shape, ModelShape
from stree_core.families.weight_map import mamba2_part, matrix, vector
from stree_core.models.backend import load_backend
from stree_core.models.model import Model
from stree_core.models.source import ModelSource
from stree_core.profile import ModelRef, PolicyRow
from stree_core.tree import Tree
from stree_kernels.ssm import tree_scan_ref

CPU = torch.device("cpu")
BRIEF = Effort(min_rounds=2, max_rounds=2, seconds=0.0)


bench_shapes = script("bench_shapes")
candidates = script("candidates")
layer_data = script("layer_data")
peers = script("peers")
report = script("report")
timing = script("timing")
prediction = script("prediction")
flashinfer = script("flashinfer_peer")


def tiny_layer() -> object:
    return bench_shapes.LayerShape("tiny", 4, 4, 8, 4, 2, 2)


def test_balanced_tree_and_its_paths() -> None:
    parents = bench_shapes.balanced_tree(8)
    assert parents == [-1, 0, 0, 1, 1, 2, 2, 3]
    assert bench_shapes.leaf_paths(parents) == [[0, 1, 4], [0, 2, 5], [0, 2, 6], [0, 1, 3, 7]]
    assert bench_shapes.leaf_paths([-1]) == [[0]]
    assert [bench_shapes.accepted_path(n) for n in (1, 2, 4, 128)] == [
        [0],
        [0, 1],
        [0, 1, 3],
        [0, 1, 3],
    ]


def test_floor_counts_the_state_twice_and_shared_rows_once() -> None:
    layer = bench_shapes.LAYERS["mamba-in-llama-8b"]
    state = 2 * 4 * 32 * 128 * 128
    assert layer.floor_bytes(3, 0, 0) == 3 * state
    # x and B of 8 heads, dt of 32; then C and y of 32 heads.
    replayed = 8 * 128 + 32 + 8 * 128
    assert layer.floor_bytes(1, 0, 1) - state == 2 * replayed
    assert layer.floor_bytes(1, 1, 0) - state == 2 * (replayed + 2 * 32 * 128)


def test_every_phase_is_timed_equally_often_and_every_buffer_at_least_once() -> None:
    assert [timing.num_calls(n, 18) for n in (1, 3, 20, 47)] == [36, 36, 36, 54]


def test_time_per_call_is_that_of_all_calls_divided_by_their_number() -> None:
    seen: list[int] = []
    measured = timing.time_calls({"a": seen.append, "b": abs}, 3, CPU, BRIEF)
    assert list(measured) == ["a", "b"]
    assert set(seen) == {0, 1, 2}
    assert all(value.us > 0 and value.spread >= 0 for value in measured.values())


def test_candidate_is_checked_against_float64_and_keeps_its_state() -> None:
    inputs = layer_data.make_inputs(tiny_layer(), 2, 5, 2, CPU, torch.float32)
    before = inputs.buffers[0].state_BHPN.clone()
    made = candidates.ours(inputs, tree_scan_ref.tree_scan)
    assert set(made.errors) == {"y", "state"}
    assert all(error < 1e-6 for error in made.errors.values())
    assert torch.equal(inputs.buffers[0].state_BHPN, before)


def test_candidate_that_writes_nothing_is_wrong() -> None:
    kernels = script("kernels")
    inputs = layer_data.make_inputs(tiny_layer(), 1, 3, 1, CPU, torch.float32)
    made = candidates.ours(inputs, lambda *_, **__: None)
    assert not kernels.is_right("ours", made)


def test_row_has_no_number_for_an_absent_peer() -> None:
    kernels = script("kernels")
    timings = {"ours": timing.Measured(4.0, 0.01), "one_token": timing.Measured(5.0, 0.02)}
    row = kernels.make_row(("tiny", 1, 16), 1.25, timings)
    assert (row["ours_us"], row["floor_us"], row["one_token_us"]) == (4.0, 1.25, 5.0)
    assert (row["sglang_us"], row["chunk_scan_us"], row["sglang_over_ours"]) == (None, None, None)
    assert row["ours_over_one_token"] == 0.8


def test_a_row_is_measured_and_holds_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = script("kernels")
    monkeypatch.setattr(kernels, "rotation", lambda *_: 2)
    makers = {
        "ours": lambda inputs: candidates.ours(inputs, tree_scan_ref.tree_scan),
        "ours_storing": lambda inputs: candidates.ours_storing(inputs, tree_scan_ref.tree_scan),
    }
    row = kernels.measure(tiny_layer(), 1, 8, makers, 4e12, CPU)
    assert row["ours_us"] > row["floor_us"] > 0
    assert row["ours_state_error"] < 1e-3
    makers["ours"] = lambda inputs: candidates.ours(inputs, lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"tiny B=1 T=8: ours: .*nan"):
        kernels.measure(tiny_layer(), 1, 8, makers, 4e12, CPU)


def test_absent_peers_say_why(tmp_path: Path) -> None:
    assert peers.load_peers(None).versions["sglang"] == "absent: no --sglang FILE"
    missing = peers.load_peers(tmp_path / "mamba_ssm.py")
    assert missing.tree_update is None
    assert missing.versions["sglang"] == "absent: mamba_ssm.py is not at the path given"


def test_a_single_file_is_loaded_with_its_version(tmp_path: Path) -> None:
    file = tmp_path / "mamba_ssm.py"
    file.write_text(
        "from sglang.kernels.jit.utils import is_arch_support_pdl\n"
        "def selective_state_update(): return is_arch_support_pdl()\n"
    )
    (tmp_path / "METADATA").write_text("Name: sglang\nVersion: 0.5.23\n")
    loaded = peers.load_peers(file)
    assert loaded.tree_update() is torch.cuda.is_available()
    assert loaded.versions["sglang"] == "0.5.23"
    assert "sglang" not in sys.modules


def test_result_file_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {
        "command": "python benchmarks/kernels.py", "gpu": "NVIDIA H200", "versions": {"torch": "2"},
        "date": "2026-11-22T00:00:00+00:00", "copy_bandwidth_tb_s": 4.3, "gate": "9 passed",
    }  # fmt: skip
    rows = [
        {"shape": "a", "tokens": n, "ours_us": 3.714, "sglang_us": None, "ours_spread": n / 1e3}
        for n in (8, 16)
    ]
    path = tmp_path / "results" / "kernels.json"
    report.save(path, head, rows)
    assert json.loads(path.read_text()) == {**head, "rows": rows}
    columns = ("shape", "tokens", "ours_us", "sglang_us")
    report.print_table(path, columns, lambda row: row["tokens"] == 16)
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "| shape | tokens | ours_us | sglang_us |",
        "| --- | ---: | ---: | ---: |",
        "| a | 16 | 3.71 | - |",
        "",
        "Largest standard deviation over median: 1.6 % ours.",
    ]


def test_command_keeps_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/home/me/kernels.py", "--output", "/home/me/out.json", "--sglang", "/a/b.py"]
    monkeypatch.setattr(sys, "argv", arguments)
    command = "python benchmarks/kernels.py --sglang b.py"
    assert report.command_line() == command


def test_gate_finds_the_tests_that_need_a_gpu() -> None:
    gate = script("gate")
    assert {"test_tree_scan.py", "test_tree_conv.py"} <= {file.name for file in gate.gpu_tests()}
    assert gate.require_green(skip=True) == "skipped"


def test_rows_of_models_that_are_not_timed_stay_with_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = script("forward")
    path = tmp_path / "forward-h200.json"
    assert forward.rows_to_keep(path, {}, ["a"]) == []
    rows = [{"model": "a", "ms": 1}, {"model": "b", "ms": 2}, {"model": "c", "date": "older"}]
    path.write_text(json.dumps({"date": "today", "rows": rows}))
    assert forward.rows_to_keep(path, {}, ["a"]) == []
    monkeypatch.setattr(forward, "is_of_this_run", lambda *_: True)
    assert forward.rows_to_keep(path, {}, ["a"]) == [
        {"date": "today", "model": "b", "ms": 2},
        {"date": "older", "model": "c"},
    ]


def test_forward_rows_of_a_tiny_model() -> None:
    forward = script("forward")
    mixer = Mamba2Shape(4, 2, 1, 2, 8, 4, 4, True, (0.0, float("inf")), 1, 1e-5)
    blocks = tuple(Block(vector(f"{i}.norm", 16), (mamba2_part(mixer, 16, f"{i}."),)) for i in "01")
    embed = matrix("embed", 32, 16)
    shape = ModelShape(32, 16, 1e-5, True, (), embed, 1.0, blocks, vector("norm", 16), embed)
    model = random_model(shape, load_backend("torch", CPU), torch.float32, CPU)
    with torch.inference_mode():
        one, eight = forward.measure(model, 2, 0, [1, 8], 0.5, BRIEF)
    assert (one["tokens"], one["over_one_token_ms"], eight["tokens"]) == (1, 0.0, 8)
    assert eight["weight_floor_ms"] == 0.5
    assert eight["over_one_token_ms"] == pytest.approx(eight["ms"] - one["ms"], abs=1e-3)


def tiny_model(vocab_size: int) -> Model:
    mixer = Mamba2Shape(4, 4, 1, 1, 8, 4, 4, True, (0.0, float("inf")), 1, 1e-5)
    blocks = (Block(vector("n", 16), (mamba2_part(mixer, 16, "m."),)),)
    embed = matrix("embed", vocab_size, 16)
    shape = ModelShape(
        vocab_size, 16, 1e-5, True, (), embed, 1.0, blocks, vector("norm", 16), embed
    )
    return random_model(shape, load_backend("torch", CPU), torch.float32, CPU)


def traced_case(trace: Trace) -> Any:
    """A pair of random weights that accepts what a trace says, and a cost of 2 ms a step."""
    model = tiny_model(2000)
    source = ModelSource(ModelRef(name="tiny", config_sha256="0" * 64), model.shape, None)
    cost = SimpleNamespace(step_ms=lambda batch, tree, tokens_per_step: 2.0)
    pair = Pair(model, model, source, source, None)
    return prediction.Case("tiny", pair, trace, False, cost, 64)


def test_decoding_by_a_trace_takes_the_steps_of_its_walk() -> None:
    trace = make_trace(num_prompts=5, length=40)
    case = traced_case(trace)
    options = SimpleNamespace(prompts=0, sizes=[6], rounds=1)
    rows = prediction.measure(case, 3, options)
    assert [row["mode"] for row in rows] == ["off", "chain 1", "chain 2", "chain 5", "tree 6"]
    for row in rows:
        assert row["predicted_tokens_per_step"] == row["live_tokens_per_step"], row["mode"]
        rate = 1e3 * 3 * row["predicted_tokens_per_step"] / 2.0
        assert row["predicted_tokens_per_s"] == pytest.approx(rate, rel=1e-3)
        rate = 1e3 * 3 * row["live_tokens_per_step"] / row["live_step_ms"]
        assert row["live_tokens_per_s"] == pytest.approx(rate, rel=0.5)
    assert rows[0]["live_tokens_per_step"] == 1
    assert len({row["live_tokens_per_step"] for row in rows}) == len(rows)


def test_the_likeliest_tree_follows_the_shares_of_ranks() -> None:
    ranks = [[0] * 60 + [1] * 30 + [2] * 6 + [NO_RANK] * 4]
    tree = prediction.likely_tree(trace_of(ranks, 3), 4)
    # .6, .36, .3, .216, before .18
    assert set(tree.paths) == {(0,), (0, 0), (1,), (0, 0, 0)}
    deep = prediction.likely_tree(trace_of([[0] * 100], 3), 12)
    assert deep.depth == prediction.DEEPEST


def test_errors_are_summed_up_by_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "batch": 1, "mode": "off", "tree": [], "predicted_step_ms": 1.0, "live_step_ms": 1.0,
        "predicted_tokens_per_step": 2.0, "live_tokens_per_step": 2.0, "live_spread": 0.001,
    }  # fmt: skip
    rows = [
        {"pair": pair, "predicted_tokens_per_s": speed, "live_tokens_per_s": 100.0, **row}
        for pair, speed in (("a", 101.0), ("a", 96.0), ("b", 103.0))
    ]
    lines = prediction.summary(rows).split("\n\n")
    assert lines[0].startswith("a, 2 configurations: tokens/s median error 2.5 %, worst 4.0 %;")
    assert lines[2].startswith("all, 3 configurations: tokens/s median error 3.0 %, worst 4.0 %;")
    report.save(tmp_path / "p.json", report.header({}, "none"), rows)
    figure = tmp_path / "p.svg"
    prediction.show(tmp_path / "p.json", figure)
    printed = capsys.readouterr().out
    assert "| b | 1 | off | 103 | 100 | +3.0% |" in printed
    assert "| a | 1 | -1.5% | - | 2.5% | 4.0% | 0.0% | off | 0.0% |" in printed
    assert "batch 1" in figure.read_text()
    assert "Date" not in figure.read_text()


def test_rows_of_other_pairs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for pair, speed in (("mamba2-2.7b", 1.0), ("demo", 2.0), ("mamba2-2.7b", 3.0)):
        head = report.header({}, "none") | {"sources": {pair: {"speed": speed}}}
        prediction.save_beside(path, head, [{"pair": pair, "speed": speed}])
    document = report.read(path)
    assert [tuple(row.values()) for row in document["rows"]] == [
        ("demo", 2.0),
        ("mamba2-2.7b", 3.0),
    ]
    assert document["sources"]["demo"]["speed"] == 2.0
    assert document["sources"]["mamba2-2.7b"]["speed"] == 3.0


def live_case(trace: Trace, live: ModuleType, *rows: PolicyRow) -> Any:
    case = traced_case(trace)
    profile = make_profile(*rows)
    return live.ProfileCase("tiny", case.pair, trace, False, case.cost, 64, profile)


def test_a_profile_s_row_is_decoded_beside_chains_and_off_on_the_same_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = script("live")
    monkeypatch.setattr(live, "FEWEST_CALLS", 1)
    trace = make_trace(num_prompts=6, length=30)
    tree = Tree.from_paths([[0], [1], [0, 0]])
    policy = policy_row(2, tree)
    case = live_case(trace, live, policy)
    row = live.measure(case, policy, 6)
    assert row["tokens_per_step"] == row["traced_tokens_per_step"] > 1
    assert row["verdict"] == "tree"
    assert row["prompts"] == 6
    assert row["over_off"] == pytest.approx(row["tokens_per_s"] / row["off_tokens_per_s"], rel=1e-2)
    chains = live.chains(case, 2, tree)
    assert row["chain"] in [chain.num_nodes for chain in chains]
    # every step of this case takes as long, so the best chain is that of most tokens per step
    longest = max(map(Tree.chain, range(1, 13)), key=lambda each: walk(trace, each).tokens_per_step)
    assert chains[0] == longest
    assert longest not in live.chains(case, 2, longest)
    speeds = [row[f"{prefix}tokens_per_step"] for prefix in ("", "chain_")]
    prompts = np.arange(6)
    chain = Tree.chain(row["chain"])
    walked = [walk(trace, each, prompts).tokens_per_step for each in (tree, chain)]
    assert speeds == pytest.approx(walked, rel=1e-3)
    block = live.with_measured(case.profile, report.header(), [row]).measured
    assert [each.mode for each in block.rows] == [
        "off",
        f"best chain ({row['chain']})",
        "tuned tree",
    ]
    assert block.rows[2].tokens_per_s == row["tokens_per_s"]


def test_short_texts_are_decoded_again_until_enough_steps_were_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = script("live")
    policy = policy_row(4, Tree.from_paths([[0], [1], [0, 0]]))
    case = live_case(make_trace(num_prompts=6, length=12), live, policy)
    monkeypatch.setattr(live, "FEWEST_CALLS", 1)
    once = live.measure(case, policy, 4)["timed_steps"]
    monkeypatch.setattr(live, "FEWEST_CALLS", once + 1)
    row = live.measure(case, policy, 4)
    assert row["timed_steps"] == 2 * once
    assert row["prompts"] == 6, "two waves of four slots, two prompts come twice"
    assert len(row["parts_over_off"]) == 2
    assert row["tokens_per_step"] == row["traced_tokens_per_step"]

    monkeypatch.setattr(live, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(live, "pair_of", lambda profile: ("target", "draft"))
    monkeypatch.setattr(live, "opened", lambda *_: case.pair)
    monkeypatch.setattr(live, "case_of", lambda *_: case)
    monkeypatch.setattr(live, "give_back", lambda: None)
    options = argparse.Namespace(device="cpu", batches=[], prompts=4, write=False)
    assert list(live.decoded(options, {}, [("tiny", case.profile)])) == []
    assert "steps of a tree could be timed, the row is left out" in capsys.readouterr().err


def test_trees_whose_engines_do_not_fit_together_are_timed_in_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mtp, groups = script("mtp"), []

    def in_turns(case: Any, batch: int, rounds: int, names: list[str], rules: Any) -> Any:
        groups.append(names)
        if len(names) > most:
            raise NotEnoughMemory("too many")
        return {name: [name] for name in names}

    monkeypatch.setattr(mtp, "in_turns", in_turns)
    names, most = list("abcde"), 2
    assert mtp.timed(None, 8, 1, names, None) == {name: [name] for name in names}
    assert [len(group) for group in groups] == [5, 2, 3, 1, 2]
    most = 0
    with pytest.raises(NotEnoughMemory):
        mtp.timed(None, 8, 1, names, None)


def test_shipped_profiles_are_taken_by_gpu_full_size_pairs_first() -> None:
    live = script("live")
    names = [name for name, _ in live.profiles_of("h200", [])]
    assert all(name.startswith("h200--") for name in names)
    shapes = [live.is_shape(name.split("--")[1]) for name in names]
    assert shapes == sorted(shapes, reverse=True)
    assert [name for name, _ in live.profiles_of("h200", names[:1])] == names[:1]
    with pytest.raises(SystemExit, match="no shipped profile of b200"):
        live.profiles_of("b200", [])


class FakeFlashInfer:
    """Replays kept rows before it scores, as the real one does, on the CPU in float64."""

    def __init__(self, heads: object, tokens: int, accepted: int) -> None:
        self.heads, self.tokens, self.accepted = heads, tokens, accepted
        self.kept: list[object] = []

    def memory(self, state: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(state=state, out_BTHP=torch.empty(1))

    def step(self, memory: SimpleNamespace, rows: object, cursor: object) -> torch.Tensor:
        state = memory.state.double()
        for before in self.kept:
            state = flashinfer.chain(state, before, self.heads, self.accepted)[1]
        if flashinfer.stores(cursor, self.tokens):
            memory.state.copy_(state)
            self.kept.clear()
        self.kept.append(rows)
        return flashinfer.chain(state, rows, self.heads, self.accepted)[0]


@pytest.mark.parametrize(("tokens", "calls"), [(1, 16), (4, 5), (8, 3), (16, 1)])
def test_flashinfer_stores_once_in_a_cycle(tokens: int, calls: int) -> None:
    accepted = min(3, tokens)
    assert flashinfer.cycle(tokens, accepted) == calls
    stored = [
        flashinfer.stores(at, tokens) for at in flashinfer.cursors(tokens, accepted, 3 * calls)
    ]
    assert sum(stored) == 3
    assert all(0 <= at.origin < 16 + tokens for at in flashinfer.cursors(tokens, accepted, 50))


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_flashinfer_is_checked_over_a_whole_cycle(tokens: int) -> None:
    inputs = layer_data.make_inputs(tiny_layer(), 2, tokens, 2, CPU, torch.float32)
    accepted = min(3, tokens)
    length = flashinfer.cycle(tokens, accepted)
    fake = FakeFlashInfer(inputs.heads, tokens, accepted)
    errors = flashinfer._check(fake, inputs, accepted, length)
    assert all(error < 1e-6 for error in errors.values())
    fake = FakeFlashInfer(inputs.heads, tokens, 0)
    assert flashinfer._check(fake, inputs, accepted, length)["y"] > 1e-3


def test_a_chain_is_what_our_reference_makes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_data, "balanced_tree", lambda n: [-1, *range(n - 1)])
    inputs = layer_data.make_inputs(tiny_layer(), 2, 5, 1, CPU, torch.float32)
    state = inputs.buffers[0].state_BHPN.double()
    y = flashinfer.chain(state, inputs.repeated[0], inputs.heads, 3)[0]
    assert layer_data.relative_error(y, inputs.scored) < 1e-6


def test_flashinfers_columns_are_shown_where_it_was_built(tmp_path: Path) -> None:
    kernels = script("kernels")
    layer = bench_shapes.LAYERS["mamba2-2.7b"]
    options = SimpleNamespace(flashinfer=tmp_path, peers=["flashinfer"])
    assert kernels.find_flashinfer(options, layer, 4) is None
    library = tmp_path / "h80_g1_t4.so"
    library.touch()
    assert kernels.find_flashinfer(options, layer, 4) == library
    assert "flashinfer_us" not in kernels.shown([{"flashinfer_us": None}])
    assert "flashinfer_us" in kernels.shown([{"flashinfer_us": None}, {"flashinfer_us": 4.0}])
