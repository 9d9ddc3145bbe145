"""Every family's passes and greedy text against transformers' own models, in fp32 on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_prefill import advance, read_prompt
from reference_models import mamba2, nemotron_h_logits, time_steps
from safetensors import safe_open
from tiny_models import (
    FAMILIES,
    TIME_STEP_LIMIT,
    VOCAB_SIZE,
    mixers_of,
    ours,
    perturbed,
    tiny_bamba,
    tiny_mamba2,
    tiny_nemotron_h,
    tiny_qwen3_next,
)
from torch import Tensor
from transformers import PreTrainedModel

from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.launch.rows import MAX_BUFFERED
from stree_kernels.ssm.prompt_scan_ref import CHUNK
from stree_kernels.testing import assert_close

PREFILL_CHUNK = CHUNK

# Two fp32 passes with additions in another order: the worst of these models differs from its own
# float64 pass by 4e-5.
TOLERANCE = 1e-4
PROJECTIONS = ("linear", "linear_activated", "linear_add")
NUM_TOKENS = 64
NUM_POSITIONS = 256

Models = tuple[PreTrainedModel, Model]


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Models:
    theirs = FAMILIES[request.param]()
    return theirs, ours(theirs, tmp_path / "model", torch.float32)


def _random_tokens(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (count,), generator=generator)


@torch.inference_mode()
def _their_logits(theirs: PreTrainedModel, tokens: Tensor) -> Tensor:
    # Without a cache: their one-token path does not clamp time steps.
    logits: Tensor = theirs(tokens[None], use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def _block_logits(model: Model, tokens: Tensor, parents: list[int], prefix: Tensor) -> Tensor:
    """Return logits [T, V] of one block of rows after a prefix."""
    cache = model.make_cache(CacheSize(1, len(parents), 1, 2 * PREFILL_CHUNK))
    if len(prefix):
        read_prompt(model, prefix.tolist(), cache)
    block = make_block(parents, model.conv_widths, model.device)
    hidden = model.forward(tokens[:, None], block, cache, first=0, commit=True)
    return model.logits(hidden)[:, 0]


def test_prefill_logits_equal_transformers(models: Models) -> None:
    theirs, model = models
    tokens = _random_tokens(21, seed=3)
    actual = _block_logits(model, tokens, list(range(-1, 20)), prefix=tokens[:0])
    assert_close("logits", actual, _their_logits(theirs, tokens), tolerance=TOLERANCE)


@torch.inference_mode()
def test_step_by_step_logits_equal_transformers(models: Models) -> None:
    theirs, model = models
    tokens = _random_tokens(21, seed=4)
    block = make_block([-1], model.conv_widths, model.device)
    cache = model.make_cache(CacheSize(1, 1, 1, len(tokens)))
    logits = []
    for token in tokens:
        hidden = model.forward(token.view(1, 1), block, cache, first=0, commit=True)
        logits.append(model.logits(hidden)[0])
        advance(cache, 1)
    expected = _their_logits(theirs, tokens)
    assert_close("logits", torch.cat(logits), expected, tolerance=TOLERANCE)


def test_tree_logits_equal_transformers_on_every_path(models: Models) -> None:
    theirs, model = models
    prefix, tokens = _random_tokens(PREFILL_CHUNK + 5, seed=5), _random_tokens(13, seed=6)
    tree = DEFAULT_TREE
    actual = _block_logits(model, tokens, list(tree.parents), prefix)
    for path in tree.node_paths:
        alone = _their_logits(theirs, torch.cat((prefix, tokens[list(path)])))
        assert_close(f"path {path}", actual[path[-1]], alone[-1], tolerance=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 3])
@torch.inference_mode()
def test_projections_are_told_of_one_token_a_slot(models: Models, num_tokens: int) -> None:
    _, model = models
    told: list[bool] = []

    def noted(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, one_token: bool = False, **options: Any) -> Any:
            told.append(one_token)
            return op(*args, one_token=one_token, **options)

        return call

    ops: dict[str, Any] = {name: noted(getattr(model.backend, name)) for name in PROJECTIONS}
    model.backend = dataclasses.replace(model.backend, **ops)
    block = make_block(list(range(-1, num_tokens - 1)), model.conv_widths, model.device)
    cache = model.make_cache(CacheSize(2, num_tokens, 1, 2 * PREFILL_CHUNK))
    tokens = _random_tokens(2 * num_tokens, seed=7).view(num_tokens, 2)
    model.logits(model.forward(tokens, block, cache, first=0, commit=True))
    assert len(told) > len(model.shape.blocks), "and those of experts are not among them"
    assert set(told) == {num_tokens == 1}


def _their_text(theirs: PreTrainedModel, prompt: Tensor) -> list[int]:
    settings: dict[str, Any] = {
        "max_new_tokens": NUM_TOKENS,
        "do_sample": False,
        "use_cache": False,
    }
    mask = torch.ones_like(prompt)[None]
    text = theirs.generate(prompt[None], attention_mask=mask, eos_token_id=None, **settings)
    tokens: list[int] = text[0, len(prompt) :].tolist()
    return tokens


def test_greedy_text_equals_generate_with_and_without_a_tree(
    models: Models, tmp_path: Path
) -> None:
    theirs, model = models
    prompt = _random_tokens(9, seed=7)
    expected = _their_text(theirs, prompt)
    assert len(expected) == NUM_TOKENS
    draft = ours(perturbed(theirs, 0.05), tmp_path / "draft", torch.float32)
    config = EngineConfig(num_positions=NUM_POSITIONS)
    for tree in (Tree.chain(0), Tree.chain(3), DEFAULT_TREE):
        engine = Engine(model, draft, tree, config)
        run = generate(engine, [prompt.tolist()], StopRule(NUM_TOKENS))
        assert run.generations[0].tokens == expected, f"a tree of {tree.num_nodes} nodes"
    # A draft that never agrees would leave the commit of longer paths untested.
    assert run.tokens_per_step > 1.2


def test_trees_of_a_delta_model_change_no_token_while_states_are_flushed(tmp_path: Path) -> None:
    """In float64, over as many tokens as eight flushes of buffered rows take."""
    theirs = tiny_qwen3_next()
    model = ours(theirs, tmp_path / "model")
    draft = ours(perturbed(theirs, 0.05), tmp_path / "draft")
    prompts = [_random_tokens(length, seed=length).tolist() for length in (3, 70)]
    texts = []
    for tree in (Tree.chain(0), Tree.chain(3), DEFAULT_TREE):
        engine = Engine(model, draft, tree, EngineConfig(2, NUM_POSITIONS + 80))
        run = generate(engine, prompts, StopRule(8 * MAX_BUFFERED))
        texts.append([generation.tokens for generation in run.generations])
    assert texts[0] == texts[1] == texts[2]
    assert run.tokens_per_step > 1.2


@pytest.mark.parametrize("length", [1, 2, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 7])
@pytest.mark.parametrize("make", [tiny_mamba2, tiny_bamba], ids=["mamba2", "bamba"])
def test_prompts_of_any_length_continue_as_in_transformers(
    make: Any, length: int, tmp_path: Path
) -> None:
    theirs = make()
    model = ours(theirs, tmp_path / "model", torch.float32)
    prompt = _random_tokens(length, seed=5)
    engine = Engine(model, None, Tree.chain(0), EngineConfig(num_positions=NUM_POSITIONS))
    run = generate(engine, [prompt.tolist()], StopRule(NUM_TOKENS))
    assert run.generations[0].tokens == _their_text(theirs, prompt)


def test_a_family_drafts_for_any_other(tmp_path: Path) -> None:
    """Each model decodes the same text whichever model drafts for it."""
    loaded = [
        ours(make(), tmp_path / name, torch.float32) for name, make in list(FAMILIES.items())[::3]
    ]
    prompt = _random_tokens(5, seed=8).tolist()
    for target in loaded:
        texts = []
        for draft in loaded:
            engine = Engine(target, draft, Tree.chain(2), EngineConfig(num_positions=64))
            run = generate(engine, [prompt], StopRule(12))
            texts.append(run.generations[0].tokens)
        assert texts == [texts[0]] * len(loaded)


@torch.inference_mode()
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("qwen")])
def test_limits_bite(family: str) -> None:
    """Each side clamps a tenth of all time steps, so that a pass without limits would differ."""
    theirs = FAMILIES[family]()
    mixers, steps = mixers_of(theirs), []
    for mixer in mixers:
        weights = dict(mixer.named_parameters())
        mixer.register_forward_pre_hook(
            lambda module, args, kwargs, w=weights: steps.append(
                time_steps((args[0] if args else kwargs["hidden_states"])[0], w)
            ),
            with_kwargs=True,
        )
    theirs(_random_tokens(64, seed=9)[None], use_cache=False)
    assert len(steps) == len(mixers)
    low, high = TIME_STEP_LIMIT
    values = torch.cat([step.flatten() for step in steps])
    assert (values < low).float().mean() > 0.1
    assert (values > high).float().mean() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("family", ["nemotron-h", "zamba2"])
def test_mixers_that_stand_in_for_transformers_equal_the_formulas(family: str) -> None:
    """What the comparisons above take for these families is the reference, not transformers'."""
    theirs = FAMILIES[family]().double()
    mixer: Any = mixers_of(theirs)[0]
    sizes = {
        "heads": mixer.num_heads, "x_heads": mixer.num_heads, "head_dim": mixer.head_dim,
        "state_dim": mixer.ssm_state_size, "xb_heads": mixer.n_groups, "c_heads": mixer.n_groups,
    }  # fmt: skip
    x_TD = torch.randn(23, mixer.hidden_size, dtype=torch.float64)
    expected = mamba2(x_TD, dict(mixer.named_parameters()), sizes, TIME_STEP_LIMIT)
    assert_close("mixer", mixer(x_TD[None])[0], expected, tolerance=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("limit", [(0.0, math.inf), TIME_STEP_LIMIT])
def test_nemotron_h_equals_the_formulas(limit: tuple[float, float], tmp_path: Path) -> None:
    """`time_step_min` and `time_step_max` are where training starts, and limit nothing here."""
    theirs = tiny_nemotron_h(
        ("mamba", "attention", "mlp", "mamba"), time_step_limit=list(limit), time_step_min=1.2,
        time_step_max=1.3,
    )  # fmt: skip
    model = ours(theirs, tmp_path / "model", torch.float32)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    config = theirs.config.to_dict() | {"hybrid_override_pattern": "M*-M", "time_step_limit": limit}
    tokens = _random_tokens(17, seed=9)
    expected = nemotron_h_logits(weights, config, tokens)
    actual = _block_logits(model, tokens[9:], list(range(-1, 7)), prefix=tokens[:9])
    assert_close("logits", actual, expected[9:], tolerance=TOLERANCE)
