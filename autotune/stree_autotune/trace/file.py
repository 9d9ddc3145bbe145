"""The acceptance trace: which child the target's token was, per position, and its file.

A trace file is one safetensors file: arrays `ranks` (uint8 [N], or [N, depths]) and `offsets`
(int64 [prompts + 1]), and two header strings: `meta`, the JSON of `TraceMeta`, and `sha256`, a
digest over that JSON and both arrays. It holds ranks only, never text.

Schema 1 is for drafts that see the text alone: the rank of a token is the same at every depth of a
step. Schema 2 has a depth axis for drafts that feed on their own features: row n holds the ranks of
tokens n, n + 1, ... under the draft that was started at n and followed the text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, deserialize

from stree_core.errors import ConfigError
from stree_core.files import read_limited, write_atomically
from stree_core.profile import Bounded, Context, ModelRef, Name, Provenance, Sampling, Seed, Strict
from stree_core.tree import MAX_NODES

NO_RANK = 255
"""The rank of a position whose token was none of the recorded children."""

MAX_CHILDREN = 64
"""The largest number of children that a trace may record per position."""

MAX_DEPTHS = 64
"""The largest number of depths that a trace may record per position."""

RELIABLE_PROMPTS = 64
"""Below this many prompts an interval over prompts is too narrow to be believed."""

MAX_FILE_BYTES = 256 << 20

Count = Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]


class TraceMeta(Strict):
    """Where a trace comes from; `num_children` is K, the children recorded at every position.

    `depths` is 1 for a draft whose proposals depend on the text alone, else the depth of the
    deepest tree that the trace can tell about.
    """

    schema_version: Literal[1, 2] = 1
    kind: Literal["stree-trace"] = "stree-trace"
    target: ModelRef
    draft: ModelRef
    dataset: Name
    sampling: Sampling
    num_children: int = Field(ge=1, le=MAX_CHILDREN)
    depths: int = Field(default=1, ge=1, le=MAX_DEPTHS)
    max_new_tokens: Context
    ignore_eos: bool = False
    chat: bool = False
    seed: Seed
    dtype: Name
    num_prompts: Count
    statistics: dict[Name, Bounded] = Field(default_factory=dict, max_length=64)
    provenance: Provenance

    @model_validator(mode="after")
    def _schema_fits_the_depths(self) -> TraceMeta:
        if (self.schema_version == 1) != (self.depths == 1):
            raise ValueError(
                f"schema 1 has depths 1 and schema 2 more, got schema {self.schema_version} and "
                f"depths {self.depths}"
            )
        return self

    @property
    def max_depth(self) -> int:
        """The deepest level of a tree that a trace can tell about."""
        return MAX_NODES if self.depths == 1 else self.depths


@dataclass(frozen=True, eq=False)
class Trace:
    """The ranks of all prompts, one after the other.

    `ranks` is uint8 [N]: the child whose token the target emitted, NO_RANK if it was none of K.
    With more than one of `meta.depths` it is [N, depths]: column d of row n is about the token of
    position n + d, NO_RANK behind the prompt's end.
    `offsets` is int64 [prompts + 1]: prompt i owns the positions offsets[i] to offsets[i + 1],
    possibly none. Position 0 of a prompt is the token after the first one, which prefill emits.
    Raises ValueError when the arrays do not fit each other or `meta`.
    """

    ranks: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    meta: TraceMeta

    def __post_init__(self) -> None:
        problem = _problem(self.ranks, self.offsets, self.meta)
        if problem is not None:
            raise ValueError(problem)

    @property
    def ranks_ND(self) -> NDArray[np.uint8]:
        """The ranks by depth, whichever schema; the axis has length 1 without one."""
        return self.ranks.reshape(len(self.ranks), self.meta.depths)

    @property
    def num_positions(self) -> int:
        """Positions of all prompts together."""
        return len(self.ranks)

    @property
    def num_prompts(self) -> int:
        """Prompts, those without a position included."""
        return len(self.offsets) - 1

    @property
    def reliable(self) -> bool:
        """True when there are enough prompts for an interval over prompts."""
        return self.num_prompts >= RELIABLE_PROMPTS


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace atomically; equal traces give equal bytes."""
    meta = trace.meta.model_dump_json()
    offsets = trace.offsets.astype("<i8", copy=False).tobytes()
    ranks = trace.ranks.tobytes()
    end = len(offsets) + len(ranks)
    # safetensors.numpy.save would put the two strings in a random order.
    header = {
        "__metadata__": {"meta": meta, "sha256": _digest(meta, trace.ranks, trace.offsets)},
        "offsets": {
            "dtype": "I64",
            "shape": [len(trace.offsets)],
            "data_offsets": [0, len(offsets)],
        },
        "ranks": {
            "dtype": "U8",
            "shape": list(trace.ranks.shape),
            "data_offsets": [len(offsets), end],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + offsets + ranks)


def load_trace(path: Path) -> Trace:
    """Read a trace; raise ConfigError when the file is missing, damaged or not a trace."""
    return parse_trace(read_limited(path, MAX_FILE_BYTES), str(path))


def parse_trace(data: bytes, name: str) -> Trace:
    """Parse the bytes of a trace file; `name` goes into errors. Raises ConfigError."""
    arrays, header = _read_arrays(data, name)
    meta = _read_meta(header["meta"], name)
    ranks, offsets = arrays["ranks"], arrays["offsets"]
    if header["sha256"] != _digest(header["meta"], ranks, offsets):
        raise _refusal(name, "does not match its own digest, so it was damaged or changed")
    try:
        return Trace(ranks, offsets, meta)
    except ValueError as err:
        raise _refusal(name, f"is inconsistent: {err}") from err


def _read_arrays(data: bytes, file: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the two arrays, read-only, and the two header strings."""
    try:
        # safetensors.numpy.load would crash on the dtypes that numpy lacks.
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as err:
        raise _refusal(file, f"is not a whole safetensors file ({err})") from err
    header = _header_strings(data)
    if set(header) != {"meta", "sha256"}:
        raise _refusal(file, f"must have the header strings meta and sha256, got {sorted(header)}")
    if set(tensors) != {"ranks", "offsets"}:
        raise _refusal(file, f"must hold the arrays ranks and offsets, got {sorted(tensors)}")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, numpy_dtype in (("ranks", "U8", "u1"), ("offsets", "I64", "<i8")):
        tensor = tensors[name]
        shape = tuple(tensor["shape"])
        if tensor["dtype"] != dtype or len(shape) not in ((1, 2) if name == "ranks" else (1,)):
            got = f"{tensor['dtype']} {list(shape)}"
            raise _refusal(file, f"must hold {name} as a list of {dtype}, got {got}")
        arrays[name] = np.frombuffer(bytes(tensor["data"]), dtype=numpy_dtype).reshape(shape)
    return arrays, header


def trace_meta(data: bytes) -> Any:
    """Return the meta of a whole trace file as it was written, before its schema cleans it."""
    return json.loads(_header_strings(data)["meta"])


def _header_strings(data: bytes) -> dict[str, str]:
    """Return the header strings of a whole safetensors file, whose header is valid JSON."""
    num_bytes = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + num_bytes]).get("__metadata__") or {}


def _read_meta(text: str, file: str) -> TraceMeta:
    try:
        return TraceMeta.model_validate(pydantic_core.from_json(text, allow_inf_nan=False))
    except ValidationError as err:
        offence = err.errors(include_url=False)[0]
        where = ".".join(map(str, offence["loc"])) or "meta"
        raise _refusal(file, f"has a wrong key {where} ({offence['msg']})") from err
    except ValueError as err:
        raise _refusal(file, f"has unreadable meta ({err})") from err


def _problem(ranks: NDArray[np.uint8], offsets: NDArray[np.int64], meta: TraceMeta) -> str | None:
    """Return what is wrong with the arrays of a trace, or None."""
    row = () if meta.depths == 1 else (meta.depths,)
    if ranks.dtype != np.uint8 or ranks.ndim == 0 or ranks.shape[1:] != row:
        rows = f" of {meta.depths} each" if row else ""
        return f"ranks must be a list of uint8{rows}, got {ranks.dtype} {list(ranks.shape)}"
    if offsets.dtype != np.int64 or offsets.ndim != 1:
        return f"offsets must be a list of int64, got {offsets.dtype} {list(offsets.shape)}"
    if len(offsets) - 1 != meta.num_prompts:
        return f"{meta.num_prompts} prompts need one offset more, got {len(offsets)}"
    if offsets[0] != 0 or offsets[-1] != len(ranks) or bool((offsets[1:] < offsets[:-1]).any()):
        return f"offsets must rise from 0 to the {len(ranks)} positions"
    unknown = (ranks >= meta.num_children) & (ranks != NO_RANK)
    if unknown.any():
        rank = int(ranks[unknown][0])
        return f"a rank must be below {meta.num_children} or {NO_RANK}, got {rank}"
    if row and bool((ranks[_behind_the_end(offsets, meta.depths)] != NO_RANK).any()):
        return f"a rank behind its prompt's end must be {NO_RANK}"
    return None


def _behind_the_end(offsets: NDArray[np.int64], depths: int) -> NDArray[np.bool_]:
    """Return which ranks [N, depths] are about positions behind the end of their prompt."""
    num_left = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(offsets[-1])
    behind: NDArray[np.bool_] = np.arange(depths) >= num_left[:, None]
    return behind


def _digest(meta: str, ranks: NDArray[Any], offsets: NDArray[Any]) -> str:
    digest = hashlib.sha256(meta.encode())
    digest.update(ranks.tobytes())
    digest.update(offsets.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _refusal(file: str, problem: str) -> ConfigError:
    return ConfigError(f"trace {file} {problem}; record it again")
