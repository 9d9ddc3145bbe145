"""The profile: what was decided for one pair, GPU, dataset and sampling, by batch size."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from stree_core.errors import ConfigError, TreeError
from stree_core.files import dump_yaml, load_yaml, require_place, write_atomically
from stree_core.fp8 import Fp8Kind
from stree_core.limits import MAX_BATCH_SIZE, MAX_CONTEXT, MAX_SEED
from stree_core.shown_text import clean_command, require_printable
from stree_core.tree import MAX_NODES, Tree, Verdict

Status = Literal["measured", "estimated"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Printable = AfterValidator(require_printable)
Name = Annotated[str, Field(min_length=1, max_length=200), Printable]
Note = Annotated[str, Field(max_length=500), Printable]
Command = Annotated[str, AfterValidator(clean_command)]
Versions = Annotated[dict[Name, Name], Field(max_length=64)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
Context = Annotated[int, Field(ge=1, le=MAX_CONTEXT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Ms = Annotated[float, Field(ge=1e-9, le=1e9)]
TokensPerStep = Annotated[float, Field(ge=1, le=MAX_NODES + 1)]
# wide enough for whatever times within `Ms` give, narrow enough that no product overflows
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]
Bounded = Annotated[float, Field(ge=-1e30, le=1e30)]
Rank = Annotated[int, Field(ge=0, le=MAX_NODES)]
Paths = Annotated[
    tuple[Annotated[tuple[Rank, ...], Field(max_length=MAX_NODES)], ...],
    Field(max_length=MAX_NODES),
]


class Strict(BaseModel):
    """Base of every file schema: unknown keys are errors, numbers finite, instances constant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRef(Strict):
    """A model by name and by what its files say.

    `shape_sha256` is ModelShape.digest: a config file may say more than what time depends on.
    `weights_sha256` tells a retrained model apart, see weight_index; None is not compared.
    `weights` says how projections in FP8 are scaled; without, and in no file then, they are not.
    """

    name: Name
    config_sha256: Sha256
    tokenizer_sha256: Sha256 | None = None
    shape_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None
    weights: Fp8Kind | None = None

    @model_serializer(mode="wrap")
    def _without_a_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if self.weights is None:
            content.pop("weights", None)
        return content

    @property
    def label(self) -> str:
        """The name, with how projections are stored where that is not in 16 bits or more."""
        return self.name if self.weights is None else f"{self.name} ({self.weights})"

    def weights_beside(self, other: ModelRef) -> tuple[str, str]:
        """Return the beginnings of both hashes of weights, empty where one is not known."""
        mine, theirs = self.weights_sha256, other.weights_sha256
        return ("", "") if mine is None or theirs is None else (mine[:12], theirs[:12])


class GpuRef(Strict):
    """The GPU that a profile is for; `estimated` when its runtime was not measured on it."""

    name: Name
    status: Status


class Sampling(Strict):
    """How the target samples and how drafts are accepted; greedy is temperature 0.

    None is off for what is left out.
    """

    rule: Literal["greedy", "naive", "mss"] = "greedy"
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1, lt=1 << 31)
    min_p: float | None = Field(default=None, gt=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, ge=1e-6, le=1e6)

    @model_validator(mode="after")
    def _rule_fits_the_temperature(self) -> Sampling:
        if (self.rule == "greedy") != (self.temperature == 0) or (
            self.rule == "greedy" and self.top_p != 1
        ):
            raise ValueError(
                "rule greedy has temperature 0 and top_p 1, naive and mss a temperature above 0, "
                f"got {self.rule}, {self.temperature:g} and {self.top_p:g}"
            )
        if self.rule == "greedy" and self.truncates:
            raise ValueError("top_k and min_p need a temperature above 0, got 0")
        if self.repetition_penalty == 1:
            raise ValueError("a repetition_penalty of 1 changes nothing, leave it out")
        return self

    @property
    def truncates(self) -> bool:
        """True when a part of the distribution is cut off."""
        return self.top_p < 1 or self.top_k is not None or self.min_p is not None

    @property
    def label(self) -> str:
        """The part of file names that tells settings apart: greedy, mss-t1, naive-t0.6-k40-p0.9."""
        parts = (
            ("t", self.temperature or None),
            ("k", self.top_k),
            ("p", self.top_p if self.top_p < 1 else None),
            ("m", self.min_p),
            ("r", self.repetition_penalty),
        )
        return "-".join([self.rule, *(f"{key}{n:g}" for key, n in parts if n is not None)])


class Interval(Strict):
    """A 95 % interval."""

    low: Bounded
    high: Bounded


class Predicted(Strict):
    """What the tuner expects of a row; speedup is tokens/s over decoding with verdict off.

    `gap`: no static tree is predicted to be faster by more than this share (sources.certificate
    says among which trees); None where the trace has no certificate.
    """

    tokens_per_step: TokensPerStep
    step_ms: Ms
    tokens_per_s: Positive
    speedup: Positive
    speedup_interval: Interval
    gap: float | None = Field(default=None, ge=0, le=1e30)


class TreeText(Strict):
    """A tree as its list of paths."""

    paths: Paths

    @model_validator(mode="after")
    def _is_a_tree(self) -> TreeText:
        try:
            self.build()
        except TreeError as err:
            raise ValueError(str(err)) from err
        return self

    def build(self) -> Tree:
        """Return the tree."""
        return Tree.from_paths(self.paths)


class PolicyRow(Strict):
    """What to run for up to `batch_size` active sequences, and why."""

    batch_size: BatchSize
    verdict: Verdict
    tree: TreeText
    predicted: Predicted
    reason: Note

    @model_validator(mode="after")
    def _verdict_fits_tree(self) -> PolicyRow:
        kind = self.tree.build().kind
        if kind != self.verdict:
            raise ValueError(f"verdict {self.verdict} must match its paths, which are {kind}")
        return self


class Measured(Strict):
    """One row that ran live, under `validate` or `--measure`."""

    batch_size: BatchSize
    mode: Name
    tokens_per_step: TokensPerStep
    step_ms: Ms
    spread_ms: float | None = Field(default=None, ge=0, le=1e9)
    tokens_per_s: Positive


class MeasuredBlock(Strict):
    """Live measurements and where they were taken."""

    gpu: Name
    date: Name
    versions: Versions
    rows: Annotated[tuple[Measured, ...], Field(max_length=10_000)]


class Source(Strict):
    """A file that the profile was made from."""

    name: Name
    sha256: Sha256
    status: Status
    note: Note | None = None


class Sources(Strict):
    """The runtime table, the acceptance trace, and the trace's certificate where there is one."""

    runtime: Source
    trace: Source
    certificate: Source | None = None


class ServerRef(Strict):
    """The server that a profile was measured on and is for; `method` is its way to draft."""

    name: Literal["vllm", "sglang"]
    version: Name
    method: Name
    date: Name


class Provenance(Strict):
    """Who made the file, with what; the only block that may differ between equal runs.

    A command is read without the passwords and folders that older versions kept in it.
    """

    version: Name
    git_sha: Name
    versions: Versions
    seed: Seed
    command: Command
    date: Name


class Profile(Strict):
    """Everything needed to decode, to judge and to reproduce one tuning.

    `chat` says that the trace's prompts were put into the target's chat template. With `server` the
    times are that server's, and our own engine refuses the profile.
    """

    schema_version: Literal[1] = 1
    kind: Literal["stree-profile"] = "stree-profile"
    target: ModelRef
    draft: ModelRef
    gpu: GpuRef
    dataset: Name
    sampling: Sampling
    chat: bool = False
    context: Context
    policy: Annotated[tuple[PolicyRow, ...], Field(min_length=1, max_length=64)]
    measured: MeasuredBlock | None = None
    server: ServerRef | None = None
    sources: Sources
    provenance: Provenance

    @model_validator(mode="after")
    def _rows_ascend(self) -> Profile:
        sizes = [row.batch_size for row in self.policy]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"policy rows must have ascending batch sizes, got {sizes}")
        return self

    @property
    def estimated(self) -> bool:
        """True when any source was estimated or borrowed rather than measured for this pair."""
        sources = (self.sources.runtime, self.sources.trace)
        return any(source.status == "estimated" for source in sources)

    def row_for(self, num_sequences: int) -> PolicyRow:
        """Return the row in use: the smallest batch size that is enough, else the largest."""
        for row in self.policy:
            if row.batch_size >= num_sequences:
                return row
        return self.policy[-1]


def load_profile(path: str | Path) -> Profile:
    """Read a profile; raise ConfigError when it is malformed."""
    return load_yaml(Path(path), Profile)


def load_own_profile(path: str | Path) -> Profile:
    """Read a profile to decode by; raise ConfigError when its times are a server's."""
    profile = load_profile(path)
    if profile.server is not None:
        name = profile.server.name
        export = shlex.join(["stree-tune", "export", str(path), "--to", name])
        raise ConfigError(
            f"{path} cannot be run here, its times are those of {name} {profile.server.version}; "
            f"take it to that server with `{export}`"
        )
    return profile


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile atomically."""
    write_atomically(Path(path), dump_yaml(profile))


def require_writable(path: Path, *, force: bool, is_default: bool) -> None:
    """Raise ConfigError when `path` cannot be written or holds what is not ours to replace.

    The default output is replaced when it holds a profile; any other existing file needs `force`.
    """
    require_place(path)
    if force or not path.exists():
        return
    if not is_default:
        raise ConfigError(f"{path} exists and was named by -o; pass --force to replace it")
    try:
        load_profile(path)
    except ConfigError as err:
        raise ConfigError(
            f"{path} exists and is not a stree profile; pass --force or another -o"
        ) from err


Expected = tuple[float, float]
"""The least and the most tokens per step that a profile expects."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Distinct trees and, for every number of active sequences, which of them a step takes.

    The tree without nodes is decoding without speculation. `expected` is a profile's, where rows
    are.
    """

    trees: tuple[Tree, ...]
    rows: tuple[tuple[int, int], ...]
    expected: Expected | None = None

    @classmethod
    def always(cls, trees: Sequence[Tree]) -> Policy:
        """Return the policy of engines that were given trees alone: the first, whatever runs."""
        return cls(tuple(trees), ((1, 0),))

    def choose(self, num_active: int) -> int:
        """Return the tree of the smallest batch size that is not below, else of the largest."""
        fitting = (which for batch_size, which in self.rows if batch_size >= num_active)
        return next(fitting, self.rows[-1][1])


def policy_of(profile: Profile) -> Policy:
    """Return the policy of a profile's rows."""
    trees: list[Tree] = []
    rows = []
    for row in sorted(profile.policy, key=lambda row: row.batch_size):
        tree = row.tree.build()
        if tree not in trees:
            trees.append(tree)
        rows.append((row.batch_size, trees.index(tree)))
    expected = [_expected(row) for row in profile.policy]
    lowest, highest = min(low for low, _ in expected), max(high for _, high in expected)
    return Policy(tuple(trees), tuple(rows), (lowest, highest))


def _expected(row: PolicyRow) -> Expected:
    """Return a row's tokens per step, as far off as the interval of its speedup is wide."""
    predicted = row.predicted
    interval = predicted.speedup_interval
    low, high = (edge / predicted.speedup for edge in (interval.low, interval.high))
    return (
        max(1.0, predicted.tokens_per_step * min(low, 1.0)),
        predicted.tokens_per_step * max(high, 1.0),
    )
