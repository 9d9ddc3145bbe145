"""A Llama pair for a server's tests: random weights, and a draft that agrees in part.

The draft is the target's first layers with noise on its head. The layers that the draft lacks add
little to the stream, so both models mostly prefer the same token; the head is scaled so that the
target samples its favourite in about seven of ten cases. At temperature 1 a draft token is then
accepted at about that rate, whatever came before, and no text falls into a loop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320
HIDDEN = 512
MLP = 1408
HEADS = 8
TARGET_LAYERS = 24
DRAFT_LAYERS = 2
MAX_POSITIONS = 2048


def make_pair(
    folder: Path, *, head_scale: float = 5.0, noise: float = 0.2, layers: int = TARGET_LAYERS
) -> None:
    """Write `target` and `draft`, each a folder that a server loads."""
    generator = torch.Generator().manual_seed(0)
    weights = _weights(layers, head_scale, generator)
    _write(folder / "target", weights, layers)
    draft = {name: value for name, value in weights.items() if _layer(name) < DRAFT_LAYERS}
    head = draft["lm_head.weight"]
    drawn = torch.randn(head.shape, generator=generator) * head.std()
    draft["lm_head.weight"] = (head + noise * drawn).contiguous()
    _write(folder / "draft", draft, DRAFT_LAYERS)


def _weights(layers: int, head_scale: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def drawn(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN, head_scale),
    }
    for layer in range(layers):
        # what the draft has not is small beside what it has
        out = 1.0 if layer < DRAFT_LAYERS else 0.05
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = drawn(HIDDEN, HIDDEN, 1.0)
        weights[f"{prefix}self_attn.o_proj.weight"] = drawn(HIDDEN, HIDDEN, out)
        weights[f"{prefix}mlp.gate_proj.weight"] = drawn(MLP, HIDDEN, 1.0)
        weights[f"{prefix}mlp.up_proj.weight"] = drawn(MLP, HIDDEN, 1.0)
        weights[f"{prefix}mlp.down_proj.weight"] = drawn(HIDDEN, MLP, out)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    return weights


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


def _write(folder: Path, weights: dict[str, torch.Tensor], layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, filled up with names so that every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *(f"<extra_{index}>" for index in range(VOCABULARY - 258))]
    vocabulary = {name: index for index, name in enumerate(alphabet + names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": MAX_POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make_pair(parser.parse_args().folder)
