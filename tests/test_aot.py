"""The kernels compile for a GPU that is not there, within its registers and shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "aot.py"


def test_kernels_compile_ahead_of_time_without_spills() -> None:
    # Another process: this one may interpret its kernels instead.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(SCRIPT), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    num_kernels, *rest = result.stdout.splitlines()[-1].split()
    assert int(num_kernels) > 50
    assert rest == ["kernels,", "0", "beyond", "the", "limits"]
