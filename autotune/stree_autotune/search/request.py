"""What tuning is asked, within what was measured, and the commands that measure the rest."""

from __future__ import annotations

import logging
import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stree_autotune.cost import StepCost
from stree_autotune.store import (
    DEFAULT_DATA,
    Library,
    PairWords,
    is_path,
    probe_command,
    repeated,
    trace_command,
)
from stree_core.families import find_shape_spec
from stree_core.profile import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What `stree-tune` was asked; `acceptance_from` and `dataset` are empty when not given.

    `storage` is a journal file or a database's URL, empty for the default, which live searches have
    in the folder `studies`; `num_trials` is per batch size, 0 for the default. `left_open` names
    the limits (batch_sizes, max_nodes) that nobody asked for: they end where the table does.
    `max_token_ms` limits the time per output token of one sequence.
    `rates` are typed shares of steps that keep at least 1, 2, ... draft tokens, in place of a
    trace; `prefer` says whether the simplest of the fastest options is taken or the fastest.
    `more_rules` are settings like `sampling` with other rules, of which the best is taken.
    `own_data` are the folders of `data` that are no library's copies.
    """

    gpu: str
    dataset: str
    target: str
    draft: str
    sampling: Sampling
    context: int
    batch_sizes: tuple[int, ...]
    max_nodes: int
    data: tuple[Path, ...]
    acceptance_from: str
    seed: int
    storage: str = ""
    studies: Path = DEFAULT_DATA / "studies"
    num_trials: int = 0
    max_token_ms: float = math.inf
    more_rules: tuple[Sampling, ...] = ()
    own_data: tuple[Path, ...] = ()
    left_open: frozenset[str] = frozenset()
    rates: tuple[float, ...] = ()
    prefer: Literal["simple", "fast"] = "simple"

    @property
    def words(self) -> PairWords:
        """What proposed commands say of the pair."""
        return PairWords(self.target, self.draft, self.own_data)

    def trace_command(self, *more: str) -> str:
        """Return the command that records the trace that this request needs."""
        return trace_command(self.words, self.dataset, self.sampling, *more)


def within_measured(request: TuneRequest, cost: StepCost) -> TuneRequest:
    """Return the request with the limits that it leaves open inside what the table has times for.

    What cannot be met stays, for `StepCost.require` to say.
    """
    sizes, nodes = request.batch_sizes, request.max_nodes
    if "batch_sizes" in request.left_open and cost.batch_sizes:
        first, last = cost.batch_sizes[0], cost.batch_sizes[-1]
        sizes = tuple(size for size in sizes if first <= size <= last) or cost.batch_sizes
    if "max_nodes" in request.left_open:
        nodes = cost.most_nodes(sizes, nodes) or nodes
    if (sizes, nodes) == (request.batch_sizes, request.max_nodes):
        return request
    logger.info(
        "the runtime table ends at batch size %d and %d nodes, and so does this; measure more with "
        "`%s`",
        sizes[-1],
        nodes,
        shlex.join([*shlex.split(cost.command), *_size_flags(request)]),
    )
    return replace(request, batch_sizes=sizes, max_nodes=nodes)


def probe_command_of(library: Library, request: TuneRequest) -> str:
    """Return the command that records the table that this request needs."""
    more = ["--context", str(request.context), *_size_flags(request)]
    shapes = all(_is_shape_alone(library, name) for name in (request.target, request.draft))
    return probe_command(request.gpu, request.words, *more, shapes=shapes)


def _size_flags(request: TuneRequest) -> list[str]:
    """Return the limits that the user asked for; a probe's own defaults cover the others."""
    flags = []
    if "batch_sizes" not in request.left_open:
        flags += repeated("--batch-size", request.batch_sizes)
    if "max_nodes" not in request.left_open:
        flags += ["--max-nodes", str(request.max_nodes)]
    return flags


def _is_shape_alone(library: Library, name: str) -> bool:
    """True when a name is a shape spec's and no model's folder."""
    if is_path(name) or find_shape_spec(library.roots, name) is None:
        return False
    return not any((root / "models" / name / "config.json").is_file() for root in library.roots)
