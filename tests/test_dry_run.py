"""Benchmarks without their GPU: kernels are compiled, carried, and found under Triton's names."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import script
from triton.runtime.cache import get_cache_key

ROOT = Path(__file__).resolve().parents[1]
DRAFT = ("draft.py", "--models", "mamba2-130m", "--batches", "1", "--tokens", "1")


def dry_run(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "benchmarks" / "dry_run.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_kernels_are_compiled_carried_and_found_under_triton_s_names(tmp_path: Path) -> None:
    cache, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "kernels.tar.xz"
    done = dry_run(cache, *DRAFT, "--output", str(tmp_path / "draft.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "draft.json").read_text())["rows"][0]["tokens"] == 1
    kernels = list(cache.rglob("*.cubin"))
    assert len(kernels) > 4

    packed, unpacked = (
        dry_run(cache, "--pack", str(archive)),
        dry_run(there, "--unpack", str(archive)),
    )
    assert packed.stdout.startswith(f"{len(kernels)} kernels in ")
    assert unpacked.stdout.startswith(f"{len(kernels)} kernels in ")
    folder_of = script("dry_run").folder_of
    for recipe in (cache / "recipes").glob("*.json"):
        parts = json.loads(recipe.read_text())
        hashed = [
            SimpleNamespace(hash=functools.partial(parts.get, name))
            for name in ("source", "backend", "options")
        ]
        digest = hashlib.sha256(get_cache_key(*hashed, env_vars={}).encode()).hexdigest()
        (group,) = (there / folder_of(digest)).glob("__grp__*.json")
        paths = json.loads(group.read_text())["child_paths"].values()
        assert all(Path(path).exists() for path in paths)
        assert any(path.endswith(".cubin") for path in paths)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (DRAFT, "a dry run writes no results"),
        (("live.py", "--write"), "leave it out"),
        ((), "got nothing"),
    ],
)
def test_nothing_that_ships_is_overwritten(
    words: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    done = dry_run(tmp_path, *words)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].count(reason) == 1
