"""The runtime table: how long the passes of one pair take on one GPU, in milliseconds.

`points` are passes, by batch size and `size`. None of them stores its states:

- verify (size = tree tokens, root included): the target's pass with LM head and argmax.
- draft_root (size 1): the draft's first pass; two rows, the root alone gets logits and a child.
- draft (size = width): one draft pass over `width` nodes of a level, one child picked for each;
  the level is the first one below the root.
- draft_rows (size = rows of the block up to the pass's last): what a draft pass further down costs
  more, because it has more rows before it: predecessor, root, inner nodes of earlier levels.
- target_store, draft_store (size = slots): what a pass costs more when so many slots store their
  states, which a slot does once its buffered rows are full
  (stree_kernels.launch.rows.MAX_BUFFERED). The largest size is the batch size.
- target_path, draft_path (size 1): what a verify and a draft pass cost more for each token that the
  step before accepted, beyond TIMED_PATH: every pass begins with their rows.
- context (size = tree tokens), draft_context (size 1): what verify and a draft pass cost more for
  each 1024 committed tokens of a slot.
- host (size 1): what the host itself works for a step.

`rules` is what choosing costs more than picking the likeliest token, by rows of logits (nodes times
slots), whatever the batch size; see Work. `steps` holds whole steps of named trees, off being the
tree without nodes, which is measured on both sides of batch sizes at which its kernels change as
well. The deepest level of a tree has no children, so it costs no draft pass. `prompts` says how
long prompts take that are read side by side, from their ids to their first tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from stree_autotune.store.advice import PairWords, probe_command
from stree_autotune.store.step_rule import StepRule
from stree_core.files import dump_yaml, load_yaml, write_atomically
from stree_core.limits import MAX_BATCH_SIZE
from stree_core.profile import (
    BatchSize,
    Command,
    Context,
    ModelRef,
    Ms,
    Name,
    Strict,
    TokensPerStep,
    TreeText,
    Versions,
)
from stree_core.tree import MAX_NODES, OFF

Term = Literal[
    "verify", "draft_root", "draft", "draft_rows", "target_store", "draft_store", "target_path",
    "draft_path", "context", "draft_context", "host",
]  # fmt: skip
UNSIZED: tuple[Term, ...] = ("draft_root", "target_path", "draft_path", "draft_context", "host")
STORES: tuple[Term, ...] = ("target_store", "draft_store")
DIFFERENCES: tuple[Term, ...] = (
    "draft_rows", "target_store", "draft_store", "target_path", "draft_path", "context",
    "draft_context",
)  # fmt: skip
"""Terms that are what one pass takes longer than another, which may be nothing."""

TIMED_PATH = 2
"""Tokens that the step before a timed pass accepted, the bonus token among them."""

Work = Literal["branch", "sample", "sample_truncated", "draw", "draw_truncated", "try", "tries"]
"""branch: SEVERAL children of a node instead of one. sample: the target's token by its
distribution. draw: a child by the draft's distribution (MSS). try: trying one child at the target's
side (MSS), tries: SEVERAL.
"""

Reader = Literal["target", "pair"]

SEVERAL = 4
"""Children of a node where more than one are timed."""

LEAST_MS = 1e-9
Size = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
Rows = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE * (MAX_NODES + 1))]
NonNegativeMs = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PositiveMs = Annotated[Ms, Field(allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
SomeBytes = Annotated[int, Field(ge=1, le=1 << 50)]
Width = Annotated[int, Field(ge=1, le=1 << 30)]


class Point(NamedTuple):
    """The median time of one term and the standard deviation of its repeats."""

    term: Term
    batch_size: BatchSize
    size: Size
    ms: NonNegativeMs
    spread_ms: NonNegativeMs


class RulePoint(NamedTuple):
    """The median extra time of some work of a rule, and its spread."""

    work: Work
    rows: Rows
    ms: NonNegativeMs
    spread_ms: NonNegativeMs


class Step(NamedTuple):
    """The median time of whole steps with one named tree and a rule, and its spread.

    `tokens_per_step` is what these steps emitted: with it a state is stored more often.
    """

    batch_size: BatchSize
    tree: Name
    ms: PositiveMs
    spread_ms: NonNegativeMs
    tokens_per_step: Annotated[TokensPerStep, Field(allow_inf_nan=False)] = 1.0
    rule: StepRule = StepRule.GREEDY

    @property
    def is_off(self) -> bool:
        """True for a step without speculation."""
        return self.tree == OFF.kind


class PromptPoint(NamedTuple):
    """The median time of reading prompts of one length side by side, and its spread.

    The reader is the target alone, or the pair, as an engine that speculates does.
    """

    reader: Reader
    batch_size: BatchSize
    prompt_tokens: Context
    ms: PositiveMs
    spread_ms: NonNegativeMs


class NoRoom(NamedTuple):
    """A pass that did not fit into the memory of the GPU."""

    term: Term
    batch_size: BatchSize
    size: Size


class StepNoRoom(NamedTuple):
    """A whole step that did not fit into the memory of the GPU."""

    batch_size: BatchSize
    tree: Name
    rule: StepRule


class ModelCost(ModelRef):
    """A model and the bytes that its passes move; times are those of every model of its shape.

    `held_bytes` are all its weights, `kept_bytes` the buffered rows of a sequence, `row_bytes` the
    buffers of one row of a block; `num_launches` is about how many kernels a pass launches.
    """

    weight_bytes: SomeBytes
    state_bytes_per_sequence: Bytes
    kv_bytes_per_token: Bytes
    vocab_size: Width
    hidden_size: Width
    held_bytes: SomeBytes
    kept_bytes: Bytes
    row_bytes: Bytes
    num_launches: Width

    @property
    def ref(self) -> ModelRef:
        """The model alone, as profiles and traces name it."""
        return ModelRef(
            name=self.name,
            config_sha256=self.config_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            shape_sha256=self.shape_sha256,
            weights=self.weights,
        )


class TableMeasured(Strict):
    """When, where and how a table was measured."""

    date: Name
    git_sha: Name
    versions: Versions
    driver: Name
    clocks: Name | None = None
    repeats: Width
    command: Command


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
    context: Context
    weights: Literal["real", "random"]
    measured: TableMeasured
    points: Annotated[tuple[Point, ...], Field(max_length=20_000)]
    rules: Annotated[tuple[RulePoint, ...], Field(max_length=1_000)] = ()
    trees: Annotated[dict[Name, TreeText], Field(max_length=64)]
    steps: Annotated[tuple[Step, ...], Field(max_length=4_000)]
    prompts: Annotated[tuple[PromptPoint, ...], Field(max_length=1_000)] = ()
    no_room: Annotated[tuple[NoRoom, ...], Field(max_length=20_000)] = ()
    steps_no_room: Annotated[tuple[StepNoRoom, ...], Field(max_length=4_000)] = ()

    @model_validator(mode="before")
    @classmethod
    def _migrated(cls, content: Any) -> Any:
        """Return a file's content, with whole steps that 0.1 kept in `no_room` in their place."""
        rows = content.get("no_room") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not any(map(_is_old_step, rows)):
            return content
        passes = [row for row in rows if not _is_old_step(row)]
        steps = [row for row in rows if _is_old_step(row)]
        named = [(size, *name.split(" ")) for name, size, _ in steps]
        return {**content, "no_room": passes, "steps_no_room": named}

    @model_validator(mode="after")
    def _points_are_usable(self) -> RuntimeTable:
        seen: set[tuple[object, ...]] = set()
        for point in self.points:
            largest = _largest_size(point)
            if point.size > largest:
                raise ValueError(
                    f"{point.term} has size {largest} at most, but a point has size {point.size}"
                )
            if point.ms < LEAST_MS and point.term not in DIFFERENCES:
                raise ValueError(f"a time is above 0 ms, but {list(point[:3])} has {point.ms:g}")
            _once(seen, "point", point[:3])
        known = seen | {tuple(row) for row in self.no_room}
        for term, batch_size, size in seen:
            if term in STORES and (term, batch_size, batch_size) not in known:
                raise ValueError(
                    f"{term} at batch size {batch_size} has a point with all {batch_size} slots, "
                    f"but there is one of size {size} without it; probe again"
                )
        for rule in self.rules:
            _once(seen, "point of a rule", rule[:2])
        for prompt in self.prompts:
            _once(seen, "time of prompts", prompt[:3])
        return self

    @model_validator(mode="after")
    def _steps_name_trees(self) -> RuntimeTable:
        seen: set[tuple[object, ...]] = set()
        for step in self.steps:
            if step.tree not in self.trees:
                raise ValueError(f"a step names the tree {step.tree!r}, which `trees` lacks")
            _once(seen, "step", (step.batch_size, step.tree, step.rule))
        for name, tree in self.trees.items():
            if bool(tree.paths) == (name == OFF.kind):
                raise ValueError(f"off is the one tree without nodes, but {name!r} is not so")
        return self

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with whole steps, ascending; not those where off alone was measured."""
        # Any step that is timed says how long the host takes.
        passes = {point.batch_size for point in self.points if point.term != "host"}
        sizes = {step.batch_size for step in self.steps}
        drafted = {step.batch_size for step in self.steps if not step.is_off}
        return tuple(sorted(sizes & (passes | drafted)))

    @property
    def off_sizes(self) -> tuple[int, ...]:
        """Batch sizes where off alone was measured, ascending: beside a change of kernels."""
        off = {step.batch_size for step in self.steps if step.is_off}
        return tuple(sorted(off - {*self.batch_sizes}))

    @property
    def number_types(self) -> str:
        """The dtype, and which of the models have projections in FP8."""
        stored = (("target", self.target.weights), ("draft", self.draft.weights))
        return ", ".join([self.dtype, *(f"{role} in {kind}" for role, kind in stored if kind)])

    @property
    def file_name(self) -> str:
        """The name under which the library finds this table."""
        return runtime_file_name(self.gpu, self.target.name, self.draft.name)

    def probe_command(self, words: PairWords | None = None) -> str:
        """Return the command that records this table, or more of it, in a user's words if any."""
        names = PairWords(self.target.name, self.draft.name, words.data if words else ())
        shapes = self.weights == "random"
        default = ("float32", "torch") if self.gpu == "cpu" else ("bfloat16", "triton")
        more: list[str | Path | int] = ["--context", self.context]
        more += ["--dtype", self.dtype] if self.dtype != default[0] else []
        more += ["--backend", self.backend] if self.backend != default[1] else []
        # shapes are found by their names alone
        pair = names if shapes or words is None else words
        return probe_command(self.gpu, pair, *more, shapes=shapes)


def runtime_file_name(gpu: str, target: str, draft: str) -> str:
    """Return the file name of a runtime table."""
    return f"{gpu}--{target}--{draft}.yaml"


def load_runtime_table(path: Path) -> RuntimeTable:
    """Read a runtime table; raise ConfigError when it is malformed."""
    return load_yaml(path, RuntimeTable)


def save_runtime_table(table: RuntimeTable, path: Path) -> None:
    """Write a runtime table atomically; raise ConfigError, the old file intact, when it cannot."""
    write_atomically(path, dump_yaml(table))


def _largest_size(point: Point) -> int:
    if point.term in STORES:
        return point.batch_size
    return 1 if point.term in UNSIZED else MAX_NODES + 1


def _is_old_step(row: Any) -> bool:
    """True for a row [tree and rule, batch size, tokens] among those of passes, as 0.1 wrote it."""
    return isinstance(row, list) and len(row) == 3 and len(str(row[0]).split(" ")) == 2


def _once(seen: set[tuple[object, ...]], what: str, key: tuple[object, ...]) -> None:
    if key in seen:
        raise ValueError(f"every {what} stands once, but {list(key)} stands twice")
    seen.add(key)
