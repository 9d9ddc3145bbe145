"""Off or a chain of K for a batch size, from fitted step times and tokens per step.

Options are compared by draws of both, paired: every draw has one set of step times and one sample
of loads for all Ks. *Cannot tell* is said when the interval of the best estimate against another
option includes no difference; of such options the simplest (off, then a smaller K) is taken that is
sure to lose less than MARGIN against the best estimate. In all other cases the best is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stree_autotune.server.acceptance import NUM_DRAWS, TokensPerStep
from stree_autotune.server.fit import StepFit
from stree_core.errors import MissingMeasurement

Floats = NDArray[np.float64]

MARGIN = 0.02
"""What a simpler option may lose at most, with 97.5 % certainty, to be preferred."""
_LOW, _HIGH = 0.025, 0.975


@dataclass(frozen=True, slots=True)
class Gain:
    """By which factor one option is faster than another: estimate and 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (
            round(100 * (each - 1), 1) + 0.0 for each in (self.value, self.low, self.high)
        )
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The Ks of a batch size: estimates, and the logarithms of tokens/s [R, K] in every draw."""

    batch_size: int
    draft_tokens: tuple[int, ...]
    step_ms: tuple[float, ...]
    tokens_per_step: tuple[float, ...]
    log_rates_RK: Floats

    def place(self, draft_tokens: int) -> int:
        """Return the column of a K."""
        return self.draft_tokens.index(draft_tokens)

    def tokens_per_s(self, draft_tokens: int) -> float:
        """Return the estimate for all requests together."""
        place = self.place(draft_tokens)
        return 1000 * self.batch_size * self.tokens_per_step[place] / self.step_ms[place]

    def gain(self, first: int, second: int) -> Gain:
        """Return by which factor K `first` is faster than K `second`."""
        ratio_R = np.exp(
            self.log_rates_RK[:, self.place(first)] - self.log_rates_RK[:, self.place(second)]
        )
        low, high = np.quantile(ratio_R, (_LOW, _HIGH))
        return Gain(self.tokens_per_s(first) / self.tokens_per_s(second), float(low), float(high))

    @property
    def best(self) -> int:
        """The K with the best estimate."""
        return max(self.draft_tokens, key=lambda count: (self.tokens_per_s(count), -count))


@dataclass(frozen=True, slots=True)
class Choice:
    """What to run at a batch size; `rivals` are the Ks that the best cannot be told from."""

    options: Options
    draft_tokens: int
    rivals: tuple[int, ...]
    reason: str

    @property
    def batch_size(self) -> int:
        """The batch size."""
        return self.options.batch_size

    @property
    def cannot_tell(self) -> bool:
        """True when another option may be as fast as the best one."""
        return bool(self.rivals)


def options_by_size(
    fit: StepFit, tokens: TokensPerStep, rng: np.random.Generator
) -> dict[int, Options]:
    """Return the options of batch sizes measured off and with a K; they share the draws.

    Raises MissingMeasurement when there is no such batch size, or no K has an acceptance.
    """
    log_ms_RC = fit.draw(rng, NUM_DRAWS)
    found = {}
    for size in sorted({size for size, _ in fit.cells}):
        measured = [count for each, count in fit.cells if each == size]
        if 0 not in measured or len(measured) == 1:
            continue
        counts = tokens.require(measured)
        places = [fit.index(size, count) for count in counts]
        log_rates_RK = np.stack([np.log(tokens.draws[count]) for count in counts], axis=1)
        found[size] = Options(
            batch_size=size,
            draft_tokens=tuple(counts),
            step_ms=tuple(float(np.exp(fit.mean_C[place])) for place in places),
            tokens_per_step=tuple(tokens.values[count] for count in counts),
            log_rates_RK=log_rates_RK - log_ms_RC[:, places],
        )
    if not found:
        raise MissingMeasurement(
            "a verdict needs off and a K at one batch size, the server table has none with both; "
            "run the plan's K = 0 at the same concurrencies"
        )
    return found


def choose(options: Options) -> Choice:
    """Choose the K of a batch size by the module's rule."""
    best = options.best
    rivals = tuple(
        count
        for count in options.draft_tokens
        if count != best and options.gain(best, count).low <= 1
    )
    simpler = [count for count in rivals if count < best]
    chosen = next(
        (count for count in simpler if options.gain(best, count).high <= 1 + MARGIN), best
    )
    return Choice(options, chosen, rivals, _reason(options, chosen, best, rivals))


def name_of(draft_tokens: int) -> str:
    """Name an option in a sentence."""
    return f"chain {draft_tokens}" if draft_tokens else "off"


def _reason(options: Options, chosen: int, best: int, rivals: tuple[int, ...]) -> str:
    """Say what the choice gains over off, or what speculating would change, and what is unclear."""
    if chosen == 0:
        others = [count for count in options.draft_tokens if count]
        rival = max(others, key=options.tokens_per_s)
        text = f"off: {name_of(rival)} would change speed by {options.gain(rival, 0)}"
    else:
        text = f"{name_of(chosen)} gains {options.gain(chosen, 0)} over off"
        if 0 in rivals and chosen == best:
            text += ", so maybe nothing"
        others = [count for count in options.draft_tokens if count not in (0, chosen)]
        if others:
            rival = max(others, key=options.tokens_per_s)
            text += f" and {options.gain(chosen, rival)} over {name_of(rival)}"
    if rivals:
        names = " and ".join(name_of(count) for count in sorted({best, *rivals}))
        text += f"; cannot tell {names} apart"
    return text
