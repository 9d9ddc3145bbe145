"""The two pairs that are decoded: the demo pair, and shapes whose acceptance a trace decides.

The shapes mamba2-2.7b and mamba2-130m have random weights: there, and in the benchmarks alone, the
target's choices are taken from a recorded trace (`TraceRule`), so that steps accept as many tokens
as in the trace while every pass is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stree_autotune.library import Library
from stree_autotune.live import PairRequest, open_pair
from stree_autotune.trace_file import Trace, load_trace
from stree_core.backend import Backend
from stree_core.pair import Pair, Runtime
from stree_core.rules import GreedyRule, Rule, SamplingSupport
from stree_core.sampling import SamplingParams
from stree_core.tree_plan import TreePlan

DEMO = ("demo-target", "demo-draft")
SHAPES = ("mamba2-2.7b", "mamba2-130m")
TRACE = "demo-target--demo-draft--gsm8k--greedy"


class TraceRule(GreedyRule):
    """Picks after each node the child that a trace names, or a token that is no child.

    Shape letters: T tree tokens, B slots, K children, N positions, V vocabulary, L path capacity.
    """

    def __init__(
        self, plan: TreePlan, backend: Backend, trace: Trace, ranks_N: Tensor, place_B: Tensor
    ) -> None:
        super().__init__(plan, backend)
        tree = plan.tree
        most = max((len(children) for children in tree.children), default=0)
        rows = [[*children, *[-1] * (most + 1 - len(children))] for children in tree.children]
        self._child_TK = torch.tensor(rows, device=ranks_N.device)
        self._depth_T = plan.tables.depths_T
        self._first_of = trace.offsets.tolist()
        self._ranks_N = ranks_N
        self._place_B = place_B

    def start(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin at the positions of the trace's prompt that `numbered_prompt` names."""
        self._place_B[slot] = self._first_of[prompt[0] - 1]

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the tokens of the children that the trace accepts."""
        likeliest_TB = super().choose(logits_TBV, tokens_TB)
        place_TB = (self._place_B + self._depth_T[:, None]) % len(self._ranks_N)
        rank_TB = self._ranks_N[place_TB]
        last = self._child_TK.shape[1] - 1
        node_TB = self._child_TK.gather(1, rank_TB.clamp(max=last))
        taken_TB = tokens_TB.gather(0, node_TB.clamp(min=0))
        other_TB = (likeliest_TB + 12345) % logits_TBV.shape[-1]
        return torch.where(node_TB >= 0, taken_TB, other_TB)

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Move on in the trace."""
        self._place_B.add_(count_B)


def accepting(trace: Trace, num_slots: int) -> SamplingSupport:
    """Return the support of an engine whose steps accept what a trace says."""

    def make(plans: Sequence[TreePlan], backend: Backend) -> list[Rule]:
        device = plans[0].node_T1.device
        ranks_N = torch.from_numpy(trace.ranks.astype("int64")).to(device)
        place_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        return [TraceRule(plan, backend, trace, ranks_N, place_B) for plan in plans]

    return SamplingSupport(stand_in=make)


def numbered_prompt(index: int) -> list[int]:
    """Return a prompt of four tokens that stands for a trace's prompt number `index`."""
    return [index + 1, 2, 3, 4]


def open_named(name: str, device: str, data: Sequence[Path] = ()) -> tuple[Pair, Trace | None]:
    """Return the pair "demo", with its own acceptance, or the shapes with their trace."""
    if name == "demo":
        return open_pair(PairRequest(*DEMO, (), Runtime(device))), None
    trace = load_trace(Library.open(data).find_trace_file(TRACE))
    return open_pair(PairRequest(*SHAPES, (), Runtime(device), shapes=True)), trace
