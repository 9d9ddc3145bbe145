"""Native Mamba2 and Mamba-in-Llama folders with random weights, and what they should compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference_models import mamba_in_llama_logits, native_logits
from safetensors.torch import save_file
from torch import Tensor

from stree_core.drafting.checkpoint import load_model
from stree_core.models.backend import load_backend
from stree_core.models.model import Model
from stree_core.models.source import folder_source

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


def load(folder: Path) -> Model:
    return load_model(folder_source(folder), load_backend("torch", CPU), torch.float32, CPU)
