"""Result files of the benchmarks, and their Markdown tables."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stree_autotune.store.origin import git_sha, utc_now, versions
from stree_core.drafting.pair import device_name
from stree_core.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def command_line() -> str:
    """Return the command as its user typed it, absolute paths cut to their last part."""
    script = Path(sys.argv[0])
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{script.name}", *words])


def header(peers: dict[str, str], gate: str, bytes_per_s: float | None = None) -> dict[str, Any]:
    """Return what all rows of one run share; the memory's bandwidth where it was measured."""
    known = versions()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = {}
    if bytes_per_s is not None:
        bandwidth = {"copy_bandwidth_tb_s": round(bytes_per_s / 1e12, 3)}
    return {
        "command": command_line(),
        "gpu": device_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": known["triton"],
            "cuda": str(torch.version.cuda),
            "driver": driver_version(),
            **peers,
        },
        "git_sha": git_sha(),
        "date": utc_now(),
        **bandwidth,
        "gate": gate,
    }


def driver_version() -> str:
    """Return the GPU driver's version, `unknown` where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip().splitlines()[0]


def save(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(head | {"rows": list(rows)}, indent=1) + "\n").encode())


def markdown(document: dict[str, Any], columns: Sequence[str], keep: Callable[[Row], bool]) -> str:
    """Return a result file as Markdown: where it comes from, then columns of the rows to keep."""
    rows = [row for row in document["rows"] if keep(row)]
    bandwidth = document.get("copy_bandwidth_tb_s")
    measured = "" if bandwidth is None else f", copy bandwidth {bandwidth} TB/s"
    spreads = _largest_spreads(rows)
    lines = [
        f"{document['gpu']}, {document['date'][:10]}{measured}; gate: {document['gate']}",
        ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        f"`{document['command']}`",
        *([f"Note: {document['note']}."] if "note" in document else []),
        table(rows, columns).rstrip(),
    ]
    if spreads:
        lines.append(f"Largest standard deviation over median: {spreads}.")
    return "\n\n".join(lines) + "\n"


def _largest_spreads(rows: Sequence[Row]) -> str:
    spreads: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.endswith("spread") and value is not None:
                spreads[key] = max(value, spreads.get(key, 0.0))
    return ", ".join(
        f"{100 * value:.1f} %{' ' + key[:-7] if key != 'spread' else ''}"
        for key, value in spreads.items()
    )


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a Markdown table of these columns, numbers to three digits, "-" for none."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(" ---: " if _is_numeric(rows, name) else " --- " for name in columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _is_numeric(rows: Sequence[Row], column: str) -> bool:
    return not any(isinstance(row.get(column), str) for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        # Three digits, but never an exponent.
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return str(value)


def read(path: Path) -> dict[str, Any]:
    """Read a result file."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def print_table(path: Path, columns: Sequence[str], keep: Callable[[Row], bool]) -> None:
    """Print a result file's Markdown."""
    print(markdown(read(path), columns, keep), end="")
