"""The runtime table: how long the passes of one pair take on one GPU, in milliseconds.

Terms of a step, each measured by batch size and `size`:

- one_token (size 1): a whole step with verdict off.
- verify (size = tree tokens, root included): the target's pass with LM head and argmax.
- draft_root (size 1): the draft's first pass; two rows, the root alone gets logits and a child.
- draft (size = width): one draft pass over `width` nodes of a level, one child picked for each.
- branch (size = width): what picking several children of `width` nodes costs more than one each.

The deepest level of a tree has no children, so it costs no draft pass. `steps` holds whole
speculative steps of named trees; they show what the sum of the terms leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from stree_core.files import dump_yaml, load_yaml, write_atomically
from stree_core.profile import ModelRef, Name, Strict, TreeText
from stree_core.tree import MAX_NODES

Term = Literal["one_token", "verify", "draft_root", "draft", "branch"]
Size = Annotated[int, Field(ge=1, le=MAX_NODES + 1)]
NonNegativeMs = Annotated[FiniteFloat, Field(ge=0)]
UNSIZED: tuple[Term, ...] = ("one_token", "draft_root")


class Point(NamedTuple):
    """The median time of one term and the standard deviation of its repeats."""

    term: Term
    batch_size: PositiveInt
    size: Size
    ms: NonNegativeMs
    spread_ms: NonNegativeMs


class Step(NamedTuple):
    """The median time of whole speculative steps with one named tree, and its spread."""

    batch_size: PositiveInt
    tree: Name
    ms: Annotated[FiniteFloat, Field(gt=0)]
    spread_ms: NonNegativeMs


class ModelCost(ModelRef):
    """A model and the bytes that its passes move; times are those of every model of its shape."""

    weight_bytes: PositiveInt
    state_bytes_per_sequence: NonNegativeInt
    kv_bytes_per_token: NonNegativeInt
    vocab_size: PositiveInt
    hidden_size: PositiveInt

    @property
    def ref(self) -> ModelRef:
        """The model alone, as profiles and traces name it."""
        return ModelRef(
            name=self.name,
            config_sha256=self.config_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            shape_sha256=self.shape_sha256,
        )


class TableMeasured(Strict):
    """When, where and how a table was measured."""

    date: Name
    git_sha: Name
    versions: dict[Name, Name]
    driver: Name
    clocks: Name | None = None
    repeats: PositiveInt
    command: Annotated[str, Field(max_length=4000)]


class RuntimeTable(Strict):
    """Times of one target and draft on one GPU; compact rows, see Point and Step."""

    schema_version: Literal[1] = 1
    kind: Literal["stree-runtime"] = "stree-runtime"
    gpu: Name
    gpu_name: Name
    target: ModelCost
    draft: ModelCost
    dtype: Name
    backend: Literal["torch", "triton"]
    context: PositiveInt
    weights: Literal["real", "random"]
    measured: TableMeasured
    points: Annotated[tuple[Point, ...], Field(min_length=1, max_length=20_000)]
    trees: Annotated[dict[Name, TreeText], Field(max_length=64)]
    steps: Annotated[tuple[Step, ...], Field(max_length=4_000)]

    @model_validator(mode="after")
    def _points_are_usable(self) -> RuntimeTable:
        seen: set[tuple[str, int, int]] = set()
        for point in self.points:
            key = (point.term, point.batch_size, point.size)
            if key in seen:
                raise ValueError(f"every point stands once, but {list(key)} stands twice")
            if point.term in UNSIZED and point.size != 1:
                raise ValueError(f"{point.term} has size 1, but a point has size {point.size}")
            if point.ms == 0 and point.term != "branch":
                raise ValueError(f"a time is above 0 ms, but {list(key)} has 0")
            seen.add(key)
        return self

    @model_validator(mode="after")
    def _steps_name_trees(self) -> RuntimeTable:
        seen: set[tuple[int, str]] = set()
        for step in self.steps:
            if step.tree not in self.trees:
                raise ValueError(f"a step names the tree {step.tree!r}, which `trees` lacks")
            if (step.batch_size, step.tree) in seen:
                raise ValueError(f"every step stands once, but {list(step[:2])} stands twice")
            seen.add((step.batch_size, step.tree))
        empty = [name for name, tree in self.trees.items() if not tree.paths]
        if empty:
            raise ValueError(f"a step needs a tree with nodes, but {empty[0]!r} has none")
        return self

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with any point, ascending."""
        return tuple(sorted({point.batch_size for point in self.points}))

    @property
    def file_name(self) -> str:
        """The name under which the library finds this table."""
        return runtime_file_name(self.gpu, self.target.name, self.draft.name)

    @property
    def probe_command(self) -> str:
        """The command that records this table."""
        return probe_command(self.gpu, self.target.name, self.draft.name)


def runtime_file_name(gpu: str, target: str, draft: str) -> str:
    """Return the file name of a runtime table."""
    return f"{gpu}--{target}--{draft}.yaml"


def probe_command(gpu: str, target: str, draft: str) -> str:
    """Return the command that records the runtime table of a pair on a GPU."""
    return f"stree-tune probe --gpu {gpu} --target {target} --draft {draft}"


def load_runtime_table(path: Path) -> RuntimeTable:
    """Read a runtime table; raise ConfigError when it is malformed."""
    return load_yaml(path, RuntimeTable)


def save_runtime_table(table: RuntimeTable, path: Path) -> None:
    """Write a runtime table atomically."""
    write_atomically(path, dump_yaml(table))
