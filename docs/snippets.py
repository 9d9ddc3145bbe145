"""Run the snippets of the pages, and fill in what they print.

A fenced block of `sh` or `python` runs, in a folder that all blocks of a page share, unless the
line above it is `<!-- not run: why -->`. A block of `text` below the line `<!-- output -->` holds
what the block before it prints, 80 columns wide. As a script (`make docs`) this writes those
blocks; a test runs every block and compares.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>sh|python)\n(?P<text>.*?)^```$"
    r"(?P<head>\n<!-- output -->\n```text\n)?(?(head)(?P<shown>.*?)(?P<tail>^```$))",
    re.MULTILINE | re.DOTALL,
)


def main() -> None:
    """Write the outputs of every page that shows some."""
    for page in PAGES:
        text = page.read_text()
        if not any(block["head"] for block in BLOCK.finditer(text)):
            continue
        with tempfile.TemporaryDirectory(prefix="stree-docs-") as folder:
            page.write_text(filled(text, Path(folder)))
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")


def filled(text: str, folder: Path) -> str:
    """Return a page with what its blocks print in `folder`; raises RuntimeError when one fails."""

    def fill(block: re.Match[str]) -> str:
        if block["why"]:
            return block[0]
        printed = run(block["kind"], block["text"], folder)
        if not block["head"]:
            return block[0]
        start = block.start()
        before = block[0][: block.start("shown") - start]
        return before + printed + block["tail"]

    return BLOCK.sub(fill, text)


def run(kind: str, text: str, folder: Path) -> str:
    """Run one block and return what it printed, without blanks at the ends of lines."""
    tools = Path(sys.executable).parent
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        [*("bash", "-euo", "pipefail", "-c"), text] if kind == "sh" else [sys.executable, "-"],
        input=None if kind == "sh" else text,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{text}\n{done.stdout}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.strip("\n").split("\n"))


if __name__ == "__main__":
    main()
