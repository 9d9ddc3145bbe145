"""What there is to tune and decode with: profiles, tables, traces and shapes of every root."""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from stree_autotune.cost import kind_of, quiet_families
from stree_autotune.share import cache_root
from stree_autotune.store import Library, digits, load_runtime_table, shipped_root, show_table
from stree_autotune.trace import load_trace
from stree_core.errors import StreeError
from stree_core.families import load_shape_spec, shape_from_config
from stree_core.profile import load_profile
from stree_core.shown_text import printable

logger = logging.getLogger(__name__)

HEADERS = ("kind", "where", "gpu", "pair", "dataset", "sampling", "status", "age", "name")
NAMED = ("pair", "dataset", "sampling", "gpu", "where")
SHAPE_HEADERS = ("name", "where", "billions", "hidden", "layers", "head", "source")
NUMBERS = ("age", "billions", "hidden")
COLUMN_GAP = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One file; what its kind does not have is empty. `date` is when it was made, ISO 8601."""

    kind: str
    where: str
    gpu: str
    target: str
    draft: str
    dataset: str
    sampling: str
    status: str
    date: str
    path: str

    @property
    def name(self) -> str:
        """The name by which commands find the file."""
        return Path(self.path).stem


Reader = Callable[[Path, str], Row]


def list_rows(library: Library) -> list[Row]:
    """Return every file by kind, each kind in the order in which roots are searched.

    A file that cannot be read is left out with a line in the log.
    """
    readers: tuple[tuple[str, str, Reader], ...] = (
        ("tuned", "yaml", _profile_row),
        ("runtime", "yaml", _table_row),
        ("traces", "safetensors", _trace_row),
    )
    rows = []
    for folder, suffix, read in readers:
        for root in library.roots:
            for path in sorted((root / folder).glob(f"*.{suffix}")):
                try:
                    rows.append(read(path, _where(root)))
                except StreeError as err:
                    logger.warning("left out: %s", err)
    return rows


def print_rows(rows: list[Row], console: Console) -> None:
    """Print the rows as a table.

    Where the screen is too narrow for all columns, those are left out that a name says as well; a
    cut name is of no use.
    """
    now = datetime.datetime.now(datetime.UTC)
    texts = []
    for row in rows:
        pair, age = f"{row.target} + {row.draft}", describe_age(row.date, now)
        said = (row.gpu, pair, row.dataset, row.sampling)
        texts.append((row.kind, row.where, *said, row.status, age, printable(row.name)))
    _print_texts(console, HEADERS, texts, NAMED)


@dataclass(frozen=True, slots=True)
class ShapeRow:
    """A shape spec: parameters in billions, its layers by kind, and whether it has an MTP head."""

    name: str
    where: str
    billions: float
    hidden: int
    layers: str
    mtp: bool
    source: str


def shape_rows(library: Library) -> list[ShapeRow]:
    """Return every shape spec, in the order in which roots are searched.

    One that cannot be read is left out with a line in the log.
    """
    rows = []
    for root in library.roots:
        for path in sorted((root / "shapes").glob("*.yaml")):
            try:
                rows.append(_shape_row(path, _where(root)))
            except StreeError as err:
                logger.warning("left out: %s", err)
    return rows


def print_shapes(rows: list[ShapeRow], console: Console) -> None:
    """Print the shapes as a table, as wide as it takes."""
    texts = [
        (
            printable(row.name),
            row.where,
            digits(row.billions),
            f"{row.hidden:,}",
            row.layers,
            "mtp" if row.mtp else "",
            printable(row.source),
        )
        for row in rows
    ]
    _print_texts(console, SHAPE_HEADERS, texts, ("source", "where", "hidden"))


def _print_texts(
    console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str]
) -> None:
    """Print a table; while it is wider than the screen the next optional column is left out."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    kept = list(range(len(headers)))
    for header in optional:
        if sum(widths[place] + COLUMN_GAP for place in kept) - COLUMN_GAP > console.width:
            kept.remove(headers.index(header))
    table = Table(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0))
    for place in kept:
        justify: Literal["left", "right"] = "right" if headers[place] in NUMBERS else "left"
        table.add_column(headers[place], justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    show_table(console, table)


def _shape_row(path: Path, where: str) -> ShapeRow:
    spec = load_shape_spec(path)
    with quiet_families():
        shape = shape_from_config(spec.config_dict, spec.name)
    kinds = Counter(kind_of(part.mixer) for part in shape.parts)
    layers = ", ".join(f"{count} {kind.removesuffix(' layers')}" for kind, count in kinds.items())
    billions = round(shape.num_parameters / 1e9, 3)
    return ShapeRow(
        spec.name, where, billions, shape.hidden_size, layers, shape.mtp is not None,
        spec.sources[0],
    )  # fmt: skip


def describe_age(date: str, now: datetime.datetime) -> str:
    """Return how long ago an ISO date was, in days from two days on; empty for no such date."""
    try:
        then = datetime.datetime.fromisoformat(date)
    except ValueError:
        return ""
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    hours = (now - then).total_seconds() / 3600
    return f"{hours / 24:.0f} d" if hours >= 48 else f"{max(0.0, hours):.0f} h"


def _where(root: Path) -> str:
    if root == shipped_root():
        return "shipped"
    return "library" if root.is_relative_to(cache_root()) else "local"


def _profile_row(path: Path, where: str) -> Row:
    profile = load_profile(path)
    return Row(
        kind="profile",
        where=where,
        gpu=profile.gpu.name,
        target=profile.target.label,
        draft=profile.draft.label,
        dataset=profile.dataset,
        sampling=profile.sampling.label,
        status="estimated" if profile.estimated else "measured",
        date=profile.provenance.date,
        path=str(path),
    )


def _table_row(path: Path, where: str) -> Row:
    table = load_runtime_table(path)
    return Row(
        kind="table",
        where=where,
        gpu=table.gpu,
        target=table.target.label,
        draft=table.draft.label,
        dataset="",
        sampling="",
        status="measured",
        date=table.measured.date,
        path=str(path),
    )


def _trace_row(path: Path, where: str) -> Row:
    meta = load_trace(path).meta
    return Row(
        kind="trace",
        where=where,
        gpu="",
        target=meta.target.label,
        draft=meta.draft.label,
        dataset=meta.dataset,
        sampling=meta.sampling.label,
        status="measured",
        date=meta.provenance.date,
        path=str(path),
    )
