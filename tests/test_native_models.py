"""Native Mamba2 and Mamba-in-Llama folders against an independent reference in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import mamba_in_llama_logits, native_logits
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stree_core.backend import load_backend
from stree_core.cache import CacheSize
from stree_core.checkpoint import load_model
from stree_core.decode import generate
from stree_core.engine import Engine, EngineConfig
from stree_core.model import Model
from stree_core.model_source import folder_source
from stree_core.prefill import Prefill
from stree_core.row_block import make_block
from stree_core.stop import StopRule
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.testing import assert_close

TOLERANCE = 1e-5
NUM_TOKENS = 64
CPU = torch.device("cpu")

NATIVE: dict[str, Any] = {
    "d_model": 32, "d_intermediate": 0, "n_layer": 3, "vocab_size": 90,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "expand": 2,
                "dt_limit": [1.0, 1.6]},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "vocab_size": 96, "rope_theta": 10000.0, "eos_token_id": [3, 5],
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
# Four heads over two of x and B, as Llama's grouped queries leave them.
MAMBA: dict[str, Any] = {
    "d_model": 32, "rms_norm_eps": 1e-5,
    "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 16, "dt_limit": [1.0, 1.6]},
    "d_inner": 64, "d_xb": 32, "intermediate_size": 48, "hidden_act": "silu", "n_layer": 4,
    "attn_layers": [1, 3],
}  # fmt: skip


def draw(sizes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return random weights in fp32; vectors lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    values = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
    return {k: 0.3 * v if v.ndim > 1 else 1 + 0.3 * v for k, v in values.items()}


def mixer_sizes(
    width: int, inner: int, channels: int, heads: int, prefix: str
) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}in_proj.weight": (inner + channels + heads, width),
        f"{prefix}conv1d.weight": (channels, 1, 4), f"{prefix}conv1d.bias": (channels,),
        f"{prefix}dt_bias": (heads,), f"{prefix}A_log": (heads,), f"{prefix}D": (heads,),
        f"{prefix}norm.weight": (inner,), f"{prefix}out_proj.weight": (width, inner),
    }  # fmt: skip


def native_weights(seed: int) -> dict[str, Tensor]:
    # 90 tokens, padded to a multiple of 16.
    sizes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (96, 32)}
    for index in range(NATIVE["n_layer"]):
        layer = f"backbone.layers.{index}."
        sizes |= {layer + "norm.weight": (32,)} | mixer_sizes(32, 64, 96, 4, layer + "mixer.")
    weights = draw(sizes | {"backbone.norm_f.weight": (32,)}, seed)
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def llama_weights(seed: int, attn_layers: list[int]) -> dict[str, Tensor]:
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, 32)}
    for index in range(LLAMA["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        sizes |= {
            layer + "input_layernorm.weight": (32,),
            layer + "post_attention_layernorm.weight": (32,),
            layer + "mlp.gate_proj.weight": (48, 32), layer + "mlp.up_proj.weight": (48, 32),
            layer + "mlp.down_proj.weight": (32, 48),
        }  # fmt: skip
        if index in attn_layers:
            own = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 64)}
            sizes |= {f"{layer}self_attn.{name}.weight": size for name, size in own.items()}
        else:
            sizes |= mixer_sizes(32, 64, 32 + 32 + 64, 4, layer + "mamba.")
    return draw(sizes | {"model.norm.weight": (32,)}, seed)


def save_shards(weights: dict[str, Tensor], folder: Path, stem: str, suffix: str) -> None:
    """Write two shards and their index."""
    keys = sorted(weights)
    weight_map = {}
    for number, some in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        shard = {key: weights[key] for key in some}
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name)
        weight_map |= dict.fromkeys(some, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save_native(folder: Path, seed: int) -> Callable[[Tensor], Tensor]:
    """Write a native folder; return its reference logits."""
    folder.mkdir()
    weights = native_weights(seed)
    (folder / "config.json").write_text(json.dumps(NATIVE))
    torch.save(weights, folder / "pytorch_model.bin")
    wide = {key: value.double() for key, value in weights.items()}
    return lambda tokens: native_logits(wide, NATIVE, tokens)


def save_mamba_in_llama(folder: Path, seed: int) -> Callable[[Tensor], Tensor]:
    """Write a Mamba-in-Llama folder in shards; return its reference logits."""
    folder.mkdir()
    weights = llama_weights(seed, MAMBA["attn_layers"])
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "mamba_config.json").write_text(json.dumps(MAMBA))
    save_shards(weights, folder, "model", "safetensors")
    wide = {key: value.double() for key, value in weights.items()}
    return lambda tokens: mamba_in_llama_logits(wide, LLAMA, MAMBA, tokens)


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


def load(folder: Path) -> Model:
    return load_model(folder_source(folder), load_backend("torch", CPU), torch.float32, CPU)


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def block_logits(model: Model, tokens: Tensor, parents: list[int], prefix: Tensor) -> Tensor:
    prefill = Prefill(model, 128, use_graph=False)
    prefill.consume(prefix.tolist())
    cache = model.make_cache(CacheSize(1, len(parents), 1, 128))
    cache.adopt(0, prefill.cache)
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
