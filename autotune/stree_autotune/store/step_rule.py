"""The sampling settings that steps are timed under: what their time depends on, and no more."""

from __future__ import annotations

from enum import StrEnum

from stree_core.profile import Sampling


class StepRule(StrEnum):
    """A rule, and whether a part of the distribution is cut off (top-k, top-p, min-p).

    Values are the text of tables. Steps of one member take the same time at any temperature.
    """

    GREEDY = "greedy"
    NAIVE = "naive"
    NAIVE_TRUNCATED = "naive_truncated"
    MSS = "mss"
    MSS_TRUNCATED = "mss_truncated"

    @classmethod
    def of(cls, sampling: Sampling) -> StepRule:
        """Return the member whose steps take as long as steps with `sampling`.

        Greedy steps with a repetition penalty run the kernels of naive ones; what the penalty
        itself takes is in no table.
        """
        penalised = sampling.repetition_penalty is not None
        rule = "naive" if sampling.rule == "greedy" and penalised else sampling.rule
        asked = rule, sampling.truncates
        return next(
            rule for rule, timed in _TIMED.items() if (timed.rule, timed.truncates) == asked
        )

    @property
    def sampling(self) -> Sampling:
        """The setting at which its steps are timed."""
        return _TIMED[self]


_TIMED = {
    StepRule.GREEDY: Sampling(),
    StepRule.NAIVE: Sampling(rule="naive", temperature=1.0),
    StepRule.NAIVE_TRUNCATED: Sampling(rule="naive", temperature=1.0, top_p=0.9),
    StepRule.MSS: Sampling(rule="mss", temperature=1.0),
    StepRule.MSS_TRUNCATED: Sampling(rule="mss", temperature=1.0, top_p=0.9),
}
