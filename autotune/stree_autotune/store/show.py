"""Profiles on the screen: one line that names them, the answer, a table, the sources."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stree_autotune.store.advice import command
from stree_autotune.store.terminal import digits, make_table, percent, print_json, say, show_table
from stree_core.profile import MeasuredBlock, PolicyRow, Profile, Source
from stree_core.tree import Verdict

HEADERS = (
    "batch", "verdict", "tokens/step", "step ms", "tokens/s", "ms/token", "gain over off",
)  # fmt: skip
DETAILS = ("batch", "nodes", "depth")
NO_BOUND = "-"
USEFUL_GAP = 0.5
"""A bound further above the choice is not shown as a result."""

TYPED_RATES = "rates"
"""The name of a trace's source where rates were typed (stree_autotune.trace.typed_rates)."""

_FEW_PROMPTS = re.compile(r"only \d+ prompts")
COLOURS: dict[Verdict, str] = {"off": "dim", "chain": "blue", "tree": "green"}
DEMO_PAIR = "demo-target"
"""The model that ships, to show the tool."""


def print_profile(profile: Profile, console: Console, *, verbose: bool = False) -> None:
    """Print a profile: the answer in a sentence, predictions by batch size, where they come from.

    With `verbose` also trees and certificates, why each row was chosen, and how what is estimated
    was.
    """
    console.print(title(profile), style="bold")
    if profile.target.name == DEMO_PAIR:
        say(
            console,
            "This is the demo pair of 7 million parameters: it shows the tool, not your model; "
            "give yours by --target DIR --draft DIR.",
        )
    console.print()
    say(console, answer(profile))
    console.print()
    show_table(console, _policy_table(profile.policy))
    console.print()
    if profile.server is not None:
        say(console, str(profile.sources.runtime.note))
    if verbose:
        show_table(console, _details_table(profile.policy))
        console.print()
    for reason, rows in groupby(profile.policy, key=lambda row: row.reason):
        if verbose or profile.server is not None:
            sizes = ", ".join(str(row.batch_size) for row in rows)
            say(console, f"batch size {sizes}: {reason}")
    if profile.measured is not None:
        say(console, f"measured live on {profile.measured.gpu}, {profile.measured.date}:")
        show_table(console, _measured_table(profile.measured))
    sources = profile.sources
    say(console, _source_line("times", sources.runtime, noted=verbose))
    say(console, _source_line("acceptance", sources.trace, noted=True))
    if verbose and sources.certificate is not None and _is_bounded(profile.policy):
        say(console, _source_line("certificate", sources.certificate, noted=True))
    from_trace = profile.server is None and sources.trace.name != TYPED_RATES
    if verbose and from_trace and sources.certificate is None:
        made = command("certify", PurePosixPath(profile.sources.trace.name).stem)
        say(console, f"certificate: none; make one with `{made}` and tune again")
    if not verbose:
        console.print("-v shows the trees, the reasons and how estimates are made")


def answer(profile: Profile) -> str:
    """Return what to do at which number of sequences, as one sentence.

    A row holds for as many sequences as its batch size, down to the next smaller row's.
    """
    runs = [list(rows) for _, rows in groupby(profile.policy, key=lambda row: row.verdict)]
    clauses = []
    for number, run in enumerate(runs):
        first = 1 if number == 0 else runs[number - 1][-1].batch_size + 1
        last = None if number == len(runs) - 1 else run[-1].batch_size
        clauses.append(f"{_range(first, last)} {_wording(run)}{_gains(run, profile.estimated)}")
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def _wording(run: list[PolicyRow]) -> str:
    """Return what to do in neighbouring rows of one verdict."""
    verdict, sizes = run[0].verdict, [row.tree.build().num_nodes for row in run]
    if verdict == "off":
        return "leave speculation off"
    few, most = min(sizes), max(sizes)
    tokens = "1 token" if most == 1 else f"{most} tokens"
    return f"use a {verdict} of {tokens}" if few == most else f"use {verdict}s of {few} to {tokens}"


def _range(first: int, last: int | None) -> str:
    if last is None:
        return "at every batch size" if first == 1 else f"from {first} sequences"
    if last == 1:
        return "for one sequence"
    if first == 1:
        return f"up to {last} sequences"
    return f"at {last}" if first == last else f"for {first} to {last}"


def _gains(run: list[PolicyRow], estimated: bool) -> str:
    """Return what rows gain over off, from the least to the most, nothing where they are off."""
    if run[0].verdict == "off":
        return ""
    gains = sorted(_percent(row.predicted.speedup) for row in run)
    texts = dict.fromkeys(f"{gain:+d}" for gain in (gains[0], gains[-1]))
    return f" ({'about ' * estimated}{' to '.join(texts)} %)"


def _percent(ratio: float) -> int:
    return round(100 * (ratio - 1))


def print_profile_json(*profiles: Profile) -> None:
    """Print one line of JSON: a profile, or a list when there are several."""
    documents = [profile.model_dump(mode="json", exclude_none=True) for profile in profiles]
    print_json(documents[0] if len(documents) == 1 else documents)


def title(profile: Profile) -> str:
    """Return the line that names pair, GPU, dataset and rule, and says what is estimated."""
    gpu, dataset = profile.gpu.name, profile.dataset
    if profile.sources.runtime.status == "estimated":
        measured = measured_gpu(profile.sources.runtime)
        gpu += " (estimated)" if measured == gpu else f" (estimated from {measured})"
    if profile.sources.trace.status == "estimated":
        dataset += f" (estimated, {profile.sources.trace.note})"
    few = _FEW_PROMPTS.search(profile.sources.trace.note or "")
    if few is not None and profile.sources.trace.status != "estimated":
        dataset += f" (unreliable, {few.group()})"
    pair = f"{profile.target.label} + {profile.draft.label}"
    return f"{pair} on {gpu} · {dataset} · {profile.sampling.rule}"


def measured_gpu(runtime: Source) -> str:
    """Return the GPU that a runtime table was measured on; its file name starts with it."""
    return PurePosixPath(runtime.name).name.split("--", maxsplit=1)[0]


def _policy_table(rows: tuple[PolicyRow, ...]) -> Table:
    table = make_table(HEADERS)
    for row in rows:
        predicted, interval = row.predicted, row.predicted.speedup_interval
        size = "" if row.verdict == "off" else f" of {row.tree.build().num_nodes}"
        gain = f"{_percent(predicted.speedup):+d} %"
        table.add_row(
            str(row.batch_size),
            Text(f"{row.verdict}{size}", style=COLOURS[row.verdict]),
            digits(predicted.tokens_per_step),
            digits(predicted.step_ms),
            digits(predicted.tokens_per_s),
            digits(predicted.step_ms / predicted.tokens_per_step),
            "-"
            if row.verdict == "off"
            else f"{gain} [{_percent(interval.low)}, {_percent(interval.high)}]",
        )
    return table


def _details_table(rows: tuple[PolicyRow, ...]) -> Table:
    """The tree's size, and how far at most any static tree could be ahead, where that is known."""
    bounded = _is_bounded(rows)
    table = make_table((*DETAILS, *(("within",) if bounded else ())))
    for row in rows:
        tree = row.tree.build()
        within = (_within(row.predicted.gap),) if bounded else ()
        table.add_row(str(row.batch_size), str(tree.num_nodes), str(tree.depth), *within)
    return table


def _is_bounded(rows: tuple[PolicyRow, ...]) -> bool:
    """True when the certificate says something of a row."""
    return any(_within(row.predicted.gap) != NO_BOUND for row in rows)


def _within(gap: float | None) -> str:
    """Return a certified gap; a bound that far above says nothing."""
    return NO_BOUND if gap is None or gap > USEFUL_GAP else percent(gap)


def _measured_table(block: MeasuredBlock) -> Table:
    table = make_table(("batch", "mode", "tokens/step", "step ms", "tokens/s"))
    for row in block.rows:
        table.add_row(
            str(row.batch_size),
            row.mode,
            digits(row.tokens_per_step),
            digits(row.step_ms),
            digits(row.tokens_per_s),
        )
    return table


def _source_line(kind: str, source: Source, *, noted: bool) -> Text:
    status = Text(source.status, style="yellow" if source.status == "estimated" else "")
    note = f" ({source.note})" if source.note and noted else ""
    return Text(f"{kind}: ") + status + Text(f", {source.name}{note}")
