"""Two thousand mutated files, and files that once ended in a traceback: one sentence each."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stree_core.errors import StreeError

HERE = Path(__file__).parent
NUM_INPUTS = 2_000
CORPUS = sorted(path for path in (HERE / "corpus").rglob("*") if path.is_file())
NAMES = [
    "profile",
    "runtime table",
    "trace",
    "certificate",
    "GPU spec",
    "shape spec",
    "library index",
    "config.json",
    "generation_config.json",
    "weight index",
    "safetensors weights",
    "tokenizer.json",
    "prompts",
]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The script, whose modules find each other as if it was run."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    try:
        return importlib.import_module("fuzz")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def bench(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Bench(tmp_path_factory.mktemp("corpus"))


def loader_of(fuzz: ModuleType, name: str) -> Any:
    return next(loader for loader in fuzz.LOADERS if loader.name == name)


def test_every_loader_is_here(fuzz: ModuleType) -> None:
    assert [loader.name for loader in fuzz.LOADERS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_end_in_one_sentence(fuzz: ModuleType, tmp_path: Path, name: str) -> None:
    num_inputs = -(-NUM_INPUTS // len(NAMES))
    tally = fuzz.fuzz([loader_of(fuzz, name)], num_inputs, 0, tmp_path)[name]
    assert tally.inputs == num_inputs
    assert tally.failures == []
    assert tally.timeouts == []
    # neither is everything refused nor everything taken
    assert 0 < tally.accepted < num_inputs


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_failed_ends_in_one_sentence(fuzz: ModuleType, bench: Any, path: Path) -> None:
    name = path.parent.name.replace("_", " ")
    loader = next(each for each in fuzz.LOADERS if each.name.lower() == name)
    assert fuzz.read_one(loader, bench, path.read_bytes()) in ("accepted", "refused")


def test_mutations_of_scalars_and_empty_files_can_be_made(fuzz: ModuleType) -> None:
    for data in (b"3", b"[]", b"{}", b'""', b"null"):
        for number in range(200):
            generator = fuzz.random.Random(number)
            assert isinstance(fuzz.mutate(generator, data, fuzz.LOADERS[6].form), bytes)


def test_faults_and_timeouts_are_told_apart(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that raises, hangs, dies or takes too much memory, by its input."""

    def read(_: Any, data: bytes) -> None:
        if data == b"raise":
            raise KeyError("x")
        if data == b"loop":
            while True:
                pass
        if data == b"die":
            fuzz.os.abort()
        if data == b"grow":
            bytearray(2 << 30)
        if data == b"refuse":
            raise StreeError("no")

    inputs = [b"good", b"raise", b"refuse", b"die", b"loop", b"grow", b"good"]
    monkeypatch.setattr(fuzz, "make_input", lambda *arguments: inputs[arguments[-1]])
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.5)
    loader = fuzz.Loader("own", lambda _: [b"good"], None, read)
    tally = fuzz.fuzz([loader], len(inputs), 0, tmp_path)["own"]
    assert (tally.inputs, tally.accepted, tally.timeouts) == (7, 2, [4])
    assert [number for number, _ in tally.failures] == [1, 3, 5]
    assert "KeyError" in tally.failures[0][1]
    assert "MemoryError" in tally.failures[2][1]
