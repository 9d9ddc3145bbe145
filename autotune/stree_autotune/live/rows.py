"""Predicted against live, row by row: on the screen and in a profile."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stree_autotune.live.speed import FEWEST_CALLS
from stree_autotune.store import (
    RuntimeTable,
    digits,
    make_table,
    percent,
    result_console,
    say,
    show_table,
    utc_now,
    versions,
)
from stree_autotune.trace import TraceMeta
from stree_core.drafting import Pair, device_name
from stree_core.profile import Measured, MeasuredBlock, Profile


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """One way of decoding: what was predicted of it and what it did. Errors are relative."""

    mode: str
    nodes: int
    batch_size: int
    predicted_tokens_per_step: float
    live_tokens_per_step: float
    predicted_step_ms: float
    live_step_ms: float
    predicted_tokens_per_s: float
    live_tokens_per_s: float
    timed_steps: int
    texts_differing_from_off: int | None

    @property
    def speed_error(self) -> float:
        """Relative error of the predicted tokens per second."""
        return self.predicted_tokens_per_s / self.live_tokens_per_s - 1

    @property
    def length_error(self) -> float:
        """Relative error of the predicted tokens per step."""
        return self.predicted_tokens_per_step / self.live_tokens_per_step - 1


@dataclass(frozen=True, slots=True)
class Heading:
    """What all rows of a table share, as its first line says it."""

    pair: str
    prompts: str
    predicted_from: str

    @classmethod
    def of(cls, pair: Pair, meta: TraceMeta, table: RuntimeTable) -> Heading:
        """Return the heading of rows whose prompts were recorded as `meta`."""
        form = ", chat template" if meta.chat else ""
        return cls(
            f"{pair.target_ref.name} + {pair.draft_ref.name} on {device_name(pair.device)}",
            f"{meta.num_prompts} prompts of {meta.dataset}{form}, {meta.sampling.label}",
            f"times of {table.measured.date}, a trace of these prompts",
        )


def print_rows(rows: Sequence[ValidationRow], heading: Heading) -> None:
    """Print a table of rows, predicted beside live, and how far they are apart."""
    console = result_console()
    say(console, f"{heading.pair} · {heading.prompts} · batch size {rows[0].batch_size}")
    say(console, f"predicted from {heading.predicted_from}")
    grid = make_table(
        ("mode", "nodes", "tokens/step", "live", "step ms", "live", "tokens/s", "live", "error")
    )
    for row in rows:
        grid.add_row(
            row.mode, str(row.nodes),
            digits(row.predicted_tokens_per_step), digits(row.live_tokens_per_step),
            digits(row.predicted_step_ms), digits(row.live_step_ms),
            digits(row.predicted_tokens_per_s), digits(row.live_tokens_per_s),
            percent(row.speed_error, signed=True),
        )  # fmt: skip
    show_table(console, grid)
    console.print(f"tokens/s: {error_summary([row.speed_error for row in rows])}")
    console.print(f"tokens/step: {error_summary([row.length_error for row in rows])}")
    fewest = min(rows, key=lambda row: row.timed_steps)
    if fewest.timed_steps < FEWEST_CALLS:
        say(
            console,
            f"only {fewest.timed_steps} steps of {fewest.mode} could be timed, fewer than "
            f"{FEWEST_CALLS}, so live times say little: give more prompts, or longer texts with "
            "--max-new-tokens",
        )
    differing = max(row.texts_differing_from_off or 0 for row in rows)
    if differing:
        say(
            console,
            f"up to {differing} texts differ from decoding without speculation: rounding at "
            "near-ties, see docs/kernels-and-numerics.md",
        )


def error_summary(errors: Sequence[float]) -> str:
    """Return the median and the worst of relative errors, without their signs."""
    sizes = [abs(error) for error in errors]
    return f"median error {percent(statistics.median(sizes))}, worst {percent(max(sizes))}"


def with_measured(profile: Profile, rows: Sequence[ValidationRow], pair: Pair) -> Profile:
    """Return the profile with the live side of `rows` as its measured block."""
    measured = tuple(
        Measured(
            batch_size=row.batch_size,
            mode=row.mode,
            tokens_per_step=float(f"{row.live_tokens_per_step:.6g}"),
            step_ms=float(f"{row.live_step_ms:.6g}"),
            tokens_per_s=float(f"{row.live_tokens_per_s:.6g}"),
        )
        for row in rows
    )
    block = MeasuredBlock(
        gpu=device_name(pair.device), date=utc_now(), versions=versions(), rows=measured
    )
    return profile.model_copy(update={"measured": block})
