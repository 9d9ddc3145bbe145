"""Server tables: step times of a server by batch size and K, and its acceptance, as files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from stree_autotune.store import SEPARATOR, SERVERS, check_name
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.files import dump_yaml, load_yaml, write_atomically
from stree_core.profile import BatchSize, Context, Ms, Name, Note, Positive, Strict

MAX_ROUNDS = 100
MAX_CELLS = 1024
MAX_DRAFT_TOKENS = 64

ServerName = Literal["vllm", "sglang"]
Round = Annotated[int, Field(ge=0, le=10_000)]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)]
Count = Annotated[int, Field(ge=0, le=1 << 60)]
Findings = Annotated[tuple[Note, ...], Field(max_length=200)]


class Served(Strict):
    """What was measured: the server, its version, the pair, the GPU, and when.

    `method` is the server's name of the way it drafts: draft_model, mtp, eagle3, ngram, suffix.
    """

    server: ServerName
    version: Name
    gpu: Name
    target: Name
    draft: Name
    method: Name
    date: Name
    flags: Note = ""
    weights: Note = ""


class TimedCell(Strict):
    """Runs with one batch size and K: step times and all requests' tokens/s, by round.

    A round is one start of the server; runs of one round share what a start decides.
    """

    batch_size: BatchSize
    draft_tokens: DraftTokens
    rounds: Annotated[tuple[Round, ...], Field(min_length=1, max_length=MAX_ROUNDS)]
    step_ms: Annotated[tuple[Ms, ...], Field(min_length=1, max_length=MAX_ROUNDS)]
    tokens_per_s: Annotated[tuple[Positive, ...], Field(max_length=MAX_ROUNDS)] = ()
    spread: Annotated[float, Field(ge=0, le=1e9)] = 0.0

    @model_validator(mode="after")
    def _one_of_each(self) -> TimedCell:
        if len(self.rounds) != len(self.step_ms):
            raise ValueError(
                f"rounds and step_ms must be as many, got {len(self.rounds)} and "
                f"{len(self.step_ms)}"
            )
        return self


class ServerTable(Strict):
    """Step times of one server, in the shape that tuning reads; `derived` says how."""

    schema_version: Literal[1] = 1
    kind: Literal["stree-server-table"] = "stree-server-table"
    served: Served
    context: Context
    derived: Note
    findings: Findings = ()
    cells: Annotated[tuple[TimedCell, ...], Field(min_length=1, max_length=MAX_CELLS)]

    @model_validator(mode="after")
    def _cells_differ(self) -> ServerTable:
        keys = [(cell.batch_size, cell.draft_tokens) for cell in self.cells]
        if len(set(keys)) < len(keys):
            raise ValueError("cells must differ in batch size or K")
        return self

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The measured batch sizes, ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def draft_tokens_at(self, batch_size: int) -> tuple[int, ...]:
        """Return the Ks that were measured at a batch size, off as 0, ascending."""
        return tuple(
            sorted(cell.draft_tokens for cell in self.cells if cell.batch_size == batch_size)
        )


class AcceptedRun(Strict):
    """What one run with a fixed K accepted.

    steps: drafts that were verified; accepted: draft tokens kept in all of them; by_position: steps
    that kept at least so many tokens, empty where the server does not say.
    """

    draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)]
    batch_size: BatchSize
    round: Round
    steps: Annotated[int, Field(ge=1, le=1 << 60)]
    accepted: Count
    by_position: Annotated[tuple[Count, ...], Field(max_length=MAX_DRAFT_TOKENS)] = ()

    @model_validator(mode="after")
    def _fits(self) -> AcceptedRun:
        if self.accepted > self.steps * self.draft_tokens:
            raise ValueError(
                f"accepted must be at most steps x K, got {self.accepted} of "
                f"{self.steps} x {self.draft_tokens}"
            )
        counts = (self.steps, *self.by_position)
        if any(later > before for before, later in pairwise(counts)):
            raise ValueError(f"by_position must not rise, got {list(self.by_position)[:8]}")
        return self

    @property
    def tokens_per_step(self) -> float:
        """Accept length + 1."""
        return 1 + self.accepted / self.steps


class ServerAcceptance(Strict):
    """What a server accepted on a dataset, from runs with a fixed K only."""

    schema_version: Literal[1] = 1
    kind: Literal["stree-server-acceptance"] = "stree-server-acceptance"
    served: Served
    dataset: Name
    derived: Note
    findings: Findings = ()
    runs: Annotated[tuple[AcceptedRun, ...], Field(min_length=1, max_length=100_000)]

    def tokens_per_step(self, draft_tokens: int) -> float:
        """Return the mean over all runs of a K that ran, the bonus token counted."""
        runs = [run for run in self.runs if run.draft_tokens == draft_tokens]
        return 1 + sum(run.accepted for run in runs) / sum(run.steps for run in runs)

    def marginal_rates(self, draft_tokens: int) -> tuple[float, ...]:
        """Return the share of steps that keep at least 1, 2, ... tokens at a K; () if unknown."""
        runs = [run for run in self.runs if run.draft_tokens == draft_tokens and run.by_position]
        steps = sum(run.steps for run in runs)
        return tuple(
            sum(run.by_position[place] for run in runs if place < len(run.by_position)) / steps
            for place in range(draft_tokens if runs else 0)
        )


FileT = TypeVar("FileT", ServerTable, ServerAcceptance)


def file_stem(served: Served) -> str:
    """Return how the files of a server, pair and GPU are named."""
    parts = (served.gpu, served.server, short_name(served.target), short_name(served.draft))
    return SEPARATOR.join(check_name(part, "name") for part in parts)


def short_name(name: str) -> str:
    """Return the last part of a path or hub id."""
    return name.rstrip("/").rsplit("/", maxsplit=1)[-1]


def table_path(folder: Path, served: Served) -> Path:
    """Return where a server table is kept in a data folder."""
    return folder / SERVERS / f"{file_stem(served)}.times.yaml"


def acceptance_path(folder: Path, served: Served, dataset: str) -> Path:
    """Return where a server's acceptance on a dataset is kept in a data folder."""
    name = f"{file_stem(served)}{SEPARATOR}{check_name(dataset, 'dataset')}.acceptance.yaml"
    return folder / SERVERS / name


def save(content: ServerTable | ServerAcceptance, path: Path) -> None:
    """Write either kind of file atomically."""
    write_atomically(path, dump_yaml(content))


def load_server_table(path: Path) -> ServerTable:
    """Read a server table; raise ConfigError when it is malformed."""
    return load_yaml(path, ServerTable)


def load_server_acceptance(path: Path) -> ServerAcceptance:
    """Read a server's acceptance; raise ConfigError when it is malformed."""
    return load_yaml(path, ServerAcceptance)


def find_one(folders: Iterable[Path], pattern: tuple[str, ...], suffix: str, command: str) -> Path:
    """Return the one file in servers/ whose name has these parts, "" standing for any.

    Raises MissingMeasurement when there is none, ConfigError when several fit.
    """
    wanted = SEPARATOR.join(part or "*" for part in pattern)
    for folder in folders:
        found = sorted((folder / SERVERS).glob(f"{wanted}.{suffix}"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise ConfigError(
                f"--target and --draft name one pair, {len(found)} files fit ({names}); pass both"
            )
        if found:
            return found[0]
    raise MissingMeasurement(f"no file {wanted}.{suffix} is there; make one with `{command}`")


def median(values: Iterable[float]) -> float:
    """Return the median; values must not be empty."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def log_spread(values: Iterable[float]) -> float:
    """Return the standard deviation of the logarithms, 0 for a single value."""
    logs = [math.log(value) for value in values]
    mean = sum(logs) / len(logs)
    return math.sqrt(sum((log - mean) ** 2 for log in logs) / max(1, len(logs) - 1))
