"""What a probe measures, leaves out and keeps, with invented times: no test waits for a clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_models import bamba_with_head
from tiny_models import save_pair

from stree_autotune.cost import ROW_EDGES
from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.traffic import MAX_BUFFERED, model_cost
from stree_autotune.probe import (
    passes as probe_passes,
    prompts as probe_prompts,
    rules as probe_rules,
    run as probe_module,
    steps as probe_steps,
)
from stree_autotune.probe.plan import (
    Attending,
    ProbeConfig,
    measured_keys,
    missing_stages,
    off_sizes,
    step_trees,
)
from stree_autotune.probe.run import BUDGETS, Budget, attending, extends, probe
from stree_autotune.probe.stepper import SteadyEngine
from stree_autotune.probe.steps import StepSetting
from stree_autotune.probe.timing import WALL_CYCLE, Effort, Timing, Work, time_interleaved
from stree_autotune.store.library import Library
from stree_autotune.store.open_models import PairRequest, open_pair
from stree_autotune.store.runtime_table import RuntimeTable, load_runtime_table, save_runtime_table
from stree_autotune.store.step_rule import StepRule
from stree_core.drafting.pair import Pair, Runtime, load_pair
from stree_core.engine.engine import EngineConfig
from stree_core.engine.step import Speculator
from stree_core.errors import BackendUnavailable
from stree_core.models.cache import Mamba2Cache
from stree_core.models.source import folder_source
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.launch import rows as kernel_rows

CONFIG = ProbeConfig("cpu", context=64, batch_sizes=(1, 2), max_nodes=12)
CPU = torch.device("cpu")
BOTH, NEITHER = Attending(target=True, draft=True), Attending(target=False, draft=False)
Invent = Callable[..., dict[Any, Timing]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    save_pair(root)
    sources = [folder_source(root / "models" / name) for name in ("tiny-target", "tiny-draft")]
    return load_pair(*sources, Runtime("cpu"))


def invented(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
    """Times that depend on the name alone; no work runs."""
    return {name: Timing(1.0 + sum(map(ord, str(name))) % 97 / 100, 0.01) for name in works}


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Invent], None]]:
    def put(invent: Invent) -> None:
        for module in (probe_passes, probe_rules, probe_steps, probe_prompts):
            monkeypatch.setattr(module, "time_interleaved", invent)

    put(invented)
    return put


@pytest.fixture(scope="module")
def whole(pair: Pair) -> RuntimeTable:
    with pytest.MonkeyPatch.context() as patch:
        for module in (probe_passes, probe_rules, probe_steps, probe_prompts):
            patch.setattr(module, "time_interleaved", invented)
        *_, table = probe(pair, CONFIG)
    return table


def test_a_head_is_probed_like_a_model(clockless: Callable[[Invent], None], tmp_path: Path) -> None:
    """Every pass and step of the same table runs; the table names the head."""
    clockless(invented)
    headed = bamba_with_head(tmp_path).pair
    *_, table = probe(headed, replace(CONFIG, batch_sizes=(2,), sampled=False))
    assert table.draft.name == "mtp"
    assert {point.term for point in table.points} >= {"verify", "draft_root", "draft", "draft_rows"}
    assert {step.tree for step in table.steps} >= {"off", "chain-2"}


def test_passes_of_a_head_run(tmp_path: Path) -> None:
    headed = bamba_with_head(tmp_path).pair
    keys = [("draft_root", 2, 1), ("draft", 2, 2), ("draft_rows", 2, 4), ("draft_path", 2, 1)]
    setting = StepSetting(2, 64, Effort(1, 1, 0.0), 0.0, lambda: None)
    points, no_room = probe_passes.time_passes(headed, keys, setting)
    assert [point.term for point in points] == [key[0] for key in keys]
    assert not no_room
    trees = {"off": Tree.chain(0), "chain-2": Tree.chain(2)}
    times = probe_steps.time_steps(headed.target, headed.draft, trees, StepRule.GREEDY, setting)
    assert [step.tree for step in times.steps] == list(trees)


def test_slots_hold_different_tokens(pair: Pair) -> None:
    """Alike rows would choose the same experts, and fewer would be read than in use."""
    config = EngineConfig(8, 64)
    tokens = [
        SteadyEngine(pair.target, pair.draft, [Tree.chain(3)], config).speculator.tokens_TB.clone()
        for _ in range(2)
    ]
    assert len(tokens[0].unique()) > 8
    assert torch.equal(*tokens), "always the same ones"


def test_prompts_are_read_by_the_target_and_by_both(
    pair: Pair, clockless: Callable[[Invent], None]
) -> None:
    """Every work runs once: what it reads is released again, so that it can be read again."""

    def run(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        for work in (*works.values(), *works.values()):
            work()
        return invented(works)

    clockless(run)
    keys = [("target", 2, 5), ("pair", 2, 5), ("pair", 1, 9)]
    setting = StepSetting(2, 64, Effort(1, 1, 0.0), 0.0, lambda: None)
    points = probe_prompts.time_prompts(pair, keys, setting)
    assert sorted(point[:3] for point in points) == sorted(keys)


def test_prompts_stay_within_the_context_and_the_rows(whole: RuntimeTable) -> None:
    stages = missing_stages(replace(CONFIG, context=1024, batch_sizes=(8, 256)), BOTH, None)
    lengths = {stage.keys for stage in stages if stage.kind == "prompts"}
    assert {key[1:] for keys in lengths for key in keys} == {(8, 64), (8, 256), (8, 1000)}
    # A context of 64 has no room for the shortest prompt and a token more.
    assert not whole.prompts


def test_a_prompt_is_read_right_before_models_are_timed(
    pair: Pair, clockless: Callable[[Invent], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def noted(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        log.append("time")
        return invented(works)

    clockless(noted)
    monkeypatch.setattr(probe_module, "prompt_reader", lambda model: lambda: log.append("read"))
    for _ in probe(pair, replace(CONFIG, batch_sizes=(1,), sampled=False)):
        log.append("stage")
    rules, passes, steps = ["time", "stage"], ["read", "time", "stage"], ["read", "time"] * 2
    assert log == ["read", *rules, *passes, *steps, "stage"]


def test_a_longer_path_is_measured_by_the_token(
    pair: Pair, clockless: Callable[[Invent], None]
) -> None:
    def by_path(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        longer = {("target_path", 1): 0.6, ("draft_path", 1): 0.3}
        return {name: Timing(1.0 + longer.get(name, 0.0), 0.0) for name in works}

    clockless(by_path)
    *_, table = probe(pair, replace(CONFIG, batch_sizes=(1,), sampled=False))
    ms = {point.term: point.ms for point in table.points}
    assert (ms["target_path"], ms["draft_path"]) == (pytest.approx(0.1), pytest.approx(0.05))


def test_context_is_measured_where_it_is_asked_for(
    clockless: Callable[[Invent], None],
) -> None:
    def by_context(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        shorter = {("context without", 1): 0.3, ("draft_context without", 1): 0.1}
        return {name: Timing(1.0 - shorter.get(name, 0.0), 0.0) for name in works}

    clockless(by_context)
    config = replace(CONFIG, batch_sizes=(1,), sampled=False)
    head, sibling = (
        open_pair(PairRequest("demo-target", name, (), Runtime("cpu")))
        for name in ("mtp", "demo-draft")
    )
    *_, table = probe(head, config)
    ms = {point[:3]: point.ms for point in table.points}
    scale = 1024 / (config.context // 2 - min(32, config.context // 4))
    assert ms["context", 1, 1] == pytest.approx(0.3 * scale)
    assert ms["draft_context", 1, 1] == pytest.approx(0.1 * scale)
    *_, table = probe(sibling, config)
    assert "draft_context" not in {point.term for point in table.points}, "its draft has none"


def test_so_many_slots_store_their_states(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Speculator] = []
    make = probe_passes.make_speculators

    def noted(*args: Any) -> list[Speculator]:
        made.extend(make(*args))
        return made

    stored: dict[Any, list[int]] = {}

    def look(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        for name, work in works.items():
            cache = made[0].draft_cache if "draft" in name[0] else made[0].target_cache
            assert cache is not None
            (layer, *_) = (each for each in cache.layers if isinstance(each, Mamba2Cache))
            layer.ssm_BHPN.fill_(1.0)
            work()
            changed_B = (layer.ssm_BHPN != 1.0).flatten(1).any(1)
            stored[name] = changed_B.nonzero().flatten().tolist()
        return invented(works)

    monkeypatch.setattr(probe_passes, "make_speculators", noted)
    monkeypatch.setattr(probe_passes, "time_interleaved", look)
    keys = [(term, 16, size) for term in ("target_store", "draft_store") for size in (1, 2, 16)]
    probe_passes.time_passes(pair, keys, StepSetting(16, 64, Effort(1, 1, 0.0), 0.0, lambda: None))
    for term in ("target_store", "draft_store"):
        assert stored[f"{term} without", 2] == []
        assert stored[term, 1] == [0]
        assert stored[term, 2] == [0, 8], "spread evenly"
        assert stored[term, 16] == list(range(16))


def test_every_term_is_measured(pair: Pair, whole: RuntimeTable) -> None:
    assert not missing_stages(CONFIG, attending=BOTH, known=whole)
    sizes = {point.size for point in whole.points if point[:2] == ("verify", 2)}
    assert {2, 3, 8, 9, 12, 13} <= sizes
    assert {p.term for p in whole.points} == {
        "verify", "draft", "draft_rows", "draft_root", "target_store", "draft_store", "target_path",
        "draft_path", "context", "draft_context",
    }  # fmt: skip
    assert {p.size for p in whole.points if p[:2] == ("draft_store", 2)} == {1, 2}
    rows = {point.size: point.ms for point in whole.points if point[:2] == ("draft_rows", 2)}
    assert rows.keys() == {3, 8, 13}
    assert rows[3] == 0.0 < rows[8] < rows[13], "what is more than the fewest rows"
    timed = {(step.tree, step.rule) for step in whole.steps if step.batch_size == 1}
    assert {(name, "greedy") for name in step_trees(12)} <= timed
    assert {("off", "naive"), ("default-12", "mss"), ("chain-1", "mss_truncated")} <= timed
    for rule in StepRule:
        cost = StepCost.from_table(whole, rule)
        cost.require([1, 2], 12)
        assert cost.step_ms(1, DEFAULT_TREE) > 0
        assert cost.step_ms(2, Tree.chain(0)) > 0


@pytest.mark.parametrize("max_nodes", [2, 12, 64, 255])
def test_few_steps_are_some_of_all(max_nodes: int) -> None:
    few = ProbeConfig("h200", max_nodes=max_nodes, few_steps=True)
    keys, all_keys = (
        {(stage.kind, *key) for stage in missing_stages(config, BOTH, None) for key in stage.keys}
        for config in (few, replace(few, few_steps=False))
    )
    assert keys < all_keys
    assert {kind for kind, *_ in all_keys - keys} == {"steps"}
    for batch_size in few.batch_sizes:
        timed = {key[2] for key in keys if key[:2] == ("steps", batch_size)}
        assert {"off", "chain-1", "chain-2"} <= timed, "a overhead needs two"


def test_few_steps_predict_every_rule(whole: RuntimeTable) -> None:
    config = replace(CONFIG, few_steps=True)
    keys = {
        key for s in missing_stages(config, NEITHER, None) for key in s.keys if s.kind == "steps"
    }
    steps = [s for s in whole.steps if (s.batch_size, s.tree, s.rule) in keys]
    assert {s.rule for s in steps} == {"greedy", "mss", "mss_truncated"}
    assert len(steps) < len(whole.steps)
    table = whole.model_copy(update={"steps": tuple(steps)})
    for rule in StepRule:
        cost = StepCost.from_table(table, rule)
        cost.require([1, 2], 12)
        assert cost.step_ms(1, DEFAULT_TREE) > cost.step_ms(1, Tree.chain(0)) > 0


@pytest.mark.parametrize("killed_at", [0, 1, 3, 9, 12])
def test_a_killed_probe_goes_on_where_it_was(
    pair: Pair, whole: RuntimeTable, clockless: Any, killed_at: int, tmp_path: Path
) -> None:
    calls = itertools.count()

    def dies(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return invented(works)

    path = tmp_path / "table.yaml"
    clockless(dies)
    known = None
    try:
        for table in probe(pair, CONFIG):
            save_runtime_table(table, path)
    except KeyboardInterrupt:
        known = load_runtime_table(path) if path.exists() else None
    before = measured_keys(known) if known else set()
    again: list[Any] = []
    clockless(lambda works, *a, **k: again.append(len(works)) or invented(works))
    *_, table = probe(pair, CONFIG, known=known)
    assert measured_keys(table) == measured_keys(whole)
    assert sorted(table.points) == sorted(whole.points)
    assert sorted(table.steps) == sorted(whole.steps)
    assert sorted(table.rules) == sorted(whole.rules)
    if known is not None:
        assert extends(known, pair, CONFIG)
        assert known.points == table.points[: len(known.points)], "what was measured stays"
        assert len(again) <= 2 * (1 + 1 + 8) - 1 - killed_at + 1, "not all again"
    assert (known is None) == (not before)


def test_a_gpu_that_disappears_is_one_sentence_and_keeps_what_was_measured(
    pair: Pair, clockless: Any
) -> None:
    calls = itertools.count()

    def lost(works: Mapping[Any, Work], *_: object, **__: object) -> dict[Any, Timing]:
        if next(calls) == 1:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore lines")
        return invented(works)

    clockless(lost)
    tables = []
    with pytest.raises(BackendUnavailable, match="measuring passes at batch size 1") as caught:
        tables += probe(pair, CONFIG)
    assert "\n" not in str(caught.value)
    clockless(lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(probe(pair, CONFIG))


def test_what_does_not_fit_is_recorded_and_not_tried_again(
    pair: Pair, clockless: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_rule = probe_passes.GreedyRule

    def small(plan: Any, backend: Any) -> Any:
        if plan.tree.num_tokens > 9:
            raise torch.OutOfMemoryError("too large")
        return make_rule(plan, backend)

    monkeypatch.setattr(probe_passes, "GreedyRule", small)
    *_, table = probe(pair, CONFIG)
    missing = {row[:3] for row in table.no_room}
    assert {("verify", 1, 12), ("verify", 2, 13), ("draft", 2, 6)} <= missing
    assert ("verify", 2, 9) not in missing
    assert not missing_stages(CONFIG, attending=BOTH, known=table)


def test_a_larger_probe_adds_to_a_smaller_one(pair: Pair, whole: RuntimeTable) -> None:
    larger = ProbeConfig("cpu", context=64, batch_sizes=(1, 2, 4), max_nodes=16)
    assert extends(whole, pair, larger)
    *_, table = probe(pair, larger, known=whole)
    assert set(whole.points) < set(table.points)
    assert not missing_stages(larger, attending=BOTH, known=table)
    assert not extends(whole, pair, ProbeConfig("cpu", context=128))


def test_the_plan_covers_both_sides_of_every_padding_step() -> None:
    config = ProbeConfig("h200", max_nodes=255)
    stages = missing_stages(config, attending=NEITHER, known=None)
    sizes = {key[2] for stage in stages for key in stage.keys if key[:2] == ("verify", 64)}
    for edge in (8, 16, 32, 48, 64, 96, 128, 192):
        assert {edge, edge + 1} <= sizes
    assert max(sizes) == 256
    steps = [stage for stage in stages if stage.kind == "steps"]
    between = off_sizes(config.batch_sizes)
    assert {stage.batch_size for stage in steps} == {*config.batch_sizes, *between}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 12, 32, 100, 128, 256])
def test_passes_are_on_both_sides_of_every_change_of_kernels(batch_size: int) -> None:
    config = ProbeConfig("h200", batch_sizes=(batch_size,))
    stages = missing_stages(config, attending=NEITHER, known=None)
    sizes = {key[2] for stage in stages for key in stage.keys if key[0] == "verify"}
    for edge in ROW_EDGES:
        below = edge // batch_size
        assert {size for size in (below, below + 1) if 2 <= size <= 65} <= sizes, edge
    assert len(sizes) < 55


def test_whole_steps_are_on_both_sides_too() -> None:
    tokens = {tree.num_tokens for tree in step_trees(64).values()}
    for edge in ROW_EDGES[1:-1]:
        for batch_size in (1, 2, 4, 8, 16, 32):
            below = edge // batch_size
            assert {size for size in (below, below + 1) if size > 1} <= tokens, (edge, batch_size)


def test_off_is_timed_on_both_sides_of_every_change_of_kernels() -> None:
    assert off_sizes(ProbeConfig("h200").batch_sizes) == [9, 17, 33]
    assert off_sizes((1, 256)) == [2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129]
    assert off_sizes((8,)) == off_sizes((1, 2, 4, 8)) == []
    config = ProbeConfig("h200", batch_sizes=(16, 64))
    *_, last = missing_stages(config, attending=NEITHER, known=None)
    assert last == ("steps", 33, ((33, "off", "greedy"),))


def test_the_shape_says_what_a_cache_holds(pair: Pair) -> None:
    assert kernel_rows.MAX_BUFFERED == MAX_BUFFERED
    cost = model_cost(pair.target.shape, pair.target_ref, pair.target.dtype.itemsize)
    assert cost.held_bytes == pair.target.shape.num_parameters * pair.target.dtype.itemsize


class Clock:
    """Works that take as long as a script says, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def work(self, name: str, seconds: Callable[[int], float]) -> Work:
        calls = itertools.count()

        def run() -> None:
            self.log.append(name)
            self.now += seconds(next(calls))

        return run


def test_a_noisy_candidate_is_measured_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    works = {
        "still": clock.work("still", lambda call: 0.01),
        "noisy": clock.work("noisy", lambda call: 0.01 * (1 + 0.3 * (call % 3))),
    }
    found = time_interleaved(works, CPU, Effort(4, 20, 0.0))
    assert clock.log.count("noisy") > 2 * clock.log.count("still")
    assert found["still"].ms == pytest.approx(10.0)
    assert found["still"].spread_ms == pytest.approx(0.0, abs=1e-9)


def test_rounds_in_which_all_is_slow_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    throttled = range(4, 7)
    works = {
        name: clock.work(name, lambda call: 0.01 * (1.2 if call in throttled else 1.0))
        for name in ("a", "b", "c")
    }
    found = time_interleaved(works, CPU, Effort(5, 20, 0.0))
    assert [timing.ms for timing in found.values()] == pytest.approx([10.0] * 3)
    assert max(timing.spread_ms for timing in found.values()) < 0.01


def test_a_short_step_recovers_from_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seconds = {"long": 0.05, "short": 0.002, "shorter": 0.001}
    works = {name: clock.work(name, lambda _, own=own: own) for name, own in seconds.items()}  # type: ignore[misc]
    # By wall time nothing asks for a device.
    found = time_interleaved(works, torch.device("cuda"), Effort(3, 3, 0.0), wall=True)
    assert {name: timing.ms for name, timing in found.items()} == pytest.approx(
        {name: 1e3 * own for name, own in seconds.items()}
    )
    runs = [(name, len(list(calls))) for name, calls in itertools.groupby(clock.log)]
    assert [name for name, _ in runs[2:]] == 3 * ["shorter", "short", "long"]
    assert runs[5] == runs[8] == ("shorter", 100 + WALL_CYCLE), "100 ms behind the long one"


def test_a_deadline_leaves_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    works = {"a": clock.work("a", lambda call: 0.01)}
    time_interleaved(works, CPU, Effort(3, 50, 10.0), until=0.0)
    few = len(clock.log)
    time_interleaved(works, CPU, Effort(3, 50, 10.0))
    assert few < 10 < len(clock.log) - few


@pytest.mark.gpu
def test_a_gpu_is_probed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "quick", Budget(5.0, Effort(3, 5, 0.0)))
    folders = [Library.open().find_model(name) for name in ("demo-target", "demo-draft")]
    demo = load_pair(*map(folder_source, folders), Runtime("cuda"))
    config = ProbeConfig("gpu", batch_sizes=(1, 4), max_nodes=12)
    *_, table = probe(demo, config)
    assert not missing_stages(config, attending(demo), table)
    assert not table.no_room
    assert {point.term for point in table.points} >= {"host", "context", "target_store"}
    assert all(point.ms > 0 for point in table.points if point.term in ("verify", "host"))
    for rule in StepRule:
        cost = StepCost.from_table(table, rule)
        for step in table.steps:
            if step.rule == rule:
                tree = table.trees[step.tree].build()
                predicted = cost.step_ms(step.batch_size, tree, step.tokens_per_step)
                assert 0.5 < predicted / step.ms < 2, (step, predicted)
