"""Predicted against live as a table: the rows of a result file and what their errors come to."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from prediction_figure import draw
from report import Row, markdown, read, table

from stree_autotune.live.rows import error_summary

SHOWN = (
    "pair", "batch", "mode", "predicted tokens/s", "live tokens/s", "error", "predicted step ms",
    "live step ms", "predicted tokens/step", "live tokens/step",
)  # fmt: skip

BY_BATCH = (
    "pair", "batch", "off: error", "speculating: mean error", "median", "worst",
    "tokens/step: worst", "predicted fastest", "behind the fastest",
)  # fmt: skip


def errors(rows: Sequence[Row], quantity: str) -> list[float]:
    """Return the relative errors of the predictions of a quantity."""
    return [row[f"predicted_{quantity}"] / row[f"live_{quantity}"] - 1 for row in rows]


def summary(rows: Sequence[Row]) -> str:
    """Return the errors of all rows, and of each pair."""
    lines = []
    names = list(dict.fromkeys(row["pair"] for row in rows))
    for name in (*names, None) if len(names) > 1 else names:
        own = [row for row in rows if name in (None, row["pair"])]
        lines += [
            f"{name or 'all'}, {len(own)} configurations: "
            f"tokens/s {error_summary(errors(own, 'tokens_per_s'))}; "
            f"tokens/step {error_summary(errors(own, 'tokens_per_step'))}"
        ]
    return "\n\n".join(lines)


def by_batch(rows: Sequence[Row]) -> list[Row]:
    """Return for each pair and batch size its errors, and what the mode predicted fastest is."""
    found = []
    for (pair, batch), group in itertools.groupby(rows, lambda row: (row["pair"], row["batch"])):
        own = list(group)
        speeds, steps = errors(own, "tokens_per_s"), errors(own, "tokens_per_step")
        off, speculating = (
            [error for row, error in zip(own, speeds, strict=True) if bool(row["tree"]) is draws]
            for draws in (False, True)
        )
        chosen = max(own, key=lambda row: row["predicted_tokens_per_s"])
        fastest = max(row["live_tokens_per_s"] for row in own)
        values = (
            pair, batch, *(f"{statistics.fmean(part):+.1%}" if part else None
                           for part in (off, speculating)),
            f"{statistics.median(map(abs, speeds)):.1%}", f"{max(map(abs, speeds)):.1%}",
            f"{max(map(abs, steps)):.1%}", chosen["mode"],
            f"{1 - chosen['live_tokens_per_s'] / fastest:.1%}",
        )  # fmt: skip
        found.append(dict(zip(BY_BATCH, values, strict=True)))
    return found


def shown(rows: Sequence[Row]) -> list[Row]:
    """Return rows as a reader's table has them."""
    quantities = ("tokens_per_s", "step_ms", "tokens_per_step")
    return [
        {name: row[name] for name in ("pair", "batch", "mode")}
        | {f"{side} {name.replace('_per_', '/').replace('_', ' ')}": row[f"{side}_{name}"]
           for name in quantities for side in ("predicted", "live")}
        | {"error": f"{error:+.1%}", "spread": row["live_spread"]}
        for row, error in zip(rows, errors(rows, "tokens_per_s"), strict=True)
    ]  # fmt: skip


def show(path: Path, figure: Path | None) -> None:
    """Print a result file as Markdown, and draw it where asked."""
    document = read(path)
    rows = document["rows"]
    sources = document.get("sources", {}).values()
    commands = " && ".join(dict.fromkeys(source["command"] for source in sources))
    facts = document | {"rows": shown(rows), "command": commands or document["command"]}
    text = markdown(facts, SHOWN, lambda row: True)
    print("\n".join((text, table(by_batch(rows), BY_BATCH), summary(rows))))
    if figure is not None:
        draw(rows, document["gpu"], figure)
