"""Should I scale the tree? What each further node brings and costs, and where it stops paying."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from stree_autotune.cost import MemoryModel
from stree_autotune.search import CostModel, Question, TreeSpace, Trial, TuneRequest, ask
from stree_autotune.store import SEPARATOR, Library, result_console
from stree_autotune.trace import load_trace
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.extras import install_command
from stree_core.files import require_place, write_atomically
from stree_core.shown_text import printable
from stree_core.tree import OFF, Tree

SHOWN_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 31, 32, 48, 63, 64, 96, 127, 128, 192, 255)
PICTURE_FORMATS = (".png", ".svg")
_INK, _FAINT = "#333333", "#bbbbbb"


@dataclass(frozen=True, slots=True)
class Size:
    """The fastest tree of one size, and what a node more than in the size before brought and cost.

    `gain` and `cost` are relative changes per added node of tokens per step and of step time.
    """

    nodes: int
    depth: int
    tokens_per_step: float
    step_ms: float
    speedup: float
    gain: float
    cost: float


@dataclass(frozen=True, slots=True)
class Scaling:
    """How speed grows with the tree at one batch size; sizes ascend from 0 (off)."""

    batch_size: int
    sizes: tuple[Size, ...]

    @property
    def best(self) -> Size:
        """The break-even size: beyond it further nodes cost more than they bring."""
        return max(self.sizes, key=lambda size: (size.speedup, -size.nodes))

    @property
    def faster_up_to(self) -> int:
        """The largest size that is still faster than off, 0 when none is."""
        return max(size.nodes for size in self.sizes if size.nodes == 0 or size.speedup > 1)

    @property
    def beyond(self) -> Size | None:
        """The next size behind the break-even size, None when there is none."""
        return next((size for size in self.sizes if size.nodes > self.best.nodes), None)

    def sentence(self) -> str:
        """Answer the question in a line."""
        best, beyond = self.best, self.beyond
        if best.nodes == 0:
            first = self.sizes[1] if len(self.sizes) > 1 else None
            why = "" if first is None else f": the first node brings {_change(first)}"
            return f"batch size {self.batch_size}: do not speculate{why}"
        text = f"batch size {self.batch_size}: up to {best.nodes} nodes ({best.speedup:.2f}x off)"
        if beyond is None:
            return f"{text}, the largest tree looked at: more may pay, raise --max-nodes"
        return f"{text}; node {beyond.nodes} would bring {_change(beyond)}"


def scaling(
    space: TreeSpace, cost: CostModel, batch_size: int, memory: MemoryModel | None = None
) -> Scaling:
    """Return how speed grows with the number of nodes; sizes that do not fit are left out.

    Raises MissingMeasurement when the cost knows nothing about a shape that is asked for.
    """
    off = Trial.at(batch_size, OFF, 1.0, cost.step_ms(batch_size, OFF))
    best: dict[int, Trial] = {}
    for tree in _trees(space):
        if memory is not None and memory.excess(batch_size, tree) > 0:
            continue
        tokens_per_step = space.tokens_per_step(tree)
        step_ms = cost.step_ms(batch_size, tree, tokens_per_step)
        trial = Trial.at(batch_size, tree, tokens_per_step, step_ms)
        known = best.get(tree.num_nodes)
        if known is None or trial.tokens_per_s > known.tokens_per_s:
            best[tree.num_nodes] = trial
    sizes = [Size(0, 0, 1.0, off.step_ms, 1.0, 0.0, 0.0)]
    before = off
    for nodes in sorted(best):
        trial = best[nodes]
        added = nodes - before.tree.num_nodes
        sizes.append(
            Size(
                nodes,
                trial.tree.depth,
                trial.tokens_per_step,
                trial.step_ms,
                trial.tokens_per_s / off.tokens_per_s,
                (trial.tokens_per_step / before.tokens_per_step - 1) / added,
                (trial.step_ms / before.step_ms - 1) / added,
            )
        )
        before = trial
    return Scaling(batch_size, tuple(sizes))


def _trees(space: TreeSpace) -> Iterable[Tree]:
    return dict.fromkeys(tree for _, tree in space.survey if tree.num_nodes)


def _change(size: Size) -> str:
    return f"{100 * size.gain:+.1f} % tokens for {100 * size.cost:+.1f} % time"


@dataclass(frozen=True, slots=True)
class Case:
    """A GPU and a sampling setting, its answers by batch size, and what is estimated about it."""

    gpu: str
    sampling: str
    scalings: tuple[Scaling, ...]
    estimated: str

    @property
    def label(self) -> str:
        """How the case is called on the screen and in pictures."""
        note = f" ({self.estimated})" if self.estimated else ""
        return f"{self.gpu}, {self.sampling}{note}"


def run_analyze(request: TuneRequest, picture: Path | None, *, as_json: bool) -> None:
    """Print, and draw where asked, how speed grows with the tree."""
    if picture is not None:
        _require_picture(picture)
    question = ask(request)
    request = question.request
    space = TreeSpace.of(question.trace, request.max_nodes)
    asked = _case(question, space, request.sampling.label)
    others = [*_other_samplings(question), *_other_gpus(question, space)]
    if picture is not None:
        _draw(asked, others, _title(question), picture)
    console = result_console()
    console.print(_title(question))
    for scale in asked.scalings:
        console.print(f"\n{scale.sentence()}")
        console.print(_size_table(scale))
    console.print("\nbreak-even size (speed over off) by batch size")
    console.print(_case_table([asked, *others]))
    if picture is not None:
        console.print(f"picture: {printable(str(picture))}")
    if as_json:
        _print_json(question, [asked, *others])


def _case(question: Question, space: TreeSpace, sampling: str, estimated: str = "") -> Case:
    request, cost = question.request, question.runtime.cost
    scalings = tuple(
        scaling(space, cost, batch_size, question.memory) for batch_size in request.batch_sizes
    )
    notes = [estimated] if estimated else []
    if question.runtime.source.status == "estimated":
        notes.append("times estimated")
    if question.acceptance.source.status == "estimated":
        notes.append("acceptance borrowed")
    return Case(request.gpu, sampling, scalings, ", ".join(notes))


def _other_gpus(question: Question, space: TreeSpace) -> Iterator[Case]:
    """Yield the question for every other GPU with times of this pair, measured or carried over."""
    request = question.request
    for gpu in sorted(Library.open(request.data).gpu_names() - {request.gpu}):
        try:
            other = ask(replace(request, gpu=gpu))
        except MissingMeasurement:
            continue
        yield _case(other, space, request.sampling.label)


def _other_samplings(question: Question) -> Iterator[Case]:
    """Yield the question for every other sampling setting with a trace of this pair and dataset."""
    request, (target, draft) = question.request, question.refs
    if request.acceptance_from:
        return
    library = Library.open(request.data)
    stem = SEPARATOR.join((target.name, draft.name, question.trace.meta.dataset, "*"))
    found = {
        path.stem.rsplit(SEPARATOR, 1)[1]: path
        for root in reversed(library.roots)
        for path in root.glob(f"traces/{stem}.safetensors")
    }
    for label, path in sorted(found.items()):
        if label != request.sampling.label:
            space = TreeSpace.of(load_trace(path), request.max_nodes)
            yield _case(question, space, label, "step times of greedy decoding")


def _title(question: Question) -> str:
    request, (target, draft) = question.request, question.refs
    return (
        f"{target.name} + {draft.name} on {request.gpu} · {question.trace.meta.dataset} · "
        f"{request.sampling.label}: should I scale the tree?"
    )


def _size_table(scale: Scaling) -> Table:
    table = _table(
        "nodes", "depth", "tokens/step", "step ms", "gain/node", "cost/node", "speed over off"
    )
    for size in _shown(scale):
        at_best = " <" if size is scale.best else "  "
        table.add_row(
            str(size.nodes),
            str(size.depth),
            f"{size.tokens_per_step:.3f}",
            f"{size.step_ms:.3f}",
            f"{100 * size.gain:+.2f} %" if size.nodes else "",
            f"{100 * size.cost:+.2f} %" if size.nodes else "",
            f"{size.speedup:.3f}x{at_best}",
        )
    return table


def _shown(scale: Scaling) -> list[Size]:
    """Return the sizes around which times change, the break-even size and the one behind it."""
    kept = (scale.best, scale.beyond)
    return [size for size in scale.sizes if size.nodes in SHOWN_SIZES or size in kept]


def _case_table(cases: list[Case]) -> Table:
    batch_sizes = [scale.batch_size for scale in cases[0].scalings]
    table = _table("GPU, sampling", *map(str, batch_sizes))
    table.columns[0].justify = "left"
    for case in cases:
        best = [scale.best for scale in case.scalings]
        table.add_row(case.label, *(f"{size.nodes} ({size.speedup:.2f}x)" for size in best))
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _print_json(question: Question, cases: list[Case]) -> None:
    document = {
        "target": question.refs[0].name,
        "draft": question.refs[1].name,
        "dataset": question.trace.meta.dataset,
        "cases": [
            {
                "gpu": case.gpu,
                "sampling": case.sampling,
                "estimated": case.estimated,
                "batch_sizes": [
                    {
                        "batch_size": scale.batch_size,
                        "break_even_nodes": scale.best.nodes,
                        "speedup": scale.best.speedup,
                        "faster_than_off_up_to": scale.faster_up_to,
                        "sizes": [asdict(size) for size in scale.sizes],
                    }
                    for scale in case.scalings
                ],
            }
            for case in cases
        ],
    }
    sys.stdout.write(json.dumps(document) + "\n")


def _require_picture(path: Path) -> None:
    """Raise ConfigError for another ending, a place that cannot be written or no matplotlib."""
    if path.suffix not in PICTURE_FORMATS or not path.parent.is_dir():
        raise ConfigError(
            f"--plot writes a .png or .svg file into an existing folder, got {path}; name another"
        )
    require_place(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--plot needs matplotlib; {install_command('plot')}")


def _draw(asked: Case, others: Sequence[Case], title: str, path: Path) -> None:
    """Write the picture to a PNG or SVG file, see `_require_picture`."""
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
