"""Recording that is killed, divided or disturbed ends in the file of one undisturbed process."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, ours, perturbed, random_texts, save_pair, tiny_mamba2

from stree_autotune.cli.commands import main
from stree_autotune.cli.trace import record_share, settings_of
from stree_autotune.trace import checkpoint as trace_parts
from stree_autotune.trace.checkpoint import TraceCheckpoint, explained_writing
from stree_autotune.trace.file import Trace, load_trace, save_trace
from stree_autotune.trace.record import RecordConfig, make_trace, record_trace
from stree_autotune.trace.shard import Shard, current_shard, take_own_gpu
from stree_core.drafting.draft import ModelDraft
from stree_core.drafting.pair import Pair
from stree_core.engine.engine import Engine
from stree_core.errors import BackendUnavailable, ConfigError, NonFiniteLogits, NotEnoughMemory
from stree_core.models.source import ModelSource
from stree_core.profile import ModelRef, Sampling

REF = ModelRef(name="tiny", config_sha256="0" * 64, tokenizer_sha256="0" * 64)
CONFIG = RecordConfig("tiny", num_children=4, max_new_tokens=10, num_slots=3)
SAMPLED = RecordConfig("tiny", Sampling(rule="mss", temperature=1.0), 4, 10, 3, seed=5)
NUM_KILLS = 20


class Killed(BaseException):
    """What ends a recording in the middle."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = ours(tiny_mamba2(layers=1), folder / "target")
    draft = ours(perturbed(tiny_mamba2(layers=1), 0.1), folder / "draft")
    source = ModelSource(REF, target.shape, None)
    return Pair(target, ModelDraft(draft), source, source, None)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (8,), generator=generator).tolist()
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def whole(pair: Pair, prompts: list[list[int]]) -> Trace:
    return record_trace(pair, prompts, CONFIG)


@pytest.fixture
def parts(pair: Pair, prompts: list[list[int]], tmp_path: Path) -> TraceCheckpoint:
    return TraceCheckpoint(tmp_path / "t.safetensors", settings_of(pair, prompts, CONFIG))


def record(
    pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, shard: Shard
) -> Trace | None:
    """Do one process's share; return the trace when all of it is there."""
    recordings = record_share(pair, prompts, CONFIG, parts, shard, force=False)
    return make_trace(pair, recordings, CONFIG) if len(recordings) == len(prompts) else None


def same_bytes(one: Trace, other: Trace, folder: Path) -> bool:
    """Return whether two traces have the same file but for `provenance`."""
    meta = other.meta.model_copy(update={"provenance": one.meta.provenance})
    save_trace(one, folder / "one")
    save_trace(Trace(other.ranks, other.offsets, meta), folder / "other")
    return (folder / "one").read_bytes() == (folder / "other").read_bytes()


def end_steps(trace: Trace) -> list[int]:
    """Return after how many engine steps each prompt of `trace` ends, batches one by one."""
    lengths = (trace.offsets[1:] - trace.offsets[:-1]).tolist()
    ends, before = [], 0
    for first in range(0, len(lengths), CONFIG.num_slots):
        batch = lengths[first : first + CONFIG.num_slots]
        ends += [before + length for length in batch]
        before += max(batch)
    return ends


def kill_at(step: int, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the engine's step number `step` (from 0) fail."""
    count = iter(range(1 << 30))
    whole_step = Engine.step

    def fail_in_time(self: Engine, which: int = 0) -> object:
        if next(count) == step:
            raise error
        return whole_step(self, which)

    patch.setattr(Engine, "step", fail_in_time)


def record_until(step: int, pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint) -> None:
    """Record and be killed in the engine's step number `step`."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(step, patch, Killed())
        with pytest.raises(Killed):
            record(pair, prompts, parts, Shard())


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_killed_recording_goes_on(
    seed: int,
    pair: Pair,
    prompts: list[list[int]],
    parts: TraceCheckpoint,
    whole: Trace,
    tmp_path: Path,
) -> None:
    ends = end_steps(whole)
    step = random.Random(seed).randrange(max(ends))
    record_until(step, pair, prompts, parts)
    finished = {prompt for prompt, end in enumerate(ends) if end <= step}
    assert set(parts.begin(force=False)) == finished, "only prompts under way are lost"
    resumed = record(pair, prompts, parts, Shard())
    assert resumed is not None
    assert same_bytes(whole, resumed, tmp_path)
    parts.remove()
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_write_what_one_would(
    count: int, pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, whole: Trace,
    tmp_path: Path,
) -> None:  # fmt: skip
    traces = [record(pair, prompts, parts, Shard(rank, count)) for rank in range(count)]
    last = min(count, len(end_steps(whole)) // CONFIG.num_slots + 1) - 1
    assert all(trace is None for trace in traces[:last])
    assert traces[last] is not None
    assert same_bytes(whole, traces[last], tmp_path)


def test_sampled_prompts_are_the_same_in_any_shard(
    pair: Pair, prompts: list[list[int]], tmp_path: Path
) -> None:
    alone = record_trace(pair, prompts, SAMPLED)
    parts = TraceCheckpoint(tmp_path / "s.safetensors", settings_of(pair, prompts, SAMPLED))
    for rank in (1, 0):
        found = record_share(pair, prompts, SAMPLED, parts, Shard(rank, 2), force=False)
    assert same_bytes(alone, make_trace(pair, found, SAMPLED), tmp_path)


def test_other_settings_are_not_mixed(
    pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, tmp_path: Path
) -> None:
    record_until(15, pair, prompts, parts)
    assert parts.begin(force=False)
    other = TraceCheckpoint(parts.output, {**parts.settings, "batch_size": 4})
    with pytest.raises(ConfigError, match=r"begun with batch_size 3 and not 4; .* --force"):
        other.begin(force=False)
    assert parts.begin(force=False), "a refusal deletes nothing"
    changed = settings_of(pair, [[1, 2], *prompts[1:]], CONFIG)
    with pytest.raises(ConfigError, match="begun with prompts "):
        TraceCheckpoint(parts.output, changed).begin(force=False)
    assert other.begin(force=True) == {}
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_full_disk_loses_nothing(
    pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, whole: Trace, tmp_path: Path
) -> None:
    with parts.appending(0):
        (path,) = tmp_path.glob("*.jsonl")
    # The header, some lines and a part of one more.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 150, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written .* run the same command again"):
            record(pair, prompts, parts, Shard())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.read_bytes().endswith(b"\n"), "the last line is cut off"
    assert 1 <= len(parts.begin(force=False)) < len(prompts)
    resumed = record(pair, prompts, parts, Shard())
    assert resumed is not None
    assert same_bytes(whole, resumed, tmp_path)


def test_a_trace_that_cannot_be_written_leaves_the_parts(tmp_path: Path, whole: Trace) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    refusal = pytest.raises(ConfigError, match="what was recorded is kept")
    with refusal, explained_writing(blocked / "t"):
        save_trace(whole, blocked / "t")


def test_a_damaged_part_is_named(
    pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, tmp_path: Path
) -> None:
    record(pair, prompts, parts, Shard())
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().split(b"\n")
    for wrong in (b"{", b'{"prompt": -1, "repeated": 0, "ranks": ""}', lines[2][:-2] + b'f"}'):
        path.write_bytes(b"\n".join([*lines[:2], wrong, *lines[3:]]))
        with pytest.raises(ConfigError, match=r"part-0\.jsonl line 3 must be a finished prompt"):
            parts.begin(force=False)
    path.write_bytes(b"nonsense\n")
    with pytest.raises(ConfigError, match="settings that cannot be read"):
        parts.begin(force=False)


def test_one_process_at_a_time_writes_a_part(parts: TraceCheckpoint) -> None:
    refusal = pytest.raises(ConfigError, match="one process at a time")
    with parts.appending(0), parts.appending(1), refusal, parts.appending(1):
        pass
    with parts.appending(1):
        pass


def test_a_huge_part_is_refused(parts: TraceCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with parts.appending(0):
        monkeypatch.setattr(trace_parts, "MAX_PART_BYTES", 10)
        with pytest.raises(ConfigError, match="at most 10 bytes"):
            parts.begin(force=False)


def test_a_device_that_fails_says_so(
    pair: Pair, prompts: list[list[int]], parts: TraceCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(15, monkeypatch, torch.AcceleratorError("CUDA error: unspecified launch failure\nX"))
    with pytest.raises(BackendUnavailable, match=r"failed \(CUDA error.*same command again"):
        record(pair, prompts, parts, Shard())
    assert parts.begin(force=False)


def test_prompts_that_cannot_be_run_are_named(
    pair: Pair, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="number 2 has none"):
        record_trace(pair, [[1], [], [2]], CONFIG)
    monkeypatch.setattr("stree_core.memory.free_bytes", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="the longest prompt, number 2, has 40 tokens"):
        record_trace(pair, [[1], [1] * 40, [2]], CONFIG)


def test_broken_logits_end_the_recording(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_step = Engine.step

    def sick(self: Engine, which: int = 0) -> object:
        result = whole_step(self, which)
        result.healthy[0] = False
        return result

    monkeypatch.setattr(Engine, "step", sick)
    with pytest.raises(NonFiniteLogits):
        record_trace(pair, [[1, 2]], CONFIG)


def test_shards_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_shard({}) == Shard(0, 1, 0)
    assert current_shard({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Shard(3, 4, 1)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError, match="RANK counts from 0"):
            current_shard(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"has 1 and process 1 .* lower --nproc-per-node"):
        take_own_gpu(Shard(1, 2, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the tiny pair and prompts for several seconds."""
    save_pair(tmp_path / "stree-data")
    rows = [f'{{"question": "{text}"}}\n' for text in random_texts(32)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    return tmp_path


def command(*launcher: str) -> list[str]:
    return [
        sys.executable, "-m", *launcher, "stree_autotune", "trace", "--dataset", "toys",
        "--prompts", "prompts.jsonl", "--target", "tiny-target", "--draft", "tiny-draft",
        "--batch-size", "4", "--max-new-tokens", "40",
    ]  # fmt: skip


def workers_of(launcher: int) -> list[int]:
    """Return the processes that a process has started, by their ids."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_a_worker_killed_under_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one killed for good; then two again, then the same with one process."""
    two = command("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    traces = folder / "stree-data" / "traces"
    launcher = subprocess.Popen(two, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        started = time.monotonic()
        while sum(path.read_bytes().count(b"\n") for path in traces.glob("*.jsonl")) < 4:
            assert launcher.poll() is None
            assert time.monotonic() - started < 120
            time.sleep(0.02)
        os.kill(workers_of(launcher.pid)[0], signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    finally:
        launcher.kill()
        launcher.communicate()
    assert not list(traces.glob("*.safetensors"))

    again = subprocess.run(two, cwd=folder, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on after" in again.stderr
    assert "wrote " in again.stdout
    assert not list(traces.glob("*.jsonl"))
    (path,) = traces.glob("*.safetensors")
    divided = load_trace(path)
    assert divided.meta.provenance.command.startswith("stree-tune trace --dataset toys")

    monkeypatch.chdir(folder)
    flags = command("")[5:]
    monkeypatch.setattr(sys, "argv", ["stree-tune", "trace", *flags, "--force"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert same_bytes(load_trace(path), divided, folder)
