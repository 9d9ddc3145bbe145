"""One run of a load generator against a server: what every format is turned into."""

from __future__ import annotations

from dataclasses import dataclass

from stree_core.errors import ConfigError

FIXED = 0.05
"""By how much drafted tokens per draft may differ from a whole K, where a request ends early."""
AGREES = 0.08
"""By which share two ways to a step time may differ before it is a finding."""


@dataclass(frozen=True, slots=True)
class BenchRun:
    """What was sent and what came out.

    batch_size: most requests at once; draft_tokens: K, 0 for off; round: 0 where the file does not
    say. step_ms: time of a step, pauses for prefill included; usual_ms: median of streamed chunks,
    0 if unknown. steps, accepted, by_position: as in AcceptedRun. running: how many requests
    decoded at once on average.
    """

    file: str
    server: str
    version: str
    target: str
    draft: str
    method: str
    gpu: str
    date: str
    batch_size: int
    draft_tokens: int
    round: int
    step_ms: float
    usual_ms: float
    tokens_per_s: float
    running: float
    context: int
    steps: int
    accepted: int
    by_position: tuple[int, ...]
    flags: str = ""
    weights: str = ""
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """Batch size and K."""
        return self.batch_size, self.draft_tokens


def whole_tokens(file: str, drafted: float, drafts: float, given: int | None) -> tuple[int, str]:
    """Return K and why it is not to be used: the counters say another or no fixed K."""
    mean = drafted / drafts
    if given is not None and given == 0:
        raise ConfigError(
            f"{file} is named a run with K = 0, its counters say {mean:.2f} draft tokens per "
            "draft; name the K that ran"
        )
    tokens = round(mean)
    if tokens < 1 or abs(mean - tokens) > FIXED * tokens or (given is not None and given != tokens):
        wanted = "" if given is None else f" and the run was for K = {given}"
        return max(1, tokens), (
            f"{file}: K changed while it ran ({mean:.2f} draft tokens per draft{wanted}), which "
            "dilutes the rates of later positions; left out, run it with a fixed K"
        )
    return tokens, ""


def require_milliseconds(file: str, tokens_per_s: float, tpot_ms: float, batch_size: int) -> float:
    """Return how many requests decode at once by Little's law.

    Raises ConfigError when times must be in another unit than ms.
    """
    running = tokens_per_s * tpot_ms / 1000
    if running < batch_size / 200 or running > 200 * batch_size:
        raise ConfigError(
            f"{file}: a time per token of {tpot_ms:g} ms does not fit {tokens_per_s:g} tokens/s of "
            f"{batch_size} requests; it must be in milliseconds, convert it"
        )
    return running
