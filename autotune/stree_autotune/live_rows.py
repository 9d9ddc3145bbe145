"""Predicted against live, row by row: on the screen and in a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from stree_autotune.provenance import utc_now, versions
from stree_autotune.runtime_table import RuntimeTable
from stree_autotune.show import result_console
from stree_core.pair import Pair, device_name
from stree_core.profile import Measured, MeasuredBlock, Profile


@dataclass(frozen=True, slots=True)
class Row:
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
    texts_differing_from_off: int

    @property
    def error(self) -> float:
        """Relative error of the predicted tokens per second."""
        return self.predicted_tokens_per_s / self.live_tokens_per_s - 1


def print_rows(rows: Sequence[Row], pair: Pair, table: RuntimeTable) -> None:
    """Print a table of rows of one pair, predicted beside live."""
    console = result_console()
    console.print(
        f"{pair.target_ref.name} + {pair.draft_ref.name} on {device_name(pair.device)}, "
        f"batch size {rows[0].batch_size}; table of {table.measured.date}",
    )
    grid = Table(box=None, pad_edge=False)
    for title in ("mode", "nodes", "tokens/step", "live", "step ms", "live", "tokens/s", "live"):
        grid.add_column(title, justify="left" if title == "mode" else "right")
    grid.add_column("error", justify="right")
    for row in rows:
        grid.add_row(
            row.mode, str(row.nodes),
            f"{row.predicted_tokens_per_step:.3f}", f"{row.live_tokens_per_step:.3f}",
            f"{row.predicted_step_ms:.3f}", f"{row.live_step_ms:.3f}",
            f"{row.predicted_tokens_per_s:.0f}", f"{row.live_tokens_per_s:.0f}",
            f"{row.error:+.1%}",
        )  # fmt: skip
    console.print(grid)
    differing = max(row.texts_differing_from_off for row in rows)
    if differing:
        console.print(
            f"up to {differing} texts differ from decoding without speculation: rounding at "
            "near-ties, see docs/numerics.md",
        )


def with_measured(profile: Profile, rows: Sequence[Row], pair: Pair) -> Profile:
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
