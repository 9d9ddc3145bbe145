"""Tiny random models in Hugging Face layout, made by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
)

from stree_core.backend import load_backend
from stree_core.checkpoint import load_model
from stree_core.model import Model

VOCAB_SIZE = 96


def tiny_mamba2(num_groups: int = 1, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Mamba2Config(
        num_heads=4, head_dim=16, hidden_size=32, state_size=16, num_hidden_layers=layers,
        vocab_size=VOCAB_SIZE, n_groups=num_groups, expand=2, chunk_size=8, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def tiny_bamba(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1, 3], mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    return BambaForCausalLM(config).eval()


def ours(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float64) -> Model:
    """Save a transformers model and load it with our loader on the CPU."""
    model.save_pretrained(folder)
    device = torch.device("cpu")
    return load_model(folder, load_backend("torch", device), dtype, device)


def perturbed(model: PreTrainedModel, scale: float, seed: int = 1) -> PreTrainedModel:
    """Return the model with noise on its weights: a draft that often agrees with the original."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn_like(parameter)
    return model


def save_pair(root: Path, noise: float = 0.07) -> None:
    """Write the folders models/tiny-target and models/tiny-draft, with one tokenizer."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w1"))
    tokenizer.pre_tokenizer = Whitespace()
    models = {"tiny-target": tiny_bamba(), "tiny-draft": perturbed(tiny_bamba(), noise)}
    for name, model in models.items():
        folder = root / "models" / name
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))


def random_texts(count: int, seed: int = 7) -> list[str]:
    """Return prompts of 1 to 20 known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist())
        for n in lengths
    ]
