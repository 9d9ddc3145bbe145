"""Which kernels are compiled before a probe, by whom, and what happens when that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mtp_models import bamba_with_head
from tiny_models import save_pair

from stree_autotune.probe import ahead
from stree_autotune.probe.ahead import Job, compile_ahead, cut_down, one_of_each, shares
from stree_autotune.probe.plan import Attending, ProbeConfig, ProbeStage, missing_stages
from stree_autotune.probe.run import Found
from stree_autotune.store.library import Library
from stree_core.drafting.pair import Pair, Runtime, load_pair
from stree_core.families import ModelShape, in_fp8
from stree_core.fp8 import Fp8Scheme
from stree_core.models.source import folder_source, head_source, spec_source

CONFIG = ProbeConfig("h200")
BOTH = Attending(target=True, draft=True)
SPECS = sorted(Path(Library.open(()).find_shape("mamba2-2.7b")).parent.glob("*.yaml"))


def kinds(shape: ModelShape) -> list[object]:
    return [ahead._kind(block, shape) for block in shape.blocks]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    save_pair(root)
    target, draft = (folder_source(root / "models" / f"tiny-{n}") for n in ("target", "draft"))
    return load_pair(target, draft, Runtime("cpu"))


@pytest.fixture
def on_gpu(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pair as if it was on a GPU with much memory, of a machine with 16 processors."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "_code_digest", lambda device: "code")
    monkeypatch.setattr(ahead, "free_bytes", lambda device: 100 << 30)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(16))
    backend = SimpleNamespace(name="triton")
    target = SimpleNamespace(dtype=torch.bfloat16, backend=backend, shape=pair.target.shape)
    return SimpleNamespace(
        device=torch.device("cuda"), target=target, draft=pair.draft,
        target_source=pair.target_source, draft_source=pair.draft_source,
    )  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that are run, all of them with success."""
    jobs: list[Job] = []

    def run(job: Job) -> ahead._Outcome:
        jobs.append(job)
        return ahead._Outcome(list(job.stages), "")

    monkeypatch.setattr(ahead, "_run", run)
    return jobs


def probed(config: ProbeConfig = CONFIG) -> list[ProbeStage]:
    return missing_stages(config, BOTH, None)


def in_order(stages: Sequence[ProbeStage]) -> list[ProbeStage]:
    return sorted(stages, key=probed().index)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
@pytest.mark.parametrize("weights", [None, "fp8-block"])
def test_every_kind_of_block_is_kept_once_and_all_sizes(path: Path, weights: Any) -> None:
    whole = spec_source(path, weights).shape
    cut = one_of_each(whole)
    for before, after in ((whole, cut), (whole.mtp, cut.mtp)):
        assert (before is None) == (after is None)
        if before is None or after is None:
            continue
        assert kinds(after) == list(dict.fromkeys(kinds(before)))
        assert replace(after, blocks=before.blocks, mtp=before.mtp) == before
        assert {part.mixer for part in after.parts} == {part.mixer for part in before.parts}


def test_a_block_that_stays_out_of_fp8_is_another_kind() -> None:
    (path,) = (path for path in SPECS if path.stem == "mamba2-2.7b")
    shape = spec_source(path).shape
    key = next(iter(shape.blocks[5].parts[0].weights["in_proj"].keys))
    scheme = Fp8Scheme("fp8-block", "config.json", skipped=(key.removesuffix(".weight"),))
    assert len(one_of_each(shape).blocks) == 1
    assert one_of_each(in_fp8(shape, scheme)).blocks == (shape.blocks[0], shape.blocks[5])


@pytest.mark.parametrize("most", [1, 2, 3, 7, 11, 100])
def test_processes_share_the_stages_of_the_probe(most: int) -> None:
    stages = probed()
    found = shares(stages, most)
    assert in_order([stage for share in found for stage in share]) == stages
    sizes = [{stage.batch_size for stage in share} for share in found]
    assert sum(map(len, sizes)) == len(set().union(*sizes)), "a batch size is one process's"
    assert len(found) == min(most, len(set().union(*sizes)))
    passes = [sum(stage.kind == "passes" for stage in share) for share in found]
    assert max(passes) <= -(-7 // min(most, 7)), "the large ones are apart"
    for share in found:
        for size in {stage.batch_size for stage in share}:
            own = [stage for stage in share if stage.batch_size == size]
            assert own == [stage for stage in stages if stage.batch_size == size]


def test_all_stages_are_compiled_once_without_a_checkpoint(on_gpu: Any, started: list[Job]) -> None:
    lines: list[str] = []
    compile_ahead(on_gpu, CONFIG, None, lines.append)
    assert in_order([stage for job in started for stage in job.stages]) == probed()
    assert lines == [f"compiling kernels for 7 batch sizes, {len(started)} processes"]
    for job in started:
        assert job.runtime == Runtime("cuda", "bfloat16", "triton")
        assert job.config == CONFIG
        assert job.target.folder is job.draft.folder is None
        assert copy.deepcopy(job) == job


def test_what_was_compiled_is_not_compiled_again(on_gpu: Any, started: list[Job]) -> None:
    lines: list[str] = []
    small = replace(CONFIG, batch_sizes=(1, 2, 4))
    compile_ahead(on_gpu, small, None, lines.append)
    first = len(started)
    compile_ahead(on_gpu, small, None, lines.append)
    assert len(started) == first
    assert len(lines) == 1
    compile_ahead(on_gpu, replace(small, context=64), None, lines.append)
    assert len(started) == 2 * first, "other sizes, other kernels"


def test_what_was_measured_is_not_compiled(
    on_gpu: Any, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [stage for stage in probed() if stage.batch_size > 8]
    monkeypatch.setattr(ahead, "missing_stages", lambda *_: left)
    compile_ahead(on_gpu, CONFIG, None, lambda line: None)
    assert in_order([stage for job in started for stage in job.stages]) == left


@pytest.mark.parametrize(
    "change",
    [
        lambda gpu: setattr(gpu, "device", torch.device("cpu")),
        lambda gpu: setattr(gpu.target.backend, "name", "torch"),
    ],
)
def test_nothing_is_started_without_kernels(
    on_gpu: Any, started: list[Job], change: Callable[[Any], None]
) -> None:
    change(on_gpu)
    compile_ahead(on_gpu, CONFIG, None, pytest.fail)
    assert not started


@pytest.mark.parametrize(
    ("processors", "free", "config"),
    [(2, 100, CONFIG), (16, 5, CONFIG), (16, 100, replace(CONFIG, batch_sizes=(8,)))],
    ids=["few processors", "little memory", "one batch size"],
)
def test_nothing_is_started_where_it_does_not_help(
    on_gpu: Any, started: list[Job], monkeypatch: pytest.MonkeyPatch, processors: int, free: int,
    config: ProbeConfig,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(processors))
    monkeypatch.setattr(ahead, "free_bytes", lambda device: free << 30)
    compile_ahead(on_gpu, config, None, pytest.fail)
    assert not started


def test_a_process_that_fails_leaves_the_rest_to_the_probe(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Job) -> ahead._Outcome:
        is_large = any(stage.batch_size == 64 for stage in job.stages)
        return ahead._Outcome(list(job.stages[:1]), "out of memory" if is_large else "")

    monkeypatch.setattr(ahead, "_run", fails)
    lines: list[str] = []
    compile_ahead(on_gpu, CONFIG, None, lines.append)
    assert len(lines) == 2
    assert lines[1].startswith("1 of 11 processes compiled in part (out of memory)")
    again = ahead._marks(cut_down(on_gpu, CONFIG), probed(), "code")
    assert sum(mark.exists() for mark in again.values()) == 11, "one stage of each"


@pytest.mark.parametrize("headed", [False, True])
def test_a_process_runs_its_stages_on_the_pair_that_is_cut_down(
    pair: Pair, headed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bamba_with_head(tmp_path).pair if headed else pair
    config = replace(CONFIG, context=64, batch_sizes=(1, 2), max_nodes=4)
    job = replace(cut_down(whole, config), stages=tuple(probed(config)[1:4]))
    ran: list[ProbeStage] = []

    def run(cut: Pair, its: ProbeConfig, stage: ProbeStage, setting: Any, found: Found) -> None:
        assert (cut.target.shape, its) == (one_of_each(whole.target.shape), config)
        assert cut.draft.shape == one_of_each(whole.draft.shape)
        assert cut.target.dtype == whole.target.dtype
        assert setting.batch_size == stage.batch_size
        ran.append(stage)

    monkeypatch.setattr(ahead, "measure_stage", run)
    assert list(ahead.compiled(job)) == [0, 1, 2]
    assert ran == list(job.stages)


def test_a_process_of_its_own_says_what_it_did_and_why_not(pair: Pair) -> None:
    config = replace(CONFIG, context=64, batch_sizes=(1,), max_nodes=1, sampled=False)
    stages = tuple(stage for stage in probed(config) if stage.kind == "passes")
    job = replace(cut_down(pair, config), stages=stages)
    assert ahead._run(job) == (list(stages), "")
    done, failure = ahead._run(replace(job, runtime=Runtime("cpu", "bfloat16", "triton")))
    assert not done
    assert "backend triton needs a CUDA device" in failure


def test_a_head_without_files_is_its_targets(tmp_path: Path) -> None:
    whole = bamba_with_head(tmp_path).pair
    job = cut_down(whole, CONFIG)
    assert head_source(job.target).shape == job.draft.shape
