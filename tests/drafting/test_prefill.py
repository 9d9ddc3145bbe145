"""Packed prompts against chains through the kernels of trees: hidden states, states and text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_prefill import ChainPrefill, adopt, settled
from tiny_models import FAMILIES, VOCAB_SIZE, ours, tiny_bamba, tiny_mamba2

from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.prompt_queue import PromptQueue, Reading, pieces
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.models.cache import Cache, CacheSize
from stree_core.models.model import Model
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

LENGTHS = (1, 2, 63, 64, 65, 1000)
TOLERANCE = 1e-10


def prompts_of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        tuple(torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist())
        for length in lengths
    ]


def slot_of(cache: Cache, model: Model, slot: int) -> Cache:
    """Return a cache of one slot with what `slot` holds."""
    one = model.make_cache(CacheSize(1, 1, 1, 1100))
    for mine, theirs in zip(one._tensors(), cache._tensors(), strict=True):
        # Slots come first but in row buffers, of which a slot whose prompt was read needs none.
        if mine.shape[1:] == theirs.shape[1:] and len(theirs) == len(cache.committed_B):
            mine[0] = theirs[slot]
    return one


def read_in_pieces(
    model: Model, prompts: Sequence[Sequence[int]], budget: int
) -> tuple[Cache, list[torch.Tensor]]:
    """Read prompts side by side; return the cache and the hidden states after each."""
    cache = model.make_cache(CacheSize(len(prompts), 1, 1, 1100))
    prefill = Prefill(model, cache, use_graph=False)
    for tensor in cache._tensors():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    whole = [PromptPart(slot, prompt, 0, len(prompt)) for slot, prompt in enumerate(prompts)]
    last: dict[int, torch.Tensor] = {}
    for piece in pieces(whole, budget):
        for part, hidden_D in zip(piece, prefill.read(piece), strict=True):
            last[part.slot] = hidden_D
    for slot, prompt in enumerate(prompts):
        cache.hold(slot, len(prompt))
    return cache, [last[slot] for slot in range(len(prompts))]


@pytest.mark.parametrize("budget", [4096, 100])
@pytest.mark.parametrize("make", [tiny_mamba2, tiny_bamba], ids=["mamba2", "bamba"])
@torch.inference_mode()
def test_prompts_of_any_length_equal_chains(make: Any, budget: int, tmp_path: Path) -> None:
    model = ours(make(), tmp_path, torch.float64)
    prompts = prompts_of(LENGTHS)
    cache, hidden = read_in_pieces(model, prompts, budget)
    for slot, prompt in enumerate(prompts):
        chain = ChainPrefill(model, len(prompt))
        expected = chain.consume(prompt)[-1]
        assert_close("hidden", hidden[slot], expected, tolerance=TOLERANCE)
        read = settled(model, slot_of(cache, model, slot))
        for mine, truth in zip(read, chain.states(), strict=True):
            for actual, wanted in zip(mine, truth, strict=True):
                assert_close("state", actual, wanted, tolerance=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_reads_prompts_as_chains(family: str, tmp_path: Path) -> None:
    model = ours(FAMILIES[family](), tmp_path, torch.float64)
    prompts = prompts_of((70, 3))
    cache, hidden = read_in_pieces(model, prompts, 50)
    for slot, prompt in enumerate(prompts):
        chain = ChainPrefill(model, len(prompt))
        expected = model.logits(chain.consume(prompt)[-1:, None])
        logits = model.logits(hidden[slot][None, None])
        assert_close("logits", logits, expected, tolerance=TOLERANCE)
        read = settled(model, slot_of(cache, model, slot))
        for mine, truth in zip(read, chain.states(), strict=True):
            for actual, wanted in zip(mine, truth, strict=True):
                assert_close("state", actual, wanted, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_text_after_a_prompt_is_that_after_chains(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours(tiny_bamba(), tmp_path, dtype)
    prompts, stop = prompts_of((1, 2, 65, 130)), StopRule(64)
    config = EngineConfig(3, 256, piece_tokens=60)
    trees: tuple[Tree, ...] = (Tree.chain(0), DEFAULT_TREE)
    for tree in trees:
        texts = [
            g.tokens
            for g in generate(Engine(model, model, tree, config), prompts, stop).generations
        ]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "read_piece", _by_chains)
            engine = Engine(model, model, tree, config)
            expected = [g.tokens for g in generate(engine, prompts, stop).generations]
        assert texts == expected


def _by_chains(self: Engine, only: int | None = None) -> Any:
    """Read the next prompt as chains."""
    with torch.inference_mode():
        (part, *_) = self._prompts.next_parts(10_000)
        speculator, hidden = self._speculators[0], torch.empty(0)
        both: list[tuple[Callable[[], Model], Cache | None, Sequence[int]]] = [
            (lambda: self.target, speculator.target_cache, part.prompt),
            (lambda: self.target, speculator.draft_cache, part.prompt[:-1]),
        ]
        for model, cache, tokens in both[::-1]:
            if cache is not None:
                chain = ChainPrefill(model(), len(part.prompt))
                if tokens:
                    hidden = chain.consume(tokens)[-1:]
                adopt(cache, part.slot, chain.cache)
        ends = self._reader.end
        self._reader.end = lambda *_: None  # type: ignore[method-assign]
        firsts = self._first_tokens([part], hidden)
        self._reader.end = ends  # type: ignore[method-assign]
        self._prompts.read([part])
        return firsts


def test_pieces_take_prompts_in_order_and_keep_the_budget() -> None:
    queue, params = PromptQueue(), SamplingParams()
    for slot, prompt in ((3, (1,) * 5), (0, (2,) * 12), (1, (3,) * 2)):
        queue.add(slot, Reading(prompt, params))
    seen = []
    while parts := queue.next_parts(8):
        assert sum(part.end - part.begin for part in parts) <= 8
        seen.append([(part.slot, part.begin, part.end) for part in parts])
        queue.read(parts)
    assert seen == [[(3, 0, 5), (0, 0, 3)], [(0, 3, 11)], [(0, 11, 12), (1, 0, 2)]]


def test_prompts_that_failed_are_read_alone_from_their_start() -> None:
    queue, params = PromptQueue(), SamplingParams()
    for slot in range(3):
        queue.add(slot, Reading((1,) * 4, params))
    queue.read(queue.next_parts(6))
    assert [part.slot for part in queue.next_parts(6)] == [1, 2]
    queue.start_again([1, 2], alone=True)
    taken = []
    while parts := queue.next_parts(6):
        taken.append([(part.slot, part.begin, part.end) for part in parts])
        queue.read(parts)
    assert taken == [[(1, 0, 4)], [(2, 0, 4)]]


def test_pieces_of_parts_cover_every_token_once() -> None:
    parts = [PromptPart(slot, (0,) * 20, 3, 3 + n) for slot, n in enumerate((5, 0, 17, 1))]
    found = pieces(parts, 6)
    assert [sum(p.end - p.begin for p in piece) for piece in found] == [6, 6, 6, 5]
    for slot in (0, 2, 3):
        own = [(p.begin, p.end) for p in itertools.chain(*found) if p.slot == slot]
        assert own[0][0] == 3
        assert all(a[1] == b[0] for a, b in itertools.pairwise(own))
        assert own[-1][1] == parts[slot].end
