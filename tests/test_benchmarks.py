"""The benchmarks' own arithmetic, and their candidates on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from synthetic_data import make_trace

from stree_autotune.timing import Effort
from stree_core.backend import load_backend
from stree_core.checkpoint import random_model
from stree_core.decode import generate
from stree_core.engine import Engine, EngineConfig
from stree_core.model_shape import Block, Mamba2Shape, ModelShape
from stree_core.parts import mamba2_part, matrix, vector
from stree_core.stop import StopRule
from stree_core.tree import Tree
from stree_kernels import tree_scan_ref

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
BRIEF = Effort(min_rounds=2, max_rounds=2, seconds=0.0)


def script(name: str) -> ModuleType:
    """Load a script under a name of its own: a published package is called `kernels`, too."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    # Scripts find the modules beside them as if they were run.
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


bench_shapes = script("bench_shapes")
candidates = script("candidates")
layer_data = script("layer_data")
peers = script("peers")
report = script("report")
timing = script("timing")


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
    arguments = ["/home/me/kernels.py", "--output", "/home/me/out.json", "--sglang", "a/b.py"]
    monkeypatch.setattr(sys, "argv", arguments)
    command = "python benchmarks/kernels.py --output out.json --sglang a/b.py"
    assert report.command_line() == command


def test_gate_finds_the_tests_that_need_a_gpu() -> None:
    gate = script("gate")
    assert {"test_tree_scan.py", "test_tree_conv.py"} <= {file.name for file in gate.gpu_tests()}
    assert gate.require_green(skip=True) == "skipped"


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


def test_a_trace_decides_what_random_weights_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = script("decode")
    mixer = Mamba2Shape(4, 4, 1, 1, 8, 4, 4, True, (0.0, float("inf")), 1, 1e-5)
    blocks = (Block(vector("n", 16), (mamba2_part(mixer, 16, "m."),)),)
    embed = matrix("embed", 20000, 16)
    shape = ModelShape(20000, 16, 1e-5, True, (), embed, 1.0, blocks, vector("norm", 16), embed)
    model = random_model(shape, load_backend("torch", CPU), torch.float32, CPU)
    trace = make_trace(num_prompts=1, length=400)
    monkeypatch.setattr(decode.step_module, "make_rules", decode.trace_rules(trace, 1, CPU))
    engine = Engine(model, model, Tree.chain(3), EngineConfig(1, 512))
    run = generate(engine, [[1, 2]], StopRule(200))
    expected, position = [], 0
    for _ in run.generations[0].accept_lengths[:-1]:
        length = 0
        while length < 3 and trace.ranks[position + length] == 0:
            length += 1
        expected.append(length)
        position += length + 1
    assert run.generations[0].accept_lengths[:-1] == expected
    assert len(set(expected)) == 4
