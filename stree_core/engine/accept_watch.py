"""Whether texts are still those that a profile was tuned on, by the tokens that steps emit."""

from __future__ import annotations

import logging

from stree_core.engine.stop import Generation
from stree_core.profile import Expected

logger = logging.getLogger(__name__)

FEWEST_STEPS = 1000
"""Steps of sequences before the mean of tokens per step says anything."""


class AcceptWatch:
    """Sums up the steps of requests that have ended; warns once when they leave what is expected.

    With rows of other trees the interval is from the lowest to the highest of all of them.
    """

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._num_steps = 0
        self._num_tokens = 0
        self._has_warned = False

    def note(self, generation: Generation) -> None:
        """Take note of a request that has ended."""
        self._num_steps += generation.num_steps
        self._num_tokens += generation.num_steps + sum(generation.accept_lengths)
        if self._has_warned or self._num_steps < FEWEST_STEPS:
            return
        mean, (low, high) = self._num_tokens / self._num_steps, self._expected
        if not low <= mean <= high:
            self._has_warned = True
            logger.warning(
                "steps emit %.2f tokens in the mean, the profile expects %.2f to %.2f: the texts "
                "differ from those it was tuned on; record a trace of yours and tune again",
                mean,
                low,
                high,
            )
