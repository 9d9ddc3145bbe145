"""Steps that accept what a trace says, whatever the models compute: for measuring their time.

How often a state is stored depends on how many tokens a step accepts, so the time of a step does as
well. Here the draft's child of rank c is token c, and the target picks the token of the rank that
the trace has, or a token that is no child. All passes are computed as ever; a step has four tiny
kernels more (a few microseconds). Of a model with routed experts few distinct tokens are seen.

Shape letters: T tree tokens, B slots, V vocabulary, W rows of a level, C children, L path capacity,
N positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stree_autotune.trace_file import Trace
from stree_core.rules import GreedyRule, Rule
from stree_core.tree_plan import DraftLevel, TreePlan


class TraceScript:
    """A trace on the device and each slot's position in it, shared by the rules of an engine.

    `room` is how many positions a slot may go on from where `restart` has put it.
    """

    def __init__(self, trace: Trace, num_slots: int, room: int, device: torch.device) -> None:
        ranks = np.minimum(trace.ranks.astype(np.int64), trace.meta.num_children)
        self._num_positions = len(ranks)
        padded = np.resize(ranks, len(ranks) + room + 1)
        self.tokens_N = torch.from_numpy(padded).to(device)
        self.position_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._rng = np.random.default_rng(0)

    def restart(self) -> None:
        """Put every slot at a position drawn at random."""
        drawn = self._rng.integers(0, self._num_positions, len(self.position_B))
        self.position_B.copy_(torch.from_numpy(drawn))

    def rules(self, plans: Sequence[TreePlan]) -> list[Rule]:
        """Return the rules of some trees."""
        return [TraceRule(plan, self) for plan in plans]


class TraceRule(GreedyRule):
    """Draws and chooses by a script; the logits' likeliest tokens are found and not used."""

    def __init__(self, plan: TreePlan, script: TraceScript) -> None:
        self._depths_T1 = plan.depths_T[:, None]
        self._script = script
        most = max((level.num_children for level in plan.levels), default=0)
        self._child_C = torch.arange(most, device=plan.depths_T.device)

    def draw(self, level: DraftLevel, logits_WBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return child c as token c."""
        drawn_WBC = super().draw(level, logits_WBV, tokens_TB)
        return self._child_C[: level.num_children].expand_as(drawn_WBC)

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the tokens of the ranks that the trace has at each node's depth."""
        super().choose(logits_TBV, tokens_TB)
        return self._script.tokens_N.take(self._script.position_B + self._depths_T1)

    def advance(self, emitted_LB: Tensor, accepted_B: Tensor, active_B: Tensor) -> None:
        """Move on in the trace."""
        self._script.position_B.add_((accepted_B + 1) * active_B)
