"""The picture of an analysis: speed by tree size, and the break-even size by batch size."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stree_core.errors import ConfigError
from stree_core.extras import install_command
from stree_core.files import require_place, write_atomically

if TYPE_CHECKING:
    from stree_autotune.report.analyze import Case

FORMATS = (".png", ".svg")
_INK, _FAINT = "#333333", "#bbbbbb"


def require_picture(path: Path) -> None:
    """Raise ConfigError for another ending, a place that cannot be written or no matplotlib."""
    if path.suffix not in FORMATS or not path.parent.is_dir():
        raise ConfigError(
            f"--plot writes a .png or .svg file into an existing folder, got {path}; name another"
        )
    require_place(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--plot needs matplotlib; {install_command('plot')}")


def draw(asked: Case, others: Sequence[Case], title: str, path: Path) -> None:
    """Write the picture to a PNG or SVG file, see `require_picture`."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9, "svg.hashsalt": "stree", "axes.edgecolor": _INK}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        speed, size = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.suptitle(title, fontsize=10)
        _draw_speed(speed, asked, matplotlib.colormaps["viridis"])
        _draw_sizes(size, [asked, *others])
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, format=path.suffix.removeprefix("."))
    write_atomically(path, picture.getvalue())


def _draw_speed(axes: Any, case: Case, colours: Any) -> None:
    """Draw speed over off by number of nodes, a line per batch size, its top marked."""
    axes.axhline(1.0, color=_FAINT, linewidth=1, zorder=0)
    last = max(1, len(case.scalings) - 1)
    for number, scale in enumerate(case.scalings):
        colour = colours(0.9 * number / last)
        axes.plot(
            [size.nodes for size in scale.sizes],
            [size.speedup for size in scale.sizes],
            color=colour,
            linewidth=1.4,
            label=f"batch size {scale.batch_size}",
        )
        axes.plot(scale.best.nodes, scale.best.speedup, "o", color=colour, markersize=5)
    axes.set_xlabel("nodes of the tree (a dot marks the break-even size)")
    axes.set_ylabel("tokens per second over off")
    axes.set_xlim(left=-0.5)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _draw_sizes(axes: Any, cases: Sequence[Case]) -> None:
    """Draw the break-even size by batch size, a line per GPU and sampling setting."""
    markers = "osD^vP*X"
    for number, case in enumerate(cases):
        axes.plot(
            [scale.batch_size for scale in case.scalings],
            [scale.best.nodes for scale in case.scalings],
            marker=markers[number % len(markers)],
            # Answers often coincide: the later ones are drawn smaller, so that all are seen.
            markersize=max(3, 10 - 2 * number),
            linewidth=1.2,
            linestyle="--" if case.estimated else "-",
            label=case.label,
        )
    axes.set_xscale("log", base=2)
    batch_sizes = [scale.batch_size for scale in cases[0].scalings]
    axes.set_xticks(batch_sizes, [str(batch_size) for batch_size in batch_sizes])
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.set_ylim(bottom=-0.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("batch size")
    axes.set_ylabel("break-even size, nodes")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
