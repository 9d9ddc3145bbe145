"""Run what needs a GPU without one: its kernels are compiled, and its errors are found.

    export TRITON_CACHE_DIR=DIR TRITON_STORE_BINARY_ONLY=1
    python benchmarks/dry_run.py probe --shapes mamba2-2.7b,mamba2-130m --gpu h200 --force
    python benchmarks/dry_run.py kernels.py --output kernels.json
    python -O benchmarks/dry_run.py tests -m gpu
    python benchmarks/dry_run.py --pack kernels.tar.xz        here, all that DIR holds
    python benchmarks/dry_run.py --unpack kernels.tar.xz      on the machine that has the GPU

A verb of stree-tune, a script of this folder, or the tests, with their own arguments. Shapes are
cut down to one block of each kind, numbers mean nothing, and nothing that ships is overwritten:
results must go elsewhere (--output). The GPU is an H200 (pretend_gpu.py). Triton finds what was
compiled when its version is the same on both machines: `--unpack` renames the kernels by its key.
Tests that judge numbers fail here; what they launched before is compiled all the same.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
TESTS = "tests"
KEPT = {".cubin", ".json"}
BANDWIDTH = 4e12
WRITES = "--write"


def main() -> None:
    options, words = parse()
    cache = os.environ.get("TRITON_CACHE_DIR")
    if cache is None:
        raise SystemExit("kernels need a folder, TRITON_CACHE_DIR is not set; export it")
    if options.pack is not None:
        pack(Path(cache), options.pack)
    elif options.unpack is not None:
        unpack(options.unpack, Path(cache))
    elif words:
        run(words)
    else:
        raise SystemExit("a verb, a script or tests must be named, got nothing; see --help")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Run what needs a GPU without one")
    parser.add_argument(
        "--pack", type=Path, help="write the kernels of the cache into this archive"
    )
    parser.add_argument(
        "--unpack", type=Path, help="take the kernels of this archive into the cache"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help="a verb, a script, or tests")
    options = parser.parse_args()
    return options, options.words


def run(words: list[str]) -> None:
    """Run a verb, a script or the tests on a GPU that is not there."""
    import pretend_gpu

    if WRITES in words:
        raise SystemExit(f"a dry run measures nothing that {WRITES} could write; leave it out")
    if words[0] == TESTS:
        # What transformers imports compares torch's functions, and finds those below alike.
        importlib.import_module("torch._dynamo")
    pretend_gpu.install()
    sys.path.insert(0, str(BENCHMARKS))
    with pretend_gpu.ours_without_gpu():
        cut_models_down()
        time_one_step()
        first, *rest = words
        if first == TESTS:
            import pytest

            plain = ["--assert=plain", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore"]
            raise SystemExit(pytest.main([*plain, *(rest or ["-m", "gpu"])]))
        sys.argv = words
        if first.endswith(".py"):
            without_gate()
            runpy.run_path(str(BENCHMARKS / first), run_name="__main__")
        else:
            from stree_autotune.cli import commands

            compile_in_this_process()
            sys.argv = ["stree-tune", *words]
            commands.main()


def cut_models_down() -> None:
    """Load what has no files with one block of each kind."""
    from stree_autotune.probe.ahead import one_of_each
    from stree_core.drafting import checkpoint, pair

    def small(source: Any) -> Any:
        if source.folder is not None:
            return source
        return replace(source, shape=one_of_each(source.shape))

    def cut(load: Callable[..., Any], count: int) -> Callable[..., Any]:
        @functools.wraps(load)
        def loaded(*args: Any, **kwargs: Any) -> Any:
            return load(*map(small, args[:count]), *args[count:], **kwargs)

        return loaded

    for name, count in (("load_pair", 2), ("load_with_head", 1), ("load_single", 1)):
        setattr(pair, name, cut(getattr(pair, name), count))
    random_model = checkpoint.random_model

    @functools.wraps(random_model)
    def random(shape: Any, *args: Any, **kwargs: Any) -> Any:
        return random_model(one_of_each(shape), *args, **kwargs)

    checkpoint.random_model = random


def time_one_step() -> None:
    """Let live runs end after one pass: models without arithmetic end their texts at once."""
    from stree_autotune.live import speed

    module: Any = speed
    run_wave = module._Wave.run
    module.FEWEST_CALLS = 1
    module._Wave.run = lambda self, clock: run_wave(self, clock) or [(0, 1.0)]


def compile_in_this_process() -> None:
    """Leave out the processes that a probe compiles in: it compiles as it goes."""
    from stree_autotune.probe import report

    module: Any = report
    module.compile_ahead = lambda *_: None


def without_gate() -> None:
    """Let benchmarks begin without tests, and answer what only a GPU can."""
    import gate
    import layer_data
    import report
    import timing

    module: Any = report
    save = report.save

    def save_elsewhere(path: Path, *args: Any) -> None:
        if path.resolve().is_relative_to(report.RESULTS):
            raise SystemExit(f"a dry run writes no results, got {path}; give --output")
        save(path, *args)

    module.save = save_elsewhere
    gate.require_green = lambda **_: "dry run"
    timing.copy_bandwidth = lambda *_, **__: BANDWIDTH
    layer_data.relative_error = lambda *_, **__: 0.0


def pack(cache: Path, archive: Path) -> None:
    """Write the binaries of a cache and what their keys were made from into a .tar.xz."""
    files = sorted(file for file in cache.rglob("*") if file.suffix in KEPT)
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names"
        names.write_text("".join(f"{file.relative_to(cache)}\n" for file in files))
        tar = ["tar", "-C", str(cache), "--sort=name", "-cf", "-", "-T", str(names)]
        with archive.open("wb") as out, subprocess.Popen(tar, stdout=subprocess.PIPE) as writing:
            # Kernels are alike: seen whole they take half the space that blocks of them do.
            squeeze = ["xz", "-T1", "--lzma2=preset=6,dict=256MiB"]
            subprocess.run(squeeze, stdin=writing.stdout, stdout=out, check=True)
    print(f"{sum(file.suffix == '.cubin' for file in files)} kernels in {archive}")


def unpack(archive: Path, cache: Path) -> None:
    """Take kernels into a cache under the keys of this machine's Triton."""
    from pretend_gpu import RECIPES
    from triton.runtime.cache import triton_key

    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(cache, filter="data")
    count = 0
    for recipe in sorted((cache / RECIPES).glob("*.json")):
        parts = json.loads(recipe.read_text())
        key = "-".join([triton_key(), *parts.values()])
        old, new = recipe.stem, hashlib.sha256(key.encode()).hexdigest()
        count += rename(cache / folder_of(old), cache / folder_of(new))
        recipe.unlink()
    print(f"{count} kernels in {cache}")


def rename(old: Path, new: Path) -> bool:
    """Give a kernel's folder its name here; paths that its files hold go with it."""
    if not old.exists() or new.exists():
        return False
    old.rename(new)
    for group in new.glob("__grp__*.json"):
        document = json.loads(group.read_text())
        names = [name for name in document["child_paths"] if (new / name).exists()]
        document["child_paths"] = {name: str(new / name) for name in names}
        group.write_text(json.dumps(document))
    return True


def folder_of(digest: str) -> str:
    """Return how Triton names the folder of a kernel."""
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


if __name__ == "__main__":
    main()
