"""Native Mamba2 and Mamba-in-Llama folders against an independent reference in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chain_prefill import read_prompt
from native_models import (
    LLAMA,
    MAMBA,
    NATIVE,
    load,
    native_weights,
    save_mamba_in_llama,
    save_native,
    save_shards,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

TOLERANCE = 1e-5
NUM_TOKENS = 64

FORMATS = {"native mamba2": save_native, "mamba-in-llama": save_mamba_in_llama}


@dataclass
class Saved:
    model: Model
    draft: Model
    logits: Callable[[Tensor], Tensor]


@pytest.fixture(params=FORMATS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    logits = FORMATS[request.param](tmp_path / "target", seed=0)
    FORMATS[request.param](tmp_path / "draft", seed=1)
    return Saved(load(tmp_path / "target"), load(tmp_path / "draft"), logits)


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def block_logits(model: Model, tokens: Tensor, parents: list[int], prefix: Tensor) -> Tensor:
    cache = model.make_cache(CacheSize(1, len(parents), 1, 128))
    if len(prefix):
        read_prompt(model, prefix.tolist(), cache)
    block = make_block(parents, model.conv_widths, model.device)
    hidden = model.forward(tokens[:, None], block, cache, first=0, commit=True)
    return model.logits(hidden)[:, 0]


def test_chain_and_tree_logits_equal_the_reference(saved: Saved) -> None:
    prefix, tokens = random_tokens(70, seed=2), random_tokens(13, seed=3)
    expected = saved.logits(torch.cat((prefix, tokens)))[70:]
    chain = block_logits(saved.model, tokens, list(range(-1, 12)), prefix)
    assert_close("chain", chain, expected, tolerance=TOLERANCE)
    tree = block_logits(saved.model, tokens, list(DEFAULT_TREE.parents), prefix)
    for path in DEFAULT_TREE.node_paths:
        alone = saved.logits(torch.cat((prefix, tokens[list(path)])))[-1]
        assert_close(f"path {path}", tree[path[-1]], alone, tolerance=TOLERANCE)


@pytest.mark.parametrize("tree", [Tree.chain(0), Tree.chain(3), DEFAULT_TREE], ids=str)
def test_greedy_text_is_the_reference_choice_at_every_position(saved: Saved, tree: Tree) -> None:
    prompt = random_tokens(9, seed=4).tolist()
    engine = Engine(saved.model, saved.draft, tree, EngineConfig(num_positions=128))
    text = generate(engine, [prompt], StopRule(NUM_TOKENS)).generations[0].tokens
    assert len(text) == NUM_TOKENS
    choices = saved.logits(torch.tensor(prompt + text))[len(prompt) - 1 : -1].argmax(-1)
    assert text == choices.tolist()


def test_mamba_in_llama_with_attention_alone_is_llama(tmp_path: Path) -> None:
    """The attention layers, rotary stretching included, against transformers' own Llama."""
    torch.manual_seed(0)
    rope = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    kept = {k: v for k, v in LLAMA.items() if k not in ("model_type", "rope_scaling", "rope_theta")}
    theirs = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, initializer_range=0.3, **kept))
    theirs.eval().save_pretrained(tmp_path)
    everywhere = MAMBA | {"attn_layers": [0, 1, 2, 3]}
    (tmp_path / "mamba_config.json").write_text(json.dumps(everywhere))
    tokens = random_tokens(80, seed=5)
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0, 60:]
    actual = block_logits(load(tmp_path), tokens[60:], list(range(-1, 19)), tokens[:60])
    assert_close("logits", actual, expected, tolerance=1e-4)


def test_end_tokens_come_from_the_generation_config_where_there_is_one(tmp_path: Path) -> None:
    save_mamba_in_llama(tmp_path / "model", seed=0)
    assert load(tmp_path / "model").shape.eos_token_ids == (3, 5)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(tmp_path / "model").shape.eos_token_ids == (7,)


def test_sharded_bin_files_hold_the_same_model(tmp_path: Path) -> None:
    save_native(tmp_path / "whole", seed=0)
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NATIVE))
    save_shards(native_weights(0), folder, "pytorch_model", "bin")
    tokens = random_tokens(5, seed=6)
    one, other = (
        block_logits(load(tmp_path / name), tokens, list(range(-1, 4)), tokens[:0])
        for name in ("whole", "shards")
    )
    assert torch.equal(one, other)
