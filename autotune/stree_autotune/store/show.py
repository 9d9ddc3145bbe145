"""Profiles on the screen: one line that names them, a table, the reasons, the sources."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stree_autotune.store.advice import command
from stree_core.profile import MeasuredBlock, PolicyRow, Profile, Source
from stree_core.tree import Verdict

HEADERS = (
    "batch size",
    "verdict",
    "nodes",
    "depth",
    "tokens/step",
    "step ms",
    "tokens/s",
    "speedup over off [95 %]",
    "within",
)
NARROWEST = 120
COLOURS: dict[Verdict, str] = {"off": "dim", "chain": "blue", "tree": "green"}


def result_console() -> Console:
    """Return the console for results: stdout, never so narrow that a table loses digits."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.width = max(NARROWEST, console.width)
    return console


def print_profile(profile: Profile, console: Console) -> None:
    """Print a profile: title, predictions by batch size, why, measurements, sources."""
    console.print(title(profile), style="bold")
    console.print(_policy_table(profile.policy))
    if profile.server is not None:
        console.print(str(profile.sources.runtime.note))
    for reason, rows in groupby(profile.policy, key=lambda row: row.reason):
        sizes = ", ".join(str(row.batch_size) for row in rows)
        console.print(f"batch size {sizes}: {reason}")
    if profile.measured is not None:
        console.print(f"measured live on {profile.measured.gpu}, {profile.measured.date}:")
        console.print(_measured_table(profile.measured))
    for kind, source in (("times", profile.sources.runtime), ("acceptance", profile.sources.trace)):
        console.print(_source_line(kind, source))
    if profile.server is not None:
        return
    if profile.sources.certificate is None:
        made = command("certify", PurePosixPath(profile.sources.trace.name).stem)
        console.print(f"certificate: none; make one with `{made}` and tune again")
    else:
        console.print(_source_line("certificate", profile.sources.certificate))


def print_profile_json(*profiles: Profile) -> None:
    """Print one line of JSON: a profile, or a list when there are several."""
    documents = [profile.model_dump(mode="json", exclude_none=True) for profile in profiles]
    content = documents[0] if len(documents) == 1 else documents
    sys.stdout.write(json.dumps(content) + "\n")


def print_json(content: object) -> None:
    """Print one JSON document as one line."""
    sys.stdout.write(json.dumps(content) + "\n")


def report(text: str, summary: dict[str, object], as_json: bool) -> None:
    """Print lines for a reader, then, when asked, one line of JSON."""
    sys.stdout.write(text + "\n")
    if as_json:
        print_json(summary)


def title(profile: Profile) -> str:
    """Return the line that names pair, GPU, dataset and rule, and says what is estimated."""
    gpu, dataset = profile.gpu.name, profile.dataset
    if profile.sources.runtime.status == "estimated":
        gpu += f" (estimated from {measured_gpu(profile.sources.runtime)})"
    if profile.sources.trace.status == "estimated":
        dataset += f" (estimated, {profile.sources.trace.note})"
    pair = f"{profile.target.name} + {profile.draft.name}"
    return f"{pair} on {gpu} · {dataset} · {profile.sampling.rule}"


def measured_gpu(runtime: Source) -> str:
    """Return the GPU that a runtime table was measured on; its file name starts with it."""
    return PurePosixPath(runtime.name).name.split("--", maxsplit=1)[0]


def _policy_table(rows: tuple[PolicyRow, ...]) -> Table:
    table = _table(HEADERS)
    for row in rows:
        tree, predicted = row.tree.build(), row.predicted
        interval = predicted.speedup_interval
        table.add_row(
            str(row.batch_size),
            Text(row.verdict, style=COLOURS[row.verdict]),
            str(tree.num_nodes),
            str(tree.depth),
            f"{predicted.tokens_per_step:.3f}",
            f"{predicted.step_ms:.3f}",
            f"{predicted.tokens_per_s:.1f}",
            f"{predicted.speedup:.2f}x [{interval.low:.2f}, {interval.high:.2f}]",
            "unknown" if predicted.gap is None else f"{100 * predicted.gap:.1f} %",
        )
    return table


def _measured_table(block: MeasuredBlock) -> Table:
    table = _table(("batch size", "mode", "tokens/step", "step ms", "tokens/s"))
    for row in block.rows:
        table.add_row(
            str(row.batch_size),
            row.mode,
            f"{row.tokens_per_step:.3f}",
            f"{row.step_ms:.3f}",
            f"{row.tokens_per_s:.1f}",
        )
    return table


def _table(headers: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for header in headers:
        words = header in ("verdict", "mode")
        table.add_column(header, justify="left" if words else "right", no_wrap=True)
    return table


def _source_line(kind: str, source: Source) -> Text:
    status = Text(source.status, style="yellow" if source.status == "estimated" else "")
    note = f" ({source.note})" if source.note else ""
    return Text(f"{kind}: ") + status + Text(f", {source.name}{note}")
