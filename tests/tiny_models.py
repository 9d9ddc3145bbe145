"""Tiny random models in Hugging Face layout, made by transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from stree_core.drafting.checkpoint import load_model
from stree_core.models.backend import load_backend
from stree_core.models.model import Model
from stree_core.models.source import folder_source

VOCAB_SIZE = 96
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip

# Clamps more than a tenth of the time steps of every model here on either side.
TIME_STEP_LIMIT = (1.0, 1.6)
LIMITED = {"time_step_limit": list(TIME_STEP_LIMIT)}


def tiny_mamba2(num_groups: int = 1, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Mamba2Config(
        num_heads=4, head_dim=16, hidden_size=32, state_size=16, num_hidden_layers=layers,
        n_groups=num_groups, expand=2, chunk_size=8, tie_word_embeddings=True,
        **(_TOKENS | LIMITED),
    )  # fmt: skip
    return _rough(Mamba2ForCausalLM(config))


def tiny_bamba(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BambaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8,
        tie_word_embeddings=True, **(_TOKENS | LIMITED),
    )  # fmt: skip
    return _rough(BambaForCausalLM(config))


def tiny_granite(num_experts: int = 0, rope: bool = False, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GraniteMoeHybridConfig(
        hidden_size=32, intermediate_size=24, shared_intermediate_size=48, num_hidden_layers=4,
        layer_types=["mamba", "attention", "mamba", "attention"], num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=num_experts, num_experts_per_tok=2,
        mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=8,
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2,
        logits_scaling=5.0, position_embedding_type="rope" if rope else "nope",
        tie_word_embeddings=True, **(_TOKENS | LIMITED),
    )  # fmt: skip
    return _rough(GraniteMoeHybridForCausalLM(config))


def tiny_nemotron_h(
    kinds: tuple[str, ...] = ("mamba", "attention", "mlp", "mamba", "moe"), seed: int = 0,
    **settings: Any,
) -> PreTrainedModel:  # fmt: skip
    torch.manual_seed(seed)
    config = NemotronHConfig(
        hidden_size=32, layers_block_type=list(kinds), num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, ssm_state_size=16,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=8, n_routed_experts=8,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, num_experts_per_tok=3,
        n_group=4, topk_group=2, routed_scaling_factor=1.7,
        **(_TOKENS | LIMITED | settings),
    )  # fmt: skip
    return _with_run_time_limit(_rough(NemotronHForCausalLM(config)))


def tiny_falcon_h1(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = FalconH1Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=48, mamba_n_heads=3, mamba_d_head=16,
        mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, lm_head_multiplier=0.3,
        embedding_multiplier=2.0, mlp_multipliers=[0.8, 0.6], key_multiplier=0.7,
        attention_out_multiplier=0.9, attention_in_multiplier=1.2, ssm_in_multiplier=1.1,
        ssm_multipliers=[0.5, 0.7, 1.3, 0.9, 1.2], ssm_out_multiplier=0.6,
        **(_TOKENS | LIMITED | settings),
    )  # fmt: skip
    return _rough(FalconH1ForCausalLM(config))


def tiny_zamba2(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    kinds = ["mamba", "hybrid", "mamba", "hybrid", "hybrid"]
    config = Zamba2Config(
        hidden_size=48, num_hidden_layers=5, layers_block_type=kinds, mamba_d_state=16,
        n_mamba_heads=6, mamba_ngroups=2, chunk_size=8, intermediate_size=48,
        num_attention_heads=4, num_mem_blocks=2, adapter_rank=4,
        **(_TOKENS | LIMITED | {"initializer_range": 0.15} | settings),
    )  # fmt: skip
    return _with_run_time_limit(_rough(Zamba2ForCausalLM(config)))


_QWEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "full_attention_interval": 2,
} | _TOKENS  # fmt: skip
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip


def tiny_qwen3_next(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3NextConfig(**(_QWEN | _QWEN_EXPERTS | settings))
    return _long_memory(_rough(Qwen3NextForCausalLM(config)))


def tiny_qwen3_5(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(**(_QWEN | settings))
    return _long_memory(_rough(Qwen3_5ForCausalLM(config)))


def tiny_qwen3_5_moe(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3_5MoeTextConfig(**(_QWEN | _QWEN_EXPERTS | settings))
    return _long_memory(_rough(Qwen3_5MoeForCausalLM(config)))


def tiny_qwen3_5_with_vision(seed: int = 0) -> PreTrainedModel:
    """Return a vision model with tied embeddings; it takes text alone as the others do."""
    torch.manual_seed(seed)
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 32, "num_position_embeddings": 16,
    }  # fmt: skip
    tied = {"tie_word_embeddings": True}
    config = Qwen3_5Config(text_config=_QWEN | tied, vision_config=vision, **tied)
    return _long_memory(_rough(Qwen3_5ForConditionalGeneration(config)))


def _long_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with decays that leave something of a text's beginning."""
    with torch.no_grad():
        for mixer in mixers_of(model):
            mixer.A_log.copy_(torch.empty_like(mixer.A_log).uniform_(-4, -1))  # type: ignore
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba2": tiny_mamba2,
    "mamba2-grouped": lambda: tiny_mamba2(num_groups=2),
    "bamba": tiny_bamba,
    "granite-dense": tiny_granite,
    "granite-moe": lambda: tiny_granite(num_experts=6, rope=True),
    "nemotron-h": lambda: tiny_nemotron_h(("mamba", "attention", "mlp", "mamba")),
    "nemotron-3": tiny_nemotron_h,
    "nemotron-3-latent": lambda: tiny_nemotron_h(moe_latent_size=16, norm_topk_prob=False),
    "falcon-h1": tiny_falcon_h1,
    "falcon-h1-norm": lambda: tiny_falcon_h1(mamba_rms_norm=True, mamba_norm_before_gate=False),
    "zamba2": tiny_zamba2,
    "qwen3-next": tiny_qwen3_next,
    "qwen3.5-vision": tiny_qwen3_5_with_vision,
    "qwen3.5-moe": tiny_qwen3_5_moe,
    "zamba2-rope": lambda: tiny_zamba2(use_mem_rope=True, use_shared_attention_adapter=True),
}
"""One model for each path through a family."""


def mixers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the Mamba2 mixers of a transformers model."""
    return [module for module in model.modules() if hasattr(module, "dt_bias")]


def _with_run_time_limit(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the limit that its authors' code has.

    transformers 5.23 takes (time_step_min, inf) for Nemotron-H and Zamba2.
    """
    for mixer in mixers_of(model):
        mixer.time_step_limit = tuple(model.config.time_step_limit)  # type: ignore[assignment]
    return model


def _rough(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with noise on what is initialised alike, so that nothing is 0 or 1."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *_corrections(model)):
            if tensor.numel() > 1 and tensor.std() < 1e-6:
                tensor += 0.2 * torch.randn_like(tensor)
        for mixer in mixers_of(model):
            # Some families draw such small time steps that their states hardly matter.
            mixer.dt_bias.copy_(1 + 0.2 * torch.randn_like(mixer.dt_bias))  # type: ignore[operator]
    return model.eval()


def _corrections(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the routers' corrections, which are buffers."""
    return [value for name, value in model.named_buffers() if name.endswith("correction_bias")]


def ours(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float64) -> Model:
    """Save a transformers model and load it with our loader on the CPU."""
    model.save_pretrained(folder)
    device = torch.device("cpu")
    return load_model(folder_source(folder), load_backend("torch", device), dtype, device)


def perturbed(model: PreTrainedModel, scale: float, seed: int = 1) -> PreTrainedModel:
    """Return the model with noise on its weights: a draft that often agrees with the original."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn_like(parameter)
    return model


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer of the words w0, w1, ..."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w1"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def save_pair(root: Path, noise: float = 0.07) -> None:
    """Write the folders models/tiny-target and models/tiny-draft, with one tokenizer."""
    models = {"tiny-target": tiny_bamba(), "tiny-draft": perturbed(tiny_bamba(), noise)}
    for name, model in models.items():
        folder = root / "models" / name
        model.save_pretrained(folder)
        word_tokenizer().save(str(folder / "tokenizer.json"))


def random_texts(count: int, seed: int = 7) -> list[str]:
    """Return prompts of 1 to 20 known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist())
        for n in lengths
    ]
