"""What a session is asked for, and what it reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import Decode, Finish, Generation, StopRule
from stree_core.errors import ConfigError, brief
from stree_core.given import prompt_ids


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (token ids), when its output ends, and how it is sampled.

    The prompt may be a list, or an array or tensor of one dimension; it is kept as a tuple. Raises
    ConfigError when it holds no tokens or something else, or the rest is not what it should be.
    """

    prompt: Sequence[int]
    stop: StopRule
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", prompt_ids(self.prompt))
        for name, kind in (("stop", StopRule), ("sampling", SamplingParams)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(
                    f"a request's {name} must be a {kind.__name__}, got {brief(value)}; "
                    f"make one with {kind.__name__}(...)"
                )


class Update(NamedTuple):
    """New tokens of a request; `generation` is all of it, once it has ended.

    With the first tokens `first_token_seconds` is the time since the request was submitted.
    """

    request_id: int
    tokens: list[int]
    generation: Generation | None
    first_token_seconds: float | None = None


class Waiting(NamedTuple):
    """A request that has no slot yet, and when it was submitted."""

    request_id: int
    request: Request
    submitted: float


@dataclass(slots=True)
class Running:
    """A request in a slot; `noted` holds what steps emitted and nobody has looked at.

    No tokens stand for a step with logits that are not finite. While `is_reading` its prompt is
    read, and steps bring it nothing.
    """

    request_id: int
    request: Request
    submitted: float
    is_reading: bool = True
    generation: Generation = field(default_factory=Generation)
    noted: deque[list[int]] = field(default_factory=deque)

    def cut_oldest(self, decode: Decode | None) -> tuple[list[int], Finish | None, str | None]:
        """Return what to keep of the oldest tokens noted, why that is the end, and what failed."""
        emitted = self.noted[0]
        if not emitted:
            text = "logits must be finite, they are not; check the weights and the dtype"
            return [], "error", text
        try:
            return *self.request.stop.cut(emitted, self.generation.tokens, decode), None
        except ConfigError as err:
            return [], "error", str(err)
