"""The verb analyze: what each further node brings and costs, on the screen and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from stree_autotune.report.field import Field, FieldPage, field_figure, written
from stree_autotune.report.figure import Marks, about
from stree_autotune.report.sizes import (
    Bands,
    Scaling,
    Size,
    best_of_sizes,
    grown_next,
    scaling,
    scaling_of,
    trials,
)
from stree_autotune.search import Question, TreeSpace, Trial, TuneRequest, ask
from stree_autotune.store import (
    SEPARATOR,
    Library,
    StepRule,
    Working,
    digits,
    make_table,
    percent,
    print_json,
    result_console,
    say,
    show_table,
)
from stree_autotune.trace import load_trace
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.files import require_place, write_atomically
from stree_core.shown_text import printable
from stree_core.tree import Tree

SHOWN_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 31, 32, 48, 63, 64, 96, 127, 128, 192, 255)
PICTURE_FORMATS = (".html", ".svg")


@dataclass(frozen=True, slots=True)
class Case:
    """A GPU and a sampling setting, its answers by batch size, and what is estimated about it."""

    gpu: str
    sampling: str
    scalings: tuple[Scaling, ...]
    estimated: str


def run_analyze(request: TuneRequest, picture: Path | None, *, as_json: bool) -> None:
    """Print, and draw where asked, how speed grows with the tree."""
    if picture is not None:
        _require_picture(picture)
    with Working("walking trees of every size"):
        question = ask(request)
        request = question.request
        if not question.trace.num_positions:
            raise MissingMeasurement(
                "this needs positions, and the trace has none; record it again with longer texts"
            )
        space = TreeSpace.of(question.trace, request.max_nodes)
        asked = _case(question, space, request.sampling.label)
        cases = [asked, *_other_samplings(question), *_other_gpus(question, space)]
        if picture is not None:
            write_atomically(picture, written(_page(question, space, cases), picture).encode())
    console = result_console()
    console.print(_title(question), style="bold")
    for note in _notes(question):
        say(console, note)
    marks = _marks(question)
    for scale in asked.scalings:
        console.print()
        say(console, f"{scale.sentence()}.")
        show_table(console, _size_table(scale, marks))
    console.print("\nbreak-even size, with the gain over off")
    show_table(console, _case_table(cases))
    for note in _case_notes(cases):
        say(console, note)
    if picture is not None:
        console.print()
        say(console, f"picture: {printable(str(picture))}")
    if as_json:
        _print_json(question, cases)


def _marks(question: Question) -> Marks:
    runtime, acceptance = question.runtime.source, question.acceptance.source
    return Marks(runtime.status == "estimated", acceptance.status == "estimated")


def _notes(question: Question) -> list[str]:
    """Say what is estimated or borrowed; nothing where all is measured."""
    marks, notes = _marks(question), []
    if marks.times:
        notes.append(f"≈ step times are estimated: {question.runtime.source.note}")
    if marks.tokens:
        notes.append(f"≈ tokens per step are {question.acceptance.source.note}")
    elif not question.trace.reliable:
        notes.append(f"tokens per step are unreliable: {question.acceptance.source.note}")
    return notes


def _case(question: Question, space: TreeSpace, sampling: str, estimated: str = "") -> Case:
    request, cost = question.request, question.runtime.cost
    scalings = tuple(scaling(space, cost, size, question.memory) for size in request.batch_sizes)
    notes = [estimated] if estimated else []
    if question.runtime.source.status == "estimated":
        notes.append("step times estimated")
    if question.acceptance.source.status == "estimated":
        notes.append("acceptance borrowed")
    return Case(request.gpu, sampling, scalings, " and ".join(notes))


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
            yield _case(question, space, label, "step times are those of greedy decoding")


def _title(question: Question) -> str:
    request, (target, draft) = question.request, question.refs
    return (
        f"{target.name} + {draft.name} on {request.gpu} · {question.trace.meta.dataset} · "
        f"{request.sampling.label}"
    )


def _size_table(scale: Scaling, marks: Marks) -> Table:
    table = make_table(
        (
            "nodes",
            "depth",
            about("tokens/step", estimated=marks.tokens),
            about("step ms", estimated=marks.times),
            about("over off", estimated=marks.speed),
            "next brings",
            "costs",
            "",
        )
    )
    for size in _shown(scale):
        nothing = size.gain is None or size.cost is None
        table.add_row(
            str(size.nodes),
            str(size.depth),
            digits(size.tokens_per_step),
            digits(size.step_ms),
            percent(size.speedup - 1, signed=True) if size.nodes else "-",
            "-" if nothing else percent(size.gain or 0.0, signed=True),
            "-" if nothing else percent(size.cost or 0.0, signed=True),
            "best" if size is scale.best else "",
        )
    return table


def _shown(scale: Scaling) -> list[Size]:
    """Return the sizes around which times change, the break-even size and the one behind it."""
    best = scale.best.nodes
    return [size for size in scale.sizes if size.nodes in (*SHOWN_SIZES, best, best + 1)]


def _case_table(cases: Sequence[Case]) -> Table:
    table = make_table(_case_headers(cases))
    table.columns[0].justify = table.columns[1].justify = "left"
    for row in _case_rows(cases):
        table.add_row(*row)
    return table


def _case_headers(cases: Sequence[Case]) -> tuple[str, ...]:
    return ("GPU", "sampling", *(f"batch {scale.batch_size}" for scale in cases[0].scalings))


def _case_rows(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    return [
        (
            case.gpu,
            case.sampling,
            *(_break_even(scale.best, bool(case.estimated)) for scale in case.scalings),
        )
        for case in cases
    ]


def _case_notes(cases: Sequence[Case]) -> tuple[str, ...]:
    notes = dict.fromkeys(case.estimated for case in cases if case.estimated)
    return tuple(f"≈ {note}" for note in notes)


def _break_even(best: Size, estimated: bool) -> str:
    gain = percent(best.speedup - 1, signed=True)
    return about(f"{best.nodes} ({gain})" if best.nodes else "off", estimated=estimated)


def _page(question: Question, space: TreeSpace, cases: Sequence[Case]) -> FieldPage:
    marks = _marks(question)
    figures = tuple(field_figure(field, marks) for field in _fields(question, space))
    return FieldPage(
        _title(question),
        tuple(_notes(question)),
        figures,
        _case_headers(cases),
        tuple(_case_rows(cases)),
        _case_notes(cases),
    )


def _fields(question: Question, space: TreeSpace) -> Iterator[Field]:
    """Yield what the picture shows of every batch size: bands, chains and measured steps."""
    request, cost = question.request, question.runtime.cost
    bands, following = Bands.of(space, cost), grown_next(space)
    longest = min(space.max_depth, request.max_nodes)
    for batch_size in request.batch_sizes:
        found = trials(space, cost, batch_size, question.memory)
        best = best_of_sizes(found.values())
        chains = [best[0]]
        for tree in map(Tree.chain, range(1, longest + 1)):
            if question.memory.excess(batch_size, tree) > 0:
                break
            tokens = space.tokens_per_step(tree)
            step_ms = cost.step_ms(batch_size, tree, tokens)
            chains.append(Trial.at(batch_size, tree, tokens, step_ms))
        yield Field(
            scaling_of(batch_size, found, following),
            tuple(bands.around(batch_size, trial) for trial in best),
            tuple(bands.around(batch_size, trial) for trial in chains),
            _measured_steps(question, batch_size),
        )


def _measured_steps(question: Question, batch_size: int) -> tuple[tuple[float, float], ...]:
    """Return the nodes and the time of speculative steps that were measured on this GPU."""
    if question.runtime.source.status == "estimated":
        return ()
    table, rule = question.runtime.table, StepRule.of(question.request.sampling)
    nodes = {name: tree.build().num_nodes for name, tree in table.trees.items()}
    return tuple(
        (float(nodes[step.tree]), step.ms)
        for step in table.steps
        if step.batch_size == batch_size
        and not step.is_off
        and step.rule == rule
        and nodes[step.tree] <= question.request.max_nodes
    )


def _print_json(question: Question, cases: list[Case]) -> None:
    document = {
        "target": question.refs[0].name,
        "draft": question.refs[1].name,
        "dataset": question.trace.meta.dataset,
        "reliable": question.trace.reliable,
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
    print_json(document)


def _require_picture(path: Path) -> None:
    """Raise ConfigError for another ending or a place that cannot be written."""
    if path.suffix not in PICTURE_FORMATS or not path.parent.is_dir():
        raise ConfigError(
            f"--plot writes a .html or .svg file into an existing folder, got {path}; name another"
        )
    require_place(path)
