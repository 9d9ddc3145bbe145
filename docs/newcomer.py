"""Record a newcomer's sessions into docs/newcomer.md: every command is run, every line is real.

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
import time
import venv
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

TEXT_WIDTH = 130
HERE = "CHECKOUT"
LINE_WIDTH = 80

HEAD = """# Three newcomers

What three readers of README type and see, on a machine with two slow CPU cores and without a GPU.
`make newcomer` runs every command in a fresh environment and writes this page. Lines beyond 80
columns are folded, as a terminal does.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """What is explained, and the commands that are run and shown."""

    text: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """A reader with a goal, and the steps to it."""

    title: str
    goal: str
    steps: tuple[Step, ...]


PROMPTS = (
    "for i in $(seq 64); do\n"
    '    echo "{\\"prompt\\": \\"Anna has $i boxes with $((i % 7 + 2)) pens each. '
    'How many pens does she have?\\"}"\n'
    "done > mine.jsonl"
)
SNIPPET = """python - <<'END'
import stree_core as stree

run = stree.load("h200--demo-target--mtp--demo").generate(["What is a tree?"], max_new_tokens=32)
print(run.texts[0], run, sep="\\n")
END"""

ROLES = (
    Role(
        "Everybody: install and look around",
        "a first verdict and its report",
        (
            Step("A checkout and Python 3.11 or newer.", (f"pip install {HERE}",)),
            Step(
                "How should the demo pair speculate on an H100, on school problems? Nobody "
                "measured the H100: the answer is carried over from an H200 and says so.",
                ("stree-tune --gpu h100 --dataset gsm8k",),
            ),
            Step(
                "Off for most numbers of sequences: this target is so small that a token costs a "
                "tenth of a millisecond. On word problems like those that the draft was trained "
                "on, the verdict is another. One page of both:",
                (
                    "stree-tune --gpu h200 --dataset demo -o demo.yaml",
                    "stree-tune report demo.yaml stree-profile.yaml",
                    "ls -s --block-size=K report.html",
                ),
            ),
        ),
    ),
    Role(
        "You serve Qwen3.5-27B on H100s with vLLM",
        "the number of draft tokens at each load, and the settings",
        (
            Step(
                "vLLM logs acceptance rates by position. With these and the config an estimate "
                "takes seconds:",
                (
                    "stree-tune --gpu h100 --target qwen3.5-27b --draft mtp "
                    "--rates 0.8,0.6,0.4 -o qwen.yaml",
                    "stree-tune export qwen.yaml --to vllm",
                ),
            ),
            Step(
                "A server spends other times than stree's engine. This writes the script that "
                "measures it; it runs on the GPU, and docs/serve-it.md says how to go on.",
                (
                    "stree-tune plan --server vllm --target Qwen/Qwen3.5-27B --draft mtp "
                    "--gpu h100 -o plan.sh",
                ),
            ),
        ),
    ),
    Role(
        "You trained a draft and have prompts of your own",
        "whether, and as which tree, the draft pays on these prompts",
        (
            Step(
                "One JSON object a line, with `prompt`, `question` or `messages`. These are made "
                "up by the shell; the demo pair stands in for yours.",
                (PROMPTS, "head -2 mine.jsonl"),
            ),
            Step(
                "What does the target accept of the draft? Recorded once:",
                ("stree-tune trace --dataset mine --prompts mine.jsonl --max-new-tokens 64",),
            ),
            Step(
                "The trace is in `./stree-data`, which is searched before what ships.",
                (
                    "stree-tune --gpu h200 --dataset mine -o mine.yaml",
                    "stree-tune analyze --gpu h200 --dataset mine --batch-size 1",
                ),
            ),
            Step(
                "Decode with it, here on a CPU. The profile is for another device, which costs a "
                "warning; the text is the target's own either way.",
                (
                    "stree-tune decode --profile mine.yaml --max-new-tokens 48 "
                    '--prompt "Anna has 5 boxes with 4 pens each. How many pens does she have?"',
                ),
            ),
        ),
    ),
    Role(
        "You embed the decoder in a program",
        "text and its speed, then requests that join and leave",
        (
            Step("README's lines of Python:", (SNIPPET,)),
            Step("Four requests on two slots:", (f"python {HERE}/examples/embed.py",)),
        ),
    ),
)


def main() -> None:
    """Run everything in a folder of its own and write the page."""
    with tempfile.TemporaryDirectory(prefix="stree-newcomer-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        (folder / "session").mkdir()
        parts = [HEAD, *(_role(role, folder) for role in ROLES)]
    (DOCS / "newcomer.md").write_text("\n".join(parts))


def _role(role: Role, folder: Path) -> str:
    """Walk one role; return its section, with the commands and the minutes that it took."""
    start = time.monotonic()
    steps = [_step(step, folder) for step in role.steps]
    minutes = (time.monotonic() - start) / 60
    count = sum(len(step.commands) for step in role.steps)
    goal = f"Goal: {role.goal}. Commands: {count}; minutes on this machine: {minutes:.1f}."
    return "\n".join([f"## {role.title}\n", f"{textwrap.fill(goal, TEXT_WIDTH)}\n", *steps])


def _step(step: Step, folder: Path) -> str:
    shown = "\n".join(_session(command, folder) for command in step.commands)
    return f"{textwrap.fill(step.text, TEXT_WIDTH)}\n\n```console\n{shown}\n```\n"


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
    lines += [_folded(line) for line in run.stdout.rstrip().split("\n") if line.strip()]
    return "\n".join(lines)


def _environment(folder: Path) -> dict[str, str]:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{folder / 'venv' / 'bin'}:{kept['PATH']}"
    # what an index says about itself is of this machine alone
    pip = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_QUIET": "2"}
    return {**kept, **pip, "PATH": path, "COLUMNS": str(LINE_WIDTH), "OMP_NUM_THREADS": "1"}


def _folded(line: str) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
    return line if len(line) <= LINE_WIDTH else textwrap.fill(line, LINE_WIDTH)


if __name__ == "__main__":
    main()
