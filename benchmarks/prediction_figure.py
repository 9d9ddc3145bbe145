"""Predicted against live as a picture: the error of every mode, a panel for each pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AIM = 0.05
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")


def rows_of_figure(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a .svg says of the rows that it shows, by which a test knows them again."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"rows {digest[:12]}"


def draw(rows: Sequence[dict[str, Any]], device: str, path: Path) -> None:
    """Write the picture of the rows to a .svg or .png file; equal rows give equal bytes."""
    # A tool of those who work on stree: nothing else needs it.
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams |= {"svg.hashsalt": "stree", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(
        len(pairs),
        1,
        figsize=(8, 2.9 * len(pairs)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for pair, axis in zip(pairs, axes[:, 0], strict=True):
        modes = list(dict.fromkeys(row["mode"] for row in rows if row["pair"] == pair))
        axis.axhspan(-AIM, AIM, color="0.93", zorder=0)
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=1)
        for number, batch in enumerate(batches):
            own = [row for row in rows if (row["pair"], row["batch"]) == (pair, batch)]
            shift = 0.18 * (number - (len(batches) - 1) / 2)
            axis.errorbar(
                [modes.index(row["mode"]) + shift for row in own],
                [row["predicted_tokens_per_s"] / row["live_tokens_per_s"] - 1 for row in own],
                yerr=[row["live_spread"] for row in own],
                fmt=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)],
                markersize=5, linewidth=1, label=f"batch {batch}", zorder=2,
            )  # fmt: skip
        axis.set_xticks(range(len(modes)), modes)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -1.4 * AIM), max(high, 1.4 * AIM))
        axis.set_ylabel("predicted / live − 1")
        axis.set_title(f"{pair}, {device}", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(batches), frameon=False, loc="outside lower center")
    figure.suptitle("Tokens per second: error of the prediction (bars: spread of live rounds)")
    metadata = {"Date": None, "Description": rows_of_figure(rows)}
    if path.suffix != ".svg":
        metadata = {"Software": None}
    figure.savefig(path, dpi=140, metadata=metadata)
    plt.close(figure)
