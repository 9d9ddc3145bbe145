"""No benchmark of a wrong kernel: the tests on the GPU must pass first."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
STAMP = ROOT / "build" / "gate-passed"
TIMEOUT_S = 540
SKIPPED = "skipped"


def require_green(*, skip: bool = False) -> str:
    """Run the tests that need a GPU; return their summary, or "skipped".

    Tests that passed on these very sources and versions are not run again. Raises SystemExit when
    they fail.
    """
    if skip:
        return SKIPPED
    before = passed()
    if before != SKIPPED:
        return before
    tests = gpu_tests()
    summary = _run(tests)
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(f"{fingerprint(tests)}\n{summary}")
    return summary


def passed() -> str:
    """Return the summary of tests that passed on these sources and versions, else "skipped"."""
    if not STAMP.exists():
        return SKIPPED
    key, _, summary = STAMP.read_text().partition("\n")
    return summary if key == fingerprint(gpu_tests()) else SKIPPED


def gpu_tests() -> list[Path]:
    """Return the test files that hold tests of the `gpu` marker."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text()]


def fingerprint(tests: list[Path]) -> str:
    """Return a hash of everything that decides whether the tests pass."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "stree_core").rglob("*.py"), *tests]
    for source in sorted(sources):
        digest.update(f"{source.relative_to(ROOT)}\n".encode() + source.read_bytes())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    digest.update(f"{torch.__version__} {triton.__version__} {device}".encode())
    return digest.hexdigest()


def _run(tests: list[Path]) -> str:
    names = [str(file.relative_to(ROOT)) for file in tests]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", *names]
    # Most of the tests' time is compilation, which tests of one file share.
    if importlib.util.find_spec("xdist"):
        workers = min(16 * max(1, torch.cuda.device_count()), os.cpu_count() or 1)
        command += ["-n", str(workers), "--dist", "loadfile"]
    print("gate:", *names, file=sys.stderr, flush=True)
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the GPU tests must end within {TIMEOUT_S} s; run them alone") from None
    lines = run.stdout.strip().splitlines()
    if run.returncode != 0 or " passed" not in lines[-1]:
        print(*lines[-40:], run.stderr[-2000:], sep="\n", file=sys.stderr)
        raise SystemExit("a benchmark needs green GPU tests, they are red; mend them first")
    return lines[-1].strip("= ").split(" in ")[0]
