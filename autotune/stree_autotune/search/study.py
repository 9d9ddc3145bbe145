"""The outer search: per batch size, the fastest trees that Optuna and the tree solver find."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

from stree_autotune.cost import MemoryModel
from stree_autotune.search.tree_solver import MAX_DEPTH, refine
from stree_autotune.search.tree_space import Cell, TreeSpace
from stree_autotune.store import digits
from stree_core.errors import (
    ConfigError,
    NoFeasibleTree,
    StreeError,
    UnwritableFile,
    reason_of,
    unwritable,
)
from stree_core.extras import install_command
from stree_core.files import open_regular, require_place
from stree_core.tree import DEFAULT_TREE, OFF, Tree

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_URL = re.compile(r"(?P<dialect>\w+)(?P<driver>\+\w+)?://.+", re.DOTALL)
_POSTGRES_DRIVER = "postgresql+psycopg"


@dataclass(frozen=True, slots=True)
class StudyPlace:
    """Where studies are kept: nowhere but in memory, or in a file or database that is shared.

    `question` tells this question from others in the same place; `seed` is the samplers'.
    """

    storage: BaseStorage | None = None
    question: str = ""
    seed: int = 0

    def open(self, batch_size: int | None = None) -> optuna.Study:
        """Return the study of one batch size or of all, with the trials that it has already."""
        # Optuna reports trials, and errors that are raised anyway, on stderr by its own handler.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name = None
        if self.storage is not None:
            name = self.question
            name += f" batch {batch_size}" if batch_size is not None else ""
        return optuna.create_study(
            storage=self.storage,
            study_name=name,
            sampler=optuna.samplers.TPESampler(seed=self.seed % 2**32),
            direction="maximize",
            load_if_exists=True,
        )


def optimize(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], num_trials: int
) -> None:
    """Run trials; raise the storage's own error where it fails, which Optuna's assertion hides."""
    try:
        study.optimize(objective, n_trials=num_trials)
    except AssertionError as err:
        if isinstance(err.__context__, StreeError):
            raise err.__context__ from err
        raise


def open_storage(text: str) -> BaseStorage | None:
    """Open a journal file by its path or a database by its URL; nothing for an empty text.

    Raises ConfigError when the driver is missing or the place cannot be reached.
    """
    if not text:
        return None
    url = _URL.fullmatch(text)
    if url is None:
        return _open_journal(Path(text))
    if url["dialect"] in ("postgres", "postgresql") and not url["driver"]:
        text = _POSTGRES_DRIVER + text[text.index("://") :]
    return _open_database(text)


class _Journal(JournalFileBackend):
    """A journal file whose failures are the project's own.

    Where the disk fails, Optuna's lock of the file raises RuntimeError and AssertionError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield what stands from a line on."""
        with self._explained():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines at the end."""
        with self._explained():
            super().append_logs(logs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise unwritable(self._path, err) from err
        except (RuntimeError, AssertionError) as err:
            cause = err.__context__
            reason = reason_of(cause) if isinstance(cause, OSError) else str(err)
            raise UnwritableFile(
                f"{self._path} cannot be written ({reason}), the trials before are kept; free some "
                "space or name another place with --storage"
            ) from err


def _open_journal(path: Path) -> BaseStorage:
    require_place(path)
    if path.exists():
        with open_regular(path):
            pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(_Journal(path))
    except StreeError:
        raise
    # A file that is no journal fails wherever Optuna first misses something in it.
    except Exception as err:
        raise ConfigError(
            f"--storage {path} must be a journal file that can be written, got "
            f"{type(err).__name__} {err}; name another"
        ) from err


def _open_database(url: str) -> BaseStorage:
    from sqlalchemy.exc import SQLAlchemyError

    shown = re.sub(r"//[^@/]*@", "//", url)
    try:
        # A connection that broke while a tree was measured is made anew.
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as err:
        extra = install_command("postgres") if "psycopg" in url else "install its driver"
        raise ConfigError(f"--storage {shown} needs a driver, {err}; {extra}") from err
    except (SQLAlchemyError, ValueError) as err:
        # Drivers repeat the whole URL, with its password, and the statement on further lines.
        problem = str(err).splitlines()[0].replace(url, shown)
        raise ConfigError(
            f"--storage {shown} must be a database that can be reached, got {problem}; "
            "check the URL, and that the server runs"
        ) from err


LONGEST_CHAIN = 8
EXACT = "exact"
"""The user attribute of a trial whose tree is given as it stands."""


def suggest(trial: optuna.Trial, space: TreeSpace) -> Tree:
    """Let Optuna choose a cell, and return its tree."""
    trial.suggest_int("depth", 1, space.max_depth)
    trial.suggest_categorical("width", space.widths)
    trial.suggest_int("num_nodes", 0, space.max_nodes)
    return tree_of(trial, space)


def tree_of(trial: optuna.Trial | optuna.trial.FrozenTrial, space: TreeSpace) -> Tree:
    """Return the tree of a trial: its cell's, or the one that was enqueued as it stands."""
    text = trial.user_attrs.get(EXACT)
    return space.solve(Cell(**trial.params)) if text is None else tree_from_text(text)


def enqueue(study: optuna.Study, space: TreeSpace, picks: Sequence[Cell]) -> None:
    """Queue off, the chains, the picked cells, and the default tree where it fits the limits.

    What the study knows already is not queued again.
    """
    chains = range(1, min(LONGEST_CHAIN, space.max_nodes, space.max_depth) + 1)
    cells = [Cell(1, 1, 0), *(Cell(length, 1, length) for length in chains), *picks]
    # Optuna compares with every trial there is, which a new study need not ask for.
    goes_on = bool(study.get_trials(deepcopy=False))
    for cell in dict.fromkeys(cells):
        study.enqueue_trial(asdict(cell), skip_if_exists=goes_on)
    fits_trace = DEFAULT_TREE.max_children <= space.flat.num_children
    fits_trace &= DEFAULT_TREE.depth <= space.max_depth
    if fits_trace and DEFAULT_TREE.num_nodes <= space.max_nodes:
        enqueue_tree(study, space, DEFAULT_TREE)


def enqueue_tree(study: optuna.Study, space: TreeSpace, tree: Tree) -> None:
    """Queue a tree as it stands rather than what its cell would be solved to."""
    text = text_of(tree)
    known = study.get_trials(deepcopy=False)
    if all(trial.user_attrs.get(EXACT) != text for trial in known):
        fitting = (width for width in space.widths if width >= tree.max_children)
        cell = Cell(max(1, tree.depth), next(fitting, space.widths[-1]), tree.num_nodes)
        study.enqueue_trial(asdict(cell), user_attrs={EXACT: text})


def text_of(tree: Tree) -> str:
    """Return the text by which studies name a tree."""
    return json.dumps(tree.parents[1:])


def tree_from_text(text: str) -> Tree:
    """Return the tree that `text_of` has written."""
    return Tree((-1, *json.loads(text)))


NUM_PICKS = 6
NUM_TRIALS = 24


class CostModel(Protocol):
    """Milliseconds of one step; an empty tree is one-token decoding with verdict off."""

    def step_ms(self, batch_size: int, tree: Tree, tokens_per_step: float | None = None) -> float:
        """Return the milliseconds of a step that emits so many tokens.

        Raises MissingMeasurement where none is known.
        """

    def draw(self, rng: np.random.Generator) -> CostModel:
        """Return a cost with the runtime's uncertainty drawn once."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated tree; tokens_per_s counts all sequences of the batch together."""

    tree: Tree
    tokens_per_step: float
    step_ms: float
    tokens_per_s: float

    @classmethod
    def at(cls, batch_size: int, tree: Tree, tokens_per_step: float, step_ms: float) -> Trial:
        """Derive the rate of a tree at a batch size."""
        return cls(tree, tokens_per_step, step_ms, 1000 * batch_size * tokens_per_step / step_ms)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best of each kind, and everything evaluated on the way, in order.

    `chain` and `tree` are None when the limits leave no room for one. `too_large` is the fastest
    tree that does not fit the memory, None unless it would be faster than all that do.
    """

    batch_size: int
    off: Trial
    chain: Trial | None
    tree: Trial | None
    trials: tuple[Trial, ...]
    too_large: Trial | None = None

    @property
    def best(self) -> Trial:
        """The fastest trial."""
        return fastest(self.trials)


@dataclass(frozen=True, slots=True)
class SearchSetting:
    """How long to search, where trials are kept, and what fits.

    `num_trials` is per batch size, the enqueued ones included; `max_token_ms` is what an output
    token of one sequence may take.
    """

    num_trials: int = NUM_TRIALS
    place: StudyPlace = field(default_factory=StudyPlace)
    memory: MemoryModel | None = None
    max_token_ms: float = math.inf

    def excess(self, batch_size: int, tree: Tree) -> float:
        """Return by which share of the memory a tree is too large; 0 or less means it fits."""
        return -1.0 if self.memory is None else self.memory.excess(batch_size, tree)


@dataclass(slots=True)
class Candidates:
    """The trees that were evaluated at one batch size, those that fit apart from those that do not.

    Raises NoFeasibleTree when not even decoding without speculation fits.
    """

    batch_size: int
    cost: CostModel
    setting: SearchSetting
    fitting: dict[Tree, Trial] = field(default_factory=dict)
    too_large: dict[Tree, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory = self.setting.memory
        if memory is not None and self.excess(OFF) > 0:
            raise NoFeasibleTree(
                f"batch size {self.batch_size} needs {memory.describe(self.batch_size, OFF)}, even "
                f"without a draft, and {memory.largest_batch(OFF)} sequences fit; lower "
                "--batch-size or --context"
            )

    def excess(self, tree: Tree) -> float:
        """Return by which share of the memory a tree is too large; 0 or less means it fits."""
        return self.setting.excess(self.batch_size, tree)

    def score(self, tree: Tree, tokens_per_step: float) -> float:
        """Return the tokens per second of a tree, 0 when it does not fit."""
        if tree in self.fitting:
            return self.fitting[tree].tokens_per_s
        if tree not in self.too_large:
            step_ms = self.cost.step_ms(self.batch_size, tree, tokens_per_step)
            trial = Trial.at(self.batch_size, tree, tokens_per_step, step_ms)
            if self.excess(tree) <= 0:
                self.fitting[tree] = trial
                return trial.tokens_per_s
            self.too_large[tree] = trial
        return 0.0

    def result(self) -> SearchResult:
        """Return the best of each kind."""
        result = search_result(self.batch_size, tuple(self.fitting.values()))
        if self.too_large:
            missed = fastest(tuple(self.too_large.values()))
            if missed.tokens_per_s > result.best.tokens_per_s:
                return replace(result, too_large=missed)
        return result


def search_batch(
    space: TreeSpace,
    cost: CostModel,
    batch_size: int,
    setting: SearchSetting | None = None,
    *,
    seed: int,
) -> SearchResult:
    """Search the fastest tree for one batch size; the same seed gives the same result.

    A study that has trials already goes on with them. Raises MissingMeasurement when the cost knows
    nothing about a shape that is asked for, NoFeasibleTree when nothing fits.
    """
    setting = setting or SearchSetting()
    found = Candidates(batch_size, cost, setting)
    picks = best_picks(space, found)[:NUM_PICKS]
    study = replace(setting.place, seed=seed).open(batch_size)
    enqueue(study, space, [cell for _, cell in picks])

    def evaluate(tree: Tree) -> float:
        tokens_per_step = space.tokens_per_step(tree)
        return found.score(tree, tokens_per_step)

    def objective(trial: optuna.Trial) -> float:
        tree = suggest(trial, space)
        rate = evaluate(tree)
        trial.set_constraint("memory", found.excess(tree))
        return rate

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in done:
        evaluate(tree_of(trial, space))
    optimize(study, objective, max(0, setting.num_trials - len(done)))
    speculating = [trial for tree, trial in found.fitting.items() if tree != OFF]
    if speculating:
        start = fastest(speculating).tree
        refine(space.flat, start, found.score, max_nodes=space.max_nodes)
    return found.result()


def binding_limit(result: SearchResult, space: TreeSpace, setting: SearchSetting) -> str:
    """Return which limit keeps the search from a faster tree, empty when none does."""
    missed, best = result.too_large, result.best.tree
    if missed is not None:
        assert setting.memory is not None
        needed = setting.memory.describe(result.batch_size, missed.tree)
        return (
            f"memory binds: {missed.tree.num_nodes} nodes would reach "
            f"{digits(missed.tokens_per_s)} tokens/s but need {needed}"
        )
    if best.num_nodes == space.max_nodes:
        return f"--max-nodes {space.max_nodes} binds"
    if best.depth == space.max_depth < MAX_DEPTH:
        return f"the {best.depth} depths that the trace recorded bind"
    if best.depth == MAX_DEPTH:
        return f"the depth limit of {MAX_DEPTH} binds"
    if best.max_children == space.flat.num_children:
        return f"the {best.max_children} children that the trace recorded bind"
    return ""


def best_picks(space: TreeSpace, found: Candidates) -> list[tuple[float, Cell]]:
    """Score the survey; return the fastest cell of every depth with its rate, fastest first."""
    picks: dict[int, tuple[float, Cell]] = {}
    for cell, tree in space.survey:
        rate = found.score(tree, space.tokens_per_step(tree))
        if rate > picks.get(cell.depth, (0.0, cell))[0]:
            picks[cell.depth] = rate, cell
    return sorted(picks.values(), key=lambda pick: -pick[0])


def fastest(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest rate; among equals the one with the fewest nodes."""
    return max(trials, key=lambda trial: (trial.tokens_per_s, -trial.tree.num_nodes))


def search_result(batch_size: int, trials: tuple[Trial, ...]) -> SearchResult:
    """Return the best of each kind among trials, of which one is off."""
    off = next(trial for trial in trials if trial.tree == OFF)
    chains = [trial for trial in trials if trial.tree.is_chain and trial.tree != OFF]
    trees = [trial for trial in trials if not trial.tree.is_chain]
    chain, tree = (fastest(some) if some else None for some in (chains, trees))
    return SearchResult(batch_size, off, chain, tree, trials)
