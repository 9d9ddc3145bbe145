"""Result files of the benchmarks, and their Markdown tables."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fingerprint
import torch
from gate import passed
from sources import MEASUREMENTS, RESULTS as RESULTS, Measurement, measurement_of

from stree_autotune.store.origin import utc_now, versions
from stree_core.drafting.pair import device_name
from stree_core.files import write_atomically
from stree_core.models.backend import resolve_device

UNKNOWN = "unknown"
Row = dict[str, Any]


def command_line() -> str:
    """Return the command as its user typed it, but for where its file goes.

    Absolute paths are cut to their last part.
    """
    script, words = Path(sys.argv[0]), list(sys.argv[1:])
    for flag in ("--output", "--out"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"benchmarks/{script.name}", *words])


def header(
    peers: Mapping[str, str] | None = None,
    gate: str | None = None,
    bytes_per_s: float | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Return what all rows of one run share; the memory's bandwidth where it was measured.

    On a GPU, `gate` is the summary of the tests that a benchmark ran itself; else those that passed
    before on these very sources count.
    """
    _start()
    where = resolve_device(device)
    measured: dict[str, Any] = {}
    if bytes_per_s is not None:
        measured["copy_bandwidth_tb_s"] = round(bytes_per_s / 1e12, 3)
    if where.type == "cuda":
        measured["gate"] = passed() if gate is None else gate
    return {
        "command": command_line(),
        "gpu": device_name(where),
        "versions": {
            **versions(),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "driver": driver_version(),
            **(peers or {}),
        },
        "date": utc_now(),
        **measured,
    }


@functools.cache
def _start() -> float:
    """Return when the run began; sources are read then, lest they change while it runs."""
    for measurement in MEASUREMENTS:
        if measurement.script == Path(sys.argv[0]).stem:
            _hashes(measurement)
    return time.monotonic()


@functools.cache
def _hashes(measurement: Measurement) -> fingerprint.Hashes:
    return measurement.hashes()


def origin_of(path: Path) -> dict[str, Any]:
    """Return what code a results file of this name depends on: none for a name that is not ours."""
    measurement = measurement_of(path.name)
    if measurement is None:
        return {}
    sources = _hashes(measurement)
    return {
        "revision": fingerprint.head_with(sources) or UNKNOWN,
        "fingerprint": fingerprint.of_all(sources),
        "source_hashes": sources,
    }


def is_of_this_run(path: Path, head: dict[str, Any]) -> bool:
    """Say whether rows of a results file may stand beside new ones: same code, same machine."""
    if not path.exists():
        return False
    known, origin = read(path), origin_of(path)
    same = ("gpu", "versions", "gate")
    return known.get("fingerprint") == origin.get("fingerprint") and all(
        known.get(key) == head.get(key) for key in same
    )


def driver_version() -> str:
    """Return the GPU driver's version, `unknown` where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip().splitlines()[0]


def save(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a results file atomically, with the code that it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = origin_of(path)
    sources = {key: origin.pop(key) for key in ("source_hashes",) if origin}
    seconds = {"seconds": round(time.monotonic() - _start())} if origin else {}
    document = head | origin | seconds | {"rows": list(rows)} | sources
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def markdown(document: dict[str, Any], columns: Sequence[str], keep: Callable[[Row], bool]) -> str:
    """Return a result file as Markdown: where it comes from, then columns of the rows to keep."""
    rows = [row for row in document["rows"] if keep(row)]
    bandwidth = document.get("copy_bandwidth_tb_s")
    measured = "" if bandwidth is None else f", copy bandwidth {bandwidth} TB/s"
    spreads = _largest_spreads(rows)
    gate = f"; gate: {document['gate']}" if "gate" in document else ""
    lines = [
        f"{document['gpu']}, {document['date'][:10]}{measured}{gate}",
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
