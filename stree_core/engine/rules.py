"""How a step draws children and what the target picks after a node: greedy, naive, MSS.

A rule never waits for the device. What it picks after a node follows the target's distribution
whatever the children are (stree_kernels.sampling.children_ref), so every rule is lossless for every
tree.

Shape letters: T tree tokens, B slots, V vocabulary, W rows of a level, C children, I inner nodes,
L path capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stree_core.drafting import DraftLevel, TreePlan
from stree_core.engine.sampling import SamplingParams, SlotSettings, make_settings, processed
from stree_core.errors import ConfigError
from stree_core.models import Backend
from stree_core.profile import Sampling
from stree_kernels.sampling.top_tokens_ref import top_tokens

RuleName = Literal["greedy", "naive", "mss"]

# Streams of random numbers; a level's own begin at _DRAWS.
_PICKS, _TRIES, _DRAWS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class SamplingSupport:
    """What requests may ask of an engine; what they may not costs nothing.

    `greedy` serves temperature 0 alone. `naive` and `mss` serve any temperature; `truncates` allows
    top-k, top-p and min-p, `penalises` a repetition penalty.
    """

    rule: RuleName = "greedy"
    truncates: bool = False
    penalises: bool = False

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingSupport:
        """Return what an engine needs that serves requests under one setting."""
        penalises = sampling.repetition_penalty is not None
        return cls(sampling.rule, truncates=sampling.truncates, penalises=penalises)

    def require(self, params: SamplingParams) -> None:
        """Raise ConfigError unless a request with these parameters can be served."""
        asked = (
            ("a temperature above 0", params.temperature > 0, self.rule != "greedy"),
            ("top-k, top-p or min-p", params.truncates and params.temperature > 0, self.truncates),
            ("a repetition penalty", params.penalises, self.penalises),
        )
        for what, wanted, served in asked:
            if wanted and not served:
                raise ConfigError(
                    f"a request may ask for what its engine was made for, got {what}; make the "
                    "engine with SamplingSupport that allows it"
                )


GREEDY = SamplingSupport()


class Rule(Protocol):
    """What a step asks of a rule; tokens are the tree's, filled up to the level in question."""

    def start(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin a request in `slot`."""

    def first(self, slot: int, logits_V: Tensor) -> Tensor:
        """Return the token that follows the prompt, a tensor of no dimension."""

    def draw(self, level: DraftLevel, logits_WBV: Tensor, tokens_TB: Tensor) -> None:
        """Fill the tokens of the children of a level's nodes by the draft's logits."""

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the token [T, B] that the target picks after each node."""

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Take note of a step's tokens, of which `count_B` count, none of an inactive slot."""


class GreedyRule:
    """Children are the draft's likeliest tokens, the target picks its likeliest one."""

    def __init__(self, plan: TreePlan, backend: Backend) -> None:
        self._node_T1 = plan.node_T1
        self._place_top_tokens = backend.place_top_tokens

    def start(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin a request: there is nothing to remember."""

    def first(self, slot: int, logits_V: Tensor) -> Tensor:
        """Return the likeliest token."""
        return top_tokens(logits_V, 1)[0]

    def draw(self, level: DraftLevel, logits_WBV: Tensor, tokens_TB: Tensor) -> None:
        """Fill in the likeliest tokens."""
        self._place_top_tokens(logits_WBV, level.child_WC, tokens_TB)

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the likeliest token after each node."""
        chosen_TB = torch.empty_like(tokens_TB)
        self._place_top_tokens(logits_TBV, self._node_T1, chosen_TB)
        return chosen_TB

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Take note of nothing."""


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """What is known of every slot's request, whichever tree a step has: settings, tokens seen.

    `seen_BV` (bool) is None where no request may be penalised.
    """

    settings: SlotSettings
    seen_BV: Tensor | None


class SampledRule:
    """Naive sampling or MSS, with settings of their own for every slot.

    Naive: children are the draft's likeliest tokens, the target's token is drawn from its
    distribution. MSS: children are drawn from the draft's distribution without replacement and
    tried in that order.
    """

    def __init__(
        self, support: SamplingSupport, plan: TreePlan, memory: SlotMemory, vocab_size: int,
        backend: Backend,
    ) -> None:  # fmt: skip
        self.settings = memory.settings
        self.seen_BV = memory.seen_BV
        self._support = support
        self._plan = plan
        self._backend = backend
        num_inner = len(plan.inner_I) if support.rule == "mss" else 0
        num_slots = len(memory.settings.step_B)
        self._q_IBV = torch.zeros(num_inner, num_slots, vocab_size, device=plan.node_T1.device)

    def start(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin a request: its settings, its first random numbers, the tokens of its prompt."""
        self.settings.set(slot, params)
        if self.seen_BV is not None:
            self.seen_BV[slot] = False
            self.seen_BV[slot, torch.tensor(prompt, device=self.seen_BV.device)] = True

    def first(self, slot: int, logits_V: Tensor) -> Tensor:
        """Draw the token that follows the prompt."""
        here = slice(slot, slot + 1)
        fields = dataclasses.fields(self.settings)
        own = type(self.settings)(*(getattr(self.settings, field.name)[here] for field in fields))
        seen_11V = None if self.seen_BV is None else self.seen_BV[None, here]
        scores_11V = processed(
            logits_V[None, None], own, seen_11V, truncates=self._support.truncates
        )
        uniform_111 = torch.empty_like(scores_11V[..., :1])
        self._backend.fill_uniforms(own.seed_B, own.step_B, uniform_111, stream=_PICKS)
        token_11 = torch.empty_like(uniform_111[..., 0], dtype=torch.int64)
        self._backend.sample_tokens(scores_11V, own.temperature_B, uniform_111[..., 0], token_11)
        token = token_11[0, 0]
        self.settings.step_B[here] += 1
        if self.seen_BV is not None:
            self.seen_BV[slot, token] = True
        return token

    def draw(self, level: DraftLevel, logits_WBV: Tensor, tokens_TB: Tensor) -> None:
        """Fill in a level's children, likeliest first or in the order of drawing."""
        if self._support.rule == "naive":
            self._backend.place_top_tokens(logits_WBV, level.child_WC, tokens_TB)
            return
        scores_WBV = self._scores(logits_WBV, level.nodes, tokens_TB)
        self._q_IBV[level.first_inner : level.first_inner + len(scores_WBV)] = scores_WBV
        settings = self.settings
        self._backend.place_drawn_tokens(
            scores_WBV, settings.temperature_B, settings.seed_B, settings.step_B, level.child_WC,
            tokens_TB, stream=_DRAWS + level.first_inner,
        )  # fmt: skip

    def choose(self, logits_TBV: Tensor, tokens_TB: Tensor) -> Tensor:
        """Return the token after each node; with MSS children are tried first."""
        plan, temperature_B = self._plan, self.settings.temperature_B
        scores_TBV = self._scores(logits_TBV, None, tokens_TB)
        uniform_TB = self._uniforms((*tokens_TB.shape, 1), _PICKS)[..., 0]
        chosen_TB = torch.empty_like(tokens_TB)
        self._backend.sample_tokens(scores_TBV, temperature_B, uniform_TB, chosen_TB)
        if len(self._q_IBV):
            num_inner, most = plan.child_IC.shape
            uniform_IBC = self._uniforms((num_inner, tokens_TB.shape[1], most), _TRIES)
            self._backend.try_children(
                scores_TBV, self._q_IBV, temperature_B, plan.inner_I, plan.child_IC, tokens_TB,
                uniform_IBC, uniform_TB, chosen_TB,
            )  # fmt: skip
        return chosen_TB

    def advance(self, emitted_LB: Tensor, count_B: Tensor) -> None:
        """Count the step, and remember its tokens where they are penalised."""
        self.settings.step_B.add_(count_B.clamp(max=1))
        if self.seen_BV is not None:
            row_L1 = torch.arange(len(emitted_LB), device=emitted_LB.device)[:, None]
            # Entries that do not count repeat one that does.
            kept_LB = torch.where(row_L1 < count_B, emitted_LB, emitted_LB[:1])
            self.seen_BV.scatter_(1, kept_LB.t(), value=True)

    def _scores(self, logits_NBV: Tensor, nodes_N: Tensor | None, tokens_TB: Tensor) -> Tensor:
        """Return what some nodes, or all, sample from."""
        seen_NBV = None
        if self.seen_BV is not None:
            paths_TL = self._plan.target_path_TL
            path_NL = paths_TL if nodes_N is None else paths_TL[nodes_N]
            seen_NBV = self.seen_BV.expand(len(path_NL), -1, -1).clone()
            seen_NBV.scatter_(2, tokens_TB[path_NL].transpose(1, 2), value=True)
        return processed(logits_NBV, self.settings, seen_NBV, truncates=self._support.truncates)

    def _uniforms(self, size: Sequence[int], stream: int) -> Tensor:
        """Return numbers [N, B, X] that the seeds, the steps and `stream` decide."""
        uniform_NBX = torch.empty(*size, device=self._plan.node_T1.device)
        self._backend.fill_uniforms(
            self.settings.seed_B, self.settings.step_B, uniform_NBX, stream=stream
        )
        return uniform_NBX


def make_rules(
    support: SamplingSupport, plans: Sequence[TreePlan], num_slots: int, vocab_size: int,
    backend: Backend,
) -> list[Rule]:  # fmt: skip
    """Return for each tree the rule that serves `support`; they share what they know of slots."""
    if support.rule == "greedy" and not support.penalises:
        return [GreedyRule(plan, backend) for plan in plans]
    if support.rule == "greedy":
        support = dataclasses.replace(support, rule="naive")
    device = plans[0].node_T1.device
    seen_BV = None
    if support.penalises:
        seen_BV = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
    memory = SlotMemory(make_settings(num_slots, device), seen_BV)
    return [SampledRule(support, plan, memory, vocab_size, backend) for plan in plans]
