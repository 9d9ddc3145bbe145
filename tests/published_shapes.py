"""Sizes of published models as their config.json gives them, and what their makers count.

Where a published file could not be read, sizes come from the makers' other code: Bamba from IBM's
foundation-model-stack, the smaller Nemotron-H from Megatron-Bridge, Falcon-H1's small ones and
Zamba2 from transformers' documentation and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A model: its config, its parameters in billions, the rank of adapters where it has some."""

    config: Config
    billions: float
    adapter_rank: int = 0


@dataclass(frozen=True)
class Nemotron:
    """Sizes of one Nemotron-H or Nemotron 3."""

    pattern: str
    width: int
    mamba_heads: int
    mlp: int
    heads: tuple[int, int]
    mamba_head_dim: int = 64
    state: int = 128
    more: Config = field(default_factory=dict)

    def config(self) -> Config:
        return {
            "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": self.width,
            "num_hidden_layers": len(self.pattern), "hybrid_override_pattern": self.pattern,
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "head_dim": 128, "mamba_num_heads": self.mamba_heads,
            "mamba_head_dim": self.mamba_head_dim, "n_groups": 8, "ssm_state_size": self.state,
            "conv_kernel": 4, "use_conv_bias": True, "intermediate_size": self.mlp,
            "layer_norm_epsilon": 1e-5, "time_step_min": 0.001, "time_step_max": 0.1,
            "tie_word_embeddings": False, "eos_token_id": 2,
        } | self.more  # fmt: skip


@dataclass(frozen=True)
class Granite:
    """Sizes of one Granite 4 H."""

    width: int
    mamba_heads: int
    heads: tuple[int, int]
    shared: int
    experts: tuple[int, int] = (0, 0)
    expert_width: int = 1

    def config(self) -> Config:
        kinds = ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)]
        return {
            "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": self.width,
            "num_hidden_layers": 40, "layer_types": kinds, "position_embedding_type": "nope",
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "mamba_n_heads": self.mamba_heads, "mamba_d_head": 64, "mamba_d_state": 128,
            "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "rms_norm_eps": 1e-5,
            "intermediate_size": self.expert_width, "shared_intermediate_size": self.shared,
            "num_local_experts": self.experts[0], "num_experts_per_tok": self.experts[1],
            "tie_word_embeddings": True, "eos_token_id": 100257,
        }  # fmt: skip


@dataclass(frozen=True)
class FalconH1:
    """Sizes of one Falcon-H1."""

    vocabulary: int
    width: int
    layers: int
    mlp: int
    heads: tuple[int, int, int]
    mamba: tuple[int, int]
    state: int = 256
    groups: int = 1
    mixer_norm: bool = False

    def config(self) -> Config:
        return {
            "model_type": "falcon_h1", "vocab_size": self.vocabulary, "hidden_size": self.width,
            "num_hidden_layers": self.layers, "intermediate_size": self.mlp,
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "head_dim": self.heads[2], "mamba_d_ssm": self.mamba[0] * self.mamba[1],
            "mamba_n_heads": self.mamba[0], "mamba_d_head": self.mamba[1],
            "mamba_d_state": self.state, "mamba_n_groups": self.groups, "mamba_d_conv": 4,
            "mamba_expand": 2, "mamba_rms_norm": self.mixer_norm, "mamba_norm_before_gate": False,
            "rms_norm_eps": 1e-5, "rope_theta": 1e11, "tie_word_embeddings": False,
            "eos_token_id": 11,
        }  # fmt: skip


@dataclass(frozen=True)
class Zamba2:
    """Sizes of one Zamba2; `hybrids` are the layers with a shared transformer layer."""

    width: int
    layers: int
    hybrids: tuple[int, ...]
    mamba_heads: int
    groups: int
    rope: bool

    def config(self) -> Config:
        kinds = ["hybrid" if i in self.hybrids else "mamba" for i in range(self.layers)]
        return {
            "model_type": "zamba2", "vocab_size": 32000, "hidden_size": self.width,
            "num_hidden_layers": self.layers, "layers_block_type": kinds, "num_mem_blocks": 2,
            "num_attention_heads": 32, "num_key_value_heads": 32, "n_mamba_heads": self.mamba_heads,
            "mamba_ngroups": self.groups, "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2,
            "intermediate_size": 4 * self.width, "adapter_rank": 128, "use_mem_rope": self.rope,
            "hidden_act": "gelu", "rms_norm_eps": 1e-5, "rope_theta": 10000,
            "tie_word_embeddings": True, "eos_token_id": 2,
        }  # fmt: skip


@dataclass(frozen=True)
class Qwen:
    """Sizes of one Qwen3-Next or Qwen3.5; `experts` are how many, how many chosen, their width."""

    width: int
    layers: int
    heads: tuple[int, int]
    value_heads: int
    mlp: int = 1
    experts: tuple[int, int, int] | None = None
    tied: bool = False
    next_generation: bool = False

    def config(self) -> Config:
        config: Config = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "head_dim": 256,
            "full_attention_interval": 4, "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1], "linear_num_key_heads": 16,
            "linear_num_value_heads": self.value_heads, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": self.tied, "mlp_only_layers": [],
            "eos_token_id": 248044, "intermediate_size": self.mlp,
        }  # fmt: skip
        if self.experts is not None:
            count, chosen, width = self.experts
            config |= {
                "num_experts": count, "num_experts_per_tok": chosen,
                "moe_intermediate_size": width, "shared_expert_intermediate_size": width,
            }  # fmt: skip
        if self.next_generation:
            return config | {
                "model_type": "qwen3_next", "vocab_size": 151936, "rope_theta": 1e7,
                "partial_rotary_factor": 0.25, "rope_scaling": None, "norm_topk_prob": True,
                "decoder_sparse_step": 1, "use_sliding_window": False,
            }  # fmt: skip
        kind = "qwen3_5" if self.experts is None else "qwen3_5_moe"
        rope = {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
            "mrope_interleaved": True, "mrope_section": [11, 11, 10],
        }  # fmt: skip
        text = config | {
            "model_type": kind + "_text", "vocab_size": 248320, "attn_output_gate": True,
            "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
            "rope_parameters": rope, "mamba_ssm_dtype": "float32",
        }  # fmt: skip
        return {"model_type": kind, "text_config": text, "vision_config": {"depth": 27}}


BAMBA = {
    "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27], "num_attention_heads": 32,
    "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1,
    "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "eos_token_id": 128001,
}  # fmt: skip
CODESTRAL_MAMBA = {
    "model_type": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64,
    "num_heads": 128, "head_dim": 64, "n_groups": 8, "state_size": 128, "conv_kernel": 4,
    "expand": 2, "use_bias": False, "use_conv_bias": True, "norm_before_gate": True,
    "residual_in_fp32": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    "eos_token_id": 0,
}  # fmt: skip

FEW_ATTENTIONS = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + 5 * "M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_30B = 5 * "MEMEM*E" + "MEMEMEM*E" + "MEMEMEME"
SUPER_120B = 3 * "MEMEMEM*E" + 4 * "MEMEMEMEM*E" + "MEMEMEM*E" + "MEMEMEME"


def _experts(count: int, chosen: int, width: int, shared: int, latent: int | None = None) -> Config:
    return {
        "n_routed_experts": count, "num_experts_per_tok": chosen, "n_shared_experts": 1,
        "moe_intermediate_size": width, "moe_shared_expert_intermediate_size": shared,
        "moe_latent_size": latent, "routed_scaling_factor": 2.5,
    }  # fmt: skip


def _listed(config: Config) -> Config:
    """Return a config whose layers are named in a list instead of a pattern."""
    names = {"M": "mamba", "E": "moe", "*": "attention"}
    kinds = [names[letter] for letter in config["hybrid_override_pattern"]]
    return config | {"hybrid_override_pattern": None, "layers_block_type": kinds}


_NANO_30B = Nemotron(NANO_30B, 2688, 64, 1856, (32, 2), more=_experts(128, 6, 1856, 3712)).config()
_ZAMBA2_7B = Zamba2(3584, 81, (6, 11, *range(17, 78, 6)), 112, 2, rope=True)
_ZAMBA2_3B = Zamba2(2560, 54, (*range(6, 43, 6), 47, 51), 80, 1, rope=False)

PUBLISHED: dict[str, Published] = {
    "nemotron-3-nano-30b-a3b": Published(_NANO_30B, 31.58),
    "nemotron-3.5-lightning-30b-a3b": Published(_listed(_NANO_30B), 31.58),
    "nemotron-3-super-120b-a12b": Published(
        Nemotron(
            SUPER_120B, 4096, 128, 2688, (32, 2), more=_experts(512, 22, 2688, 5376, latent=1024)
        ).config(),
        120.67,
    ),
    "nemotron-nano-9b-v2": Published(
        Nemotron(NANO_9B, 4480, 128, 15680, (40, 8), mamba_head_dim=80).config(), 8.89
    ),
    "nemotron-nano-12b-v2": Published(
        Nemotron(6 * "M-M-M-M*-" + 4 * "M-", 5120, 128, 20480, (40, 8), mamba_head_dim=80).config(),
        12.31,
    ),
    "nemotron-h-4b": Published(Nemotron(FEW_ATTENTIONS, 3072, 112, 12288, (32, 8)).config(), 4.49),
    "nemotron-h-8b": Published(Nemotron(FEW_ATTENTIONS, 4096, 128, 21504, (32, 8)).config(), 8.10),
    "nemotron-h-56b": Published(
        Nemotron(
            "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + 5 * "M-", 8192, 256, 32768, (64, 8), state=256
        ).config(),
        56.32,
    ),
    "granite-4.0-h-small": Published(
        Granite(4096, 128, (32, 8), 1536, experts=(72, 10), expert_width=768).config(), 32.21
    ),
    "granite-4.0-h-tiny": Published(
        Granite(1536, 48, (12, 4), 1024, experts=(64, 6), expert_width=512).config(), 6.94
    ),
    "granite-4.0-h-micro": Published(Granite(2048, 64, (32, 8), 8192).config(), 3.19),
    "granite-4.0-h-1b": Published(Granite(1536, 48, (12, 4), 4096).config(), 1.46),
    "falcon-h1-0.5b": Published(
        FalconH1(32784, 1024, 36, 2048, (8, 2, 64), (24, 64), state=128).config(), 0.52
    ),
    "falcon-h1-1.5b": Published(
        FalconH1(65537, 2048, 24, 4608, (8, 2, 128), (48, 64)).config(), 1.55
    ),
    "falcon-h1-1.5b-deep": Published(
        FalconH1(65536, 1280, 66, 3072, (6, 2, 128), (24, 64)).config(), 1.55
    ),
    "falcon-h1-7b": Published(
        FalconH1(130049, 3072, 44, 12288, (12, 2, 128), (24, 128), mixer_norm=True).config(), 7.59
    ),
    "falcon-h1-34b": Published(
        FalconH1(
            261120, 5120, 72, 21504, (20, 4, 128), (32, 128), groups=2, mixer_norm=True
        ).config(),
        33.64,
    ),
    "bamba-9b-v1": Published(BAMBA, 9.78),
    "bamba-9b-v2": Published(BAMBA, 9.78),
    "zamba2-2.7b": Published(_ZAMBA2_3B.config(), 2.66, adapter_rank=128),
    "zamba2-7b": Published(_ZAMBA2_7B.config(), 7.36, adapter_rank=128),
    "codestral-mamba-7b": Published(CODESTRAL_MAMBA, 7.29),
    "qwen3-next-80b-a3b": Published(
        Qwen(2048, 48, (16, 2), 32, experts=(512, 10, 512), next_generation=True).config(), 79.67
    ),
    "qwen3.5-0.8b": Published(Qwen(1024, 24, (8, 2), 16, 3584, tied=True).config(), 0.75),
    "qwen3.5-2b": Published(Qwen(2048, 24, (8, 2), 16, 6144, tied=True).config(), 1.88),
    "qwen3.5-4b": Published(Qwen(2560, 32, (16, 4), 32, 9216, tied=True).config(), 4.21),
    "qwen3.5-9b": Published(Qwen(4096, 32, (16, 4), 32, 12288).config(), 8.95),
    "qwen3.5-27b": Published(Qwen(5120, 64, (24, 4), 48, 17408).config(), 26.90),
    "qwen3.5-35b-a3b": Published(
        Qwen(2048, 40, (16, 2), 32, experts=(256, 8, 512)).config(), 34.66
    ),
    "qwen3.5-122b-a10b": Published(
        Qwen(3072, 48, (32, 2), 64, experts=(256, 8, 1024)).config(), 122.11
    ),
}

OTHER_DELTA: dict[str, Config] = {
    "kimi-linear-48b-a3b": {"model_type": "kimi_linear"},
    "olmo-hybrid-7b": {"model_type": "olmo_hybrid"},
}
"""Published models with a delta rule of another kind."""
