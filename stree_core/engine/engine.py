"""A step-level engine: fixed slots, some trees that share them, captured graphs.

Shape letters: B slots, L path capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stree_core.drafting import (
    Draft,
    ModelRows,
    PromptPart,
    PromptReader,
    TargetReader,
    TreePlan,
    as_draft,
    make_plan,
)
from stree_core.engine.ownership import Ownership
from stree_core.engine.prompt_queue import PromptQueue, Reading, pieces
from stree_core.engine.rules import GREEDY, Rule, SamplingSupport, make_rules
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.step import Speculator, make_caches, make_speculators
from stree_core.engine.step_result import ResultQueue, StepResult
from stree_core.errors import ConfigError, NonFiniteLogits, NotEnoughMemory, StreeError, brief
from stree_core.families import warn_of_long_context
from stree_core.given import prompt_ids, whole_number
from stree_core.memory import explain_oom, require_memory
from stree_core.models import Backend, Cache, Model, capture
from stree_core.profile import Policy
from stree_core.tree import Tree

PIECE_TOKENS = 1024
"""As many keep a large GPU busy, and pass in 13 ms with 2.7b parameters (docs/log.md)."""
_WARM_UP_STEPS = 2

MakeRules = Callable[[Sequence[TreePlan], Backend], list[Rule]]
"""Returns the rule of each of an engine's trees."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Slots that run together, positions that each may fill (prompt and output).

    `piece_tokens` is the most tokens of prompts that are read between two steps: with fewer,
    sequences that run wait less, with more, prompts are read in less time. `sampling` is what
    requests may ask for.
    """

    num_slots: int = 1
    num_positions: int = 1024
    piece_tokens: int = PIECE_TOKENS
    use_graph: bool = True
    sampling: SamplingSupport = GREEDY

    def __post_init__(self) -> None:
        if whole_number("piece_tokens", self.piece_tokens) < 1:
            raise ConfigError(
                f"piece_tokens must be 1 or more, got {brief(self.piece_tokens)}; raise it"
            )


def needed_positions(prompt_tokens: int, new_tokens: int, trees: Sequence[Tree]) -> int:
    """Return the positions that a slot needs for a prompt and its output with any of the trees."""
    # The last step may write a whole path behind the last token that is kept, and another step may
    # be under way when it is read.
    return prompt_tokens + new_tokens + 2 * max(tree.depth for tree in trees)


class Engine:
    """Prefills slots and steps them all at once, with any of its trees; a model may be the draft.

    `policy` says which of them a step takes when nobody chooses: the first, or a profile's choice
    where the engine was given a policy.

    A step is `draft -> verify -> accept -> commit` of stree_core.engine.step. On CUDA it is
    captured once per tree and row set; on the CPU it runs as it stands. `launch` does not wait for
    it, `collect` does, so that the host may read one step late. Raises ConfigError when a tree
    needs a draft with the target's tokens and there is none; NotEnoughMemory when the caches do not
    fit.

    Measuring code may run another step (`Speculator.record`), or other rules than those that the
    config's sampling asks for.
    """

    def __init__(
        self,
        target: Model,
        draft: Draft | Model | None,
        trees: Tree | Sequence[Tree] | Policy,
        config: EngineConfig | None = None,
        *,
        rules: MakeRules | None = None,
        step: Callable[[Speculator], None] = Speculator.step,
    ) -> None:
        if isinstance(trees, Tree):
            trees = (trees,)
        self.policy = trees if isinstance(trees, Policy) else Policy.always(trees)
        self.trees = self.policy.trees
        drafting = as_draft(draft)
        require_draft(target, drafting, self.trees)
        self.config = config or EngineConfig()
        self._step = step
        self.ownership = Ownership()
        self.target = target
        self.draft = drafting if any(tree.num_nodes for tree in self.trees) else None
        layout = self.draft.layout if self.draft else ModelRows(frozenset())
        self._plans = [
            make_plan(tree, target.conv_widths, layout, target.device) for tree in self.trees
        ]
        self._history: list[list[int]] = [[] for _ in range(self.config.num_slots)]
        self._epochs = [0] * self.config.num_slots
        self._draft_is_behind = False
        self._prompts = PromptQueue()
        slots, positions = self.config.num_slots, self.config.num_positions
        for model in (target, self.draft):
            if model is not None:
                warn_of_long_context(model.shape, positions)
        num_bytes = self.needed_bytes()
        what = f"remembering {slots} sequences of {positions} positions"
        require_memory(num_bytes, what, target.device)
        with torch.inference_mode(), explain_oom(what, num_bytes, target.device):
            made = (rules or self._make_rules)(self._plans, target.backend)
            self._speculators = make_speculators(
                target, self.draft, self._plans, slots, positions, made
            )
            self._reader = self._prompt_reader()
            self._results = ResultQueue(self._speculators[0].buffers.result_XB)
            self._steps = self._captured_steps()

    @property
    def depth(self) -> int:
        """Depth of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    @property
    def speculator(self) -> Speculator:
        """The parts of a step with the first tree, one by one, for the probe."""
        return self._speculators[0]

    @property
    def num_under_way(self) -> int:
        """Steps that were launched and not collected."""
        return len(self._results)

    @property
    def cache_bytes(self) -> int:
        """Bytes of device memory in states, keys, values and row buffers."""
        return sum(cache.num_bytes for cache in self._caches())

    def require_fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise ConfigError unless a slot has the positions for a prompt and its output."""
        needed = needed_positions(prompt_tokens, new_tokens, self.trees)
        if needed > self.config.num_positions:
            raise ConfigError(
                f"prompt and output must fit {self.config.num_positions} positions, they need "
                f"{needed}; shorten them or raise the context"
            )

    @property
    def next_piece(self) -> tuple[int, ...]:
        """Slots of which `read_piece` reads next, none when all prompts are read."""
        parts = self._prompts.next_parts(self.config.piece_tokens)
        return tuple(part.slot for part in parts)

    def is_reading(self, slot: int) -> bool:
        """Return whether a slot's prompt is not read yet."""
        return slot in self._prompts

    def prefill(
        self, slot: int, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> int:
        """Read a whole prompt into `slot`, make it active and return the first token.

        The slot stays inactive when this raises: what `begin_prompt` does; NonFiniteLogits;
        NotEnoughMemory.
        """
        self.begin_prompt(slot, prompt, params)
        ended: dict[int, int | StreeError] = {}
        while slot not in ended:
            ended = self.read_piece(only=slot)
        first = ended[slot]
        if isinstance(first, StreeError):
            raise first
        return first

    @torch.inference_mode()
    def begin_prompt(
        self, slot: int, prompt: Sequence[int], params: SamplingParams | None = None
    ) -> None:
        """Queue a prompt for an inactive slot; `read_piece` reads it.

        Raises ConfigError for a prompt that is empty, holds an unknown token or leaves no position
        for output, and for sampling that the engine was not made for.
        """
        params = params or SamplingParams()
        self.config.sampling.require(params)
        prompt = known_prompt(prompt, self.target)
        self.require_fits(len(prompt), 1)
        self.release(slot)
        self._reader.begin(slot)
        self._prompts.add(slot, Reading(prompt, params))

    @torch.inference_mode()
    def read_piece(self, only: int | None = None) -> dict[int, int | StreeError]:
        """Read up to `piece_tokens` tokens of the prompts that wait, or of slot `only`.

        Returns for each slot whose prompt ended, which is then active, the first token; or what
        went wrong with that prompt alone. Waits until the piece is read. After any exception the
        prompts of the piece are read from their start again, unless they are released.
        """
        parts = self._prompts.next_parts(self.config.piece_tokens, only)
        slots = [part.slot for part in parts]
        size = sum(part.end - part.begin for part in parts)
        try:
            with explain_oom(f"a piece of {size} tokens of a prompt", None, self.target.device):
                hidden_SD = self._reader.read(parts)
                firsts = self._first_tokens(parts, hidden_SD)
                if self.target.device.type == "cuda":
                    torch.cuda.current_stream(self.target.device).synchronize()
        except NotEnoughMemory as err:
            # Which of several is too large, each has to find out alone.
            self._start_again(slots, alone=True)
            if len(parts) > 1:
                return {}
            self._prompts.drop(slots[0])
            return {slots[0]: err}
        except BaseException:
            self._start_again(slots, alone=False)
            raise
        self._prompts.read(parts)
        return firsts

    def _start_again(self, slots: Sequence[int], *, alone: bool) -> None:
        for slot in slots:
            self._speculators[0].buffers.active_B[slot].zero_()
        self._prompts.start_again(slots, alone=alone)

    def _first_tokens(
        self, parts: Sequence[PromptPart], hidden_SD: Tensor
    ) -> dict[int, int | StreeError]:
        """Make the slots active whose prompts end, and draw their first tokens."""
        ending = [place for place, part in enumerate(parts) if part.ends]
        if not ending:
            return {}
        speculator = self._speculators[0]
        logits_SV = self.target.logits(hidden_SD[None, ending])[0]
        firsts: dict[int, int | StreeError] = {}
        for logits_V, part in zip(logits_SV, (parts[place] for place in ending), strict=True):
            slot, prompt = part.slot, part.prompt
            speculator.rule.start(slot, self._prompts.params(slot), prompt)
            first = int(speculator.rule.first(slot, logits_V))
            if not bool(logits_V[first].isfinite()):
                firsts[slot] = NonFiniteLogits(
                    f"logits must be finite, they are not after a prompt of {len(prompt)} tokens; "
                    "check the weights and the dtype"
                )
                continue
            firsts[slot] = first
            buffers = speculator.buffers
            last = torch.tensor([prompt[-1], first], device=self.target.device)
            buffers.tokens_RB[:2, slot] = last
            self._reader.end(slot, len(prompt))
            self._history[slot] = [*prompt, first]
            self._epochs[slot] += 1
            buffers.active_B[slot] = 1
        return firsts

    @torch.inference_mode()
    def launch(self, which: int = 0) -> None:
        """Start a step of all slots with tree number `which`, without waiting for it.

        Raises ConfigError when there is no such tree; any other exception leaves slots undefined.
        """
        number = require_tree(which, len(self.trees))
        speculates = self.trees[number].num_nodes > 0
        with explain_oom("a step", None, self.target.device):
            if speculates and self._draft_is_behind:
                self._catch_up()
            if self.draft is not None and self.draft.falls_behind and not speculates:
                if not self._draft_is_behind:
                    self._reader.fall_behind()
                self._draft_is_behind = True
            self._steps[number]()
            self._results.keep(tuple(self._epochs))

    def collect(self) -> StepResult:
        """Wait for the oldest step not collected; return what it did in slots still the same."""
        result = self._results.next(self._epochs)
        for history, tokens in zip(self._history, result.tokens, strict=True):
            history += tokens
        return result

    def wait(self, num_steps: int | None = None) -> None:
        """Wait for all steps not collected, or the oldest ones; an interrupt loses nothing."""
        self._results.gather(num_steps)

    def step(self, which: int = 0) -> StepResult:
        """Run one step and wait for it."""
        self.launch(which)
        return self.collect()

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Make a slot inactive: it still computes, but no longer advances; forget its prompt."""
        self._prompts.drop(slot)
        # Assigning a number would wait for the step under way.
        self._speculators[0].buffers.active_B[slot].zero_()

    def forget_prompts(self) -> None:
        """Read no further in any prompt."""
        self._prompts.clear()

    def clear(self) -> None:
        """Make all slots inactive, and forget the steps that nobody has collected."""
        for slot in range(self.config.num_slots):
            self.release(slot)
        self._results.drop()
        for cache in self._caches():
            cache.current = 0
        self._draft_is_behind = False

    def needed_bytes(self) -> int:
        """Return what all caches will take: their sizes, summed up without memory behind them."""
        nowhere = torch.device("meta")
        slots, positions = self.config.num_slots, self.config.num_positions
        caches = make_caches((self.target, self.draft), self._plans, slots, positions, nowhere)
        return sum(cache.num_bytes for cache in caches if cache is not None)

    def _catch_up(self) -> None:
        """Let the draft read what was decoded without it: all but the last two tokens of a slot."""
        self._results.gather()
        active = self._speculators[0].buffers.active_B.tolist()
        texts = {slot: text for slot, text in enumerate(self._histories()) if active[slot]}
        for piece in pieces(self._reader.missing(texts), self.config.piece_tokens):
            self._reader.catch_up(piece)
        self._draft_is_behind = False

    def _histories(self) -> list[list[int]]:
        """Return every slot's tokens, those of steps included that nobody has collected."""
        waiting = [result.since(self._epochs) for result in self._results.waiting]
        return [
            [*history, *(token for result in waiting for token in result.tokens[slot])]
            for slot, history in enumerate(self._history)
        ]

    def _make_rules(self, plans: Sequence[TreePlan], backend: Backend) -> list[Rule]:
        slots, vocab_size = self.config.num_slots, self.target.shape.vocab_size
        return make_rules(self.config.sampling, plans, slots, vocab_size, backend)

    def _prompt_reader(self) -> PromptReader:
        target_cache, cache = self._speculators[0].target_cache, self._speculators[0].draft_cache
        use_graph = self.config.use_graph
        if self.draft is None or cache is None:
            return TargetReader(self.target, target_cache, use_graph=use_graph)
        return self.draft.prompt_reader(self.target, target_cache, cache, use_graph=use_graph)

    def _caches(self) -> list[Cache]:
        caches = (self._speculators[0].target_cache, self._speculators[0].draft_cache)
        return [cache for cache in caches if cache is not None]

    def _captured_steps(self) -> list[Callable[[], None]]:
        """Return for each tree a function that runs a step and flips the caches."""
        plain = [self._plain(speculator) for speculator in self._speculators]
        if self.target.device.type != "cuda" or not self.config.use_graph:
            return plain
        # What the libraries allocate with their first calls must not be a graph's. Kernels that no
        # step has run yet are loaded within a capture.
        for _ in range(_WARM_UP_STEPS):
            plain[0]()
        pool = torch.cuda.graph_pool_handle()
        captured = [self._captured(speculator, pool) for speculator in self._speculators]
        for cache in self._caches():
            cache.reset()
        return captured

    def _plain(self, speculator: Speculator) -> Callable[[], None]:
        def run() -> None:
            self._step(speculator)
            self._flip()

        return run

    def _captured(self, speculator: Speculator, pool: Any) -> Callable[[], None]:
        graphs = {}
        for _ in range(2):
            with capture(self.target.device, pool) as graph:
                self._step(speculator)
            graphs[speculator.target_cache.current] = graph
            self._flip()

        def replay() -> None:
            graphs[speculator.target_cache.current].replay()
            self._flip()

        return replay

    def _flip(self) -> None:
        for cache in self._caches():
            cache.flip()


def require_draft(target: Model, draft: Draft | None, trees: Sequence[Tree]) -> None:
    """Raise ConfigError unless the trees need no draft, or have one that shares the tokens."""
    most = max(tree.num_nodes for tree in trees)
    if most == 0:
        return
    if draft is None:
        raise ConfigError(f"a tree of {most} nodes needs a draft model, got none; pass a draft")
    num_tokens, num_known = target.shape.vocab_size, draft.shape.vocab_size
    num_scored = draft.num_scored
    if num_known < num_tokens or num_scored > num_tokens:
        raise ConfigError(
            f"a draft must know and score the target's {num_tokens} tokens, it knows {num_known} "
            f"and scores {num_scored}; load both with load_pair"
        )


def known_prompt(given: object, target: Model) -> tuple[int, ...]:
    """Return a prompt's token ids; raise ConfigError unless the target knows every one."""
    prompt, num_tokens = prompt_ids(given), target.shape.vocab_size
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < num_tokens:
            raise ConfigError(
                f"token ids must be from 0 to {num_tokens - 1}, got {brief(token)} in a prompt; "
                "encode it with the target's own tokenizer"
            )
    return prompt


def require_tree(which: object, num_trees: int) -> int:
    """Return the number of a tree; raise ConfigError when there is none of that number."""
    number = whole_number("the number of a tree", which)
    if not 0 <= number < num_trees:
        raise ConfigError(
            f"an engine's trees are numbered 0 to {num_trees - 1}, got {brief(number)}; choose "
            "one of them"
        )
    return number
