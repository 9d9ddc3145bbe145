"""The verbs of `stree-tune`: their order, their line in the list, the one meant; the version."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any, cast

import typer

from stree_autotune.store import command
from stree_core.errors import brief

VERBS = {
    "plan": "Write a script that measures the server you run.",
    "import": "Read what a server and its load generator wrote.",
    "probe": "Measure what the passes and steps of a pair cost here.",
    "trace": "Record which of the draft's tokens the target takes.",
    "validate": "Run a profile live and compare it with its prediction.",
    "analyze": "Say what each further node brings and costs.",
    "report": "Write one HTML page of profiles.",
    "export": "Write a profile as the settings of a server.",
    "decode": "Continue a prompt the way a profile says.",
    "show": "Print profiles.",
    "list": "Print which profiles, tables and traces are there.",
    "push": "Copy results to a shared library.",
    "pull": "Copy results from a shared library.",
    "certify": "Bound what any static tree can reach on traces.",
}
"""The verbs in the order of work, each with its line in the list of them; tuning has no verb."""


def list_verbs(app: typer.Typer) -> None:
    """Put the verbs in order, each with a line that fits."""
    order = list(VERBS)
    for info in app.registered_commands:
        info.name = info.name or cast("Any", info.callback).__name__
        info.short_help = VERBS[info.name]
    app.registered_commands.sort(key=lambda info: order.index(str(info.name)))


def usage(message: str) -> str:
    """Return what is wrong with a command line, with the verb that was meant."""
    unknown = re.match(r"No such command '(.*?)'\.", message)
    if unknown is None:
        return f"{message} See `{command('--help')}`."
    meant = difflib.get_close_matches(unknown[1], [*VERBS, "tune"], n=1)
    if meant == ["tune"]:
        remedy = f"tuning has no verb, write `{command('--gpu', 'h100', '--dataset', 'gsm8k')}`"
    elif meant:
        remedy = f"write `{command(*meant)}`"
    else:
        remedy = f"see `{command('--help')}`"
    return f"a verb is one of {', '.join(VERBS)}, got {brief(unknown[1])}; {remedy}"


def print_version(wanted: bool) -> None:
    """Print the version and stop, when asked."""
    from stree_autotune.store.origin import version_of
    from stree_core.extras import DISTRIBUTION

    if wanted:
        sys.stdout.write(f"stree-tune {version_of(DISTRIBUTION)}\n")
        raise typer.Exit
