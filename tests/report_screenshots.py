"""Take the pictures of reports and of an analysis that docs/images holds (`make screenshots`).

Run as a script; needs Chromium and pngquant, on Debian the packages of these names.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from chromium import chromium, find_chromium

from stree_autotune.report.analyze import run_analyze
from stree_autotune.report.page import write_report
from stree_autotune.search.request import TuneRequest
from stree_autotune.store.library import Library, shipped_root
from stree_core.files import write_atomically
from stree_core.profile import Sampling

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
NUM_COLOURS = 64


@dataclass(frozen=True, slots=True)
class Shot:
    """Which profile is pictured how; heights are CSS pixels from the top."""

    name: str
    profile: str
    width: int
    height: int
    dark: bool


ANALYSIS = "analysis"
QUESTION = TuneRequest(
    gpu="h200",
    dataset="gsm8k",
    target="demo-target",
    draft="demo-draft",
    sampling=Sampling(rule="greedy", temperature=0.0),
    context=1024,
    batch_sizes=(1, 8, 64),
    max_nodes=64,
    data=(),
    acceptance_from="",
    seed=0,
)
SHOTS = (
    Shot("report-light", "h200--mamba2-2.7b--mamba2-130m--gsm8k", 1200, 2590, dark=False),
    Shot("report-dark", "h200--demo-target--demo-draft--demo", 1200, 4710, dark=True),
    Shot("report-narrow", "h200--mamba2-2.7b--mamba2-130m--gsm8k", 390, 3240, dark=False),
    Shot(ANALYSIS, "", 1200, 1450, dark=False),
)


def main() -> None:
    """Write one report a shot, picture it, shrink the picture."""
    if find_chromium() is None:
        sys.exit("screenshots: needs Chromium; install it, on Debian `apt install chromium`")
    root = shipped_root()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        with chromium(folder / "browser") as browser:
            for shot in SHOTS:
                page = folder / f"{shot.name}.html"
                if shot.name == ANALYSIS:
                    run_analyze(replace(QUESTION, data=(root,)), page, as_json=False)
                else:
                    write_report([root / "tuned" / f"{shot.profile}.yaml"], Library((root,)), page)
                browser.open(page, width=shot.width, dark=shot.dark)
                picture = shrunk(browser.picture(shot.height))
                write_atomically(IMAGES / f"{shot.name}.png", picture)
                sys.stdout.write(f"{shot.name}.png: {len(picture)} bytes\n")


def shrunk(picture: bytes) -> bytes:
    """Return a PNG with few colours."""
    command = ["pngquant", "--speed", "1", "--strip", str(NUM_COLOURS), "-"]
    return subprocess.run(command, input=picture, capture_output=True, check=True).stdout


if __name__ == "__main__":
    main()
