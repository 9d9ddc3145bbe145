"""Record a newcomer's session into docs/newcomer.md: every command is run, every line is real.

Run as a script from a checkout (`make newcomer`); it installs into a fresh environment, so it needs
a package index and some minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import venv
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

TEXT_WIDTH = 130
HERE = "CHECKOUT"
LINE_WIDTH = 150

HEAD = """# A newcomer's session

From nothing to a profile of one's own prompts, on a machine without a GPU. `make newcomer` runs
these commands in a fresh environment and writes this page; lines are cut where they end with …
only.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """What is explained, and the commands that are run and shown."""

    title: str
    text: str
    commands: tuple[str, ...]


PARTS = (
    Part(
        "Install",
        "A wheel or a checkout, Python 3.11 or newer. The demo pair, its traces and the times of "
        "one GPU come along.",
        (f"pip install {HERE}", "stree-tune --help | sed -n '/^Commands/,$p'"),
    ),
    Part(
        "Tune",
        "How should the demo pair speculate on an H100, on school problems? Nobody measured the "
        "H100: the answer is carried over from an H200 and says so.",
        ("stree-tune --gpu h100 --dataset gsm8k",),
    ),
    Part(
        "Read the verdict",
        "Off for most numbers of sequences: this target is so small that a token costs a tenth of "
        "a millisecond, and the draft is not right often enough to earn its own time. With `-v` "
        "lines below the table say what the best alternative would have done; where its interval "
        "reaches above zero it might be faster, or not. On word problems like those that the draft "
        "was trained on, the verdict is another:",
        ("stree-tune --gpu h200 --dataset demo -o demo.yaml",),
    ),
    Part(
        "Open the report",
        "One page of both, to read in a browser or to send on.",
        ("stree-tune report demo.yaml stree-profile.yaml", "ls -s --block-size=K report.html"),
    ),
    Part(
        "Export",
        "The same verdicts as settings of a server. What a format cannot say is chosen anew and "
        "said on stderr.",
        ("stree-tune export demo.yaml --to vllm", "stree-tune export demo.yaml --to sglang"),
    ),
    Part(
        "Record a trace of your own prompts",
        "One JSON object a line, with `prompt`, `question` or `turns`. These are made up by the "
        "shell; yours come from your application.",
        (
            "for i in $(seq 64); do\n"
            '    echo "{\\"prompt\\": \\"Anna has $i boxes with $((i % 7 + 2)) pens each. '
            'How many pens does she have?\\"}"\n'
            "done > mine.jsonl",
            "head -2 mine.jsonl",
            "stree-tune trace --dataset mine --prompts mine.jsonl --max-new-tokens 64",
        ),
    ),
    Part(
        "Tune again",
        "The trace lies in `./stree-data`, which is searched before what ships.",
        ("stree-tune --gpu h200 --dataset mine -o mine.yaml",),
    ),
    Part(
        "Decode with it",
        "On this machine's processor. The profile is for another device, which costs a warning; "
        "the text is the target's own either way.",
        (
            'stree-tune decode --profile mine.yaml --max-new-tokens 48 --prompt "Anna has 5 boxes '
            'with 4 pens each. How many pens does she have?"',
        ),
    ),
)


def main() -> None:
    """Run everything in a folder of its own and write the page."""
    with tempfile.TemporaryDirectory(prefix="stree-newcomer-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        (folder / "session").mkdir()
        parts = [HEAD, *(_part(part, folder) for part in PARTS)]
    (DOCS / "newcomer.md").write_text("\n".join(parts))


def _part(part: Part, folder: Path) -> str:
    shown = "\n".join(_session(command, folder) for command in part.commands)
    return (
        f"## {part.title}\n\n{textwrap.fill(part.text, TEXT_WIDTH)}\n\n```console\n{shown}\n```\n"
    )


def _session(command: str, folder: Path) -> str:
    """Run one command; return it and what it printed, as a terminal shows them."""
    sys.stdout.write(f"$ {command}\n")
    sys.stdout.flush()
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace(HERE, str(ROOT))],
        cwd=folder / "session",
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    sys.stdout.write(run.stdout)
    if run.returncode != 0:
        sys.exit(f"newcomer: {command} failed with exit code {run.returncode}")
    lines = [f"$ {command.replace(HERE, '.')}"]
    lines += [_cut(line) for line in run.stdout.rstrip().split("\n") if line.strip()]
    return "\n".join(lines)


def _environment(folder: Path) -> dict[str, str]:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{folder / 'venv' / 'bin'}:{kept['PATH']}"
    # what an index says about itself is of this machine alone
    pip = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_QUIET": "2"}
    return {**kept, **pip, "PATH": path, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def _cut(line: str) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    return line if len(line) <= LINE_WIDTH else f"{line[: LINE_WIDTH - 1]}…"


if __name__ == "__main__":
    main()
