"""Models in FP8 on a GPU, compared with the same codes and scales in float64."""

from __future__ import annotations

import dataclasses
import zlib

import pytest
import torch
from torch import Tensor

from stree_core.families import ModelShape, Weight
from stree_core.fp8 import Fp8Weights
from stree_core.models.backend import load_backend
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.models.weights import assemble
from stree_kernels.fp8.scaled_weight import Projection, random_scaled
from stree_kernels.testing import assert_close

pytestmark = pytest.mark.gpu
TREE = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 7, 9, 9)
TOLERANCE = 3e-2
"""As of models in bf16: the rounding of a few layers."""


def small_shape() -> ModelShape:
    """Return a Nemotron 3 of four layers, experts among them, wide enough for the kernels."""
    from stree_core.families.registry import shape_from_config

    config = {
        "model_type": "nemotron_h", "vocab_size": 96, "hidden_size": 256,
        "layer_norm_epsilon": 1e-5,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 512, "ssm_state_size": 64, "mamba_num_heads": 8,
        "mamba_head_dim": 64, "n_groups": 2, "conv_kernel": 4, "n_routed_experts": 4,
        "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 128,
        "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "norm_topk_prob": True, "eos_token_id": 0, "mlp_hidden_act": "relu2",
    }  # fmt: skip
    shape = shape_from_config(config, "small")
    scales = {key: f"{key}_scale" for w in shape.projections for key in w.keys}
    return dataclasses.replace(shape, fp8=Fp8Weights("fp8-block", scales, (64, 64)))


def make_model(shape: ModelShape, dtype: torch.dtype, backend: str) -> Model:
    device = torch.device("cuda")

    def random(weight: Weight) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(weight.keys[0].encode()))

    def draw(weight: Weight) -> Tensor:
        values = torch.randn(weight.shape, generator=random(weight), device=device)
        scaled = values * weight.shape[-1] ** -0.5 if values.ndim > 1 else 1 + 0.1 * values
        return scaled.bfloat16()

    def draw_projection(weight: Weight) -> Projection:
        scaled = random_scaled(
            weight.shape, torch.bfloat16, random(weight), row_group=64, column_block=64
        )
        wide = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(scaled, scales=scaled.scales.to(wide), dtype=dtype)

    weights = assemble(shape, draw, dtype, None, draw_projection)
    return Model(shape, weights, load_backend(backend, device))


@pytest.mark.parametrize("num_slots", [1, 3, 12])
@torch.inference_mode()
def test_logits_equal_the_reference(num_slots: int) -> None:
    """1, 3 and 12 slots: one row and a few, tiles of 39 rows, and more rows than tiles take."""
    shape = small_shape()
    models = (
        make_model(shape, torch.bfloat16, "triton"),
        make_model(shape, torch.float64, "torch"),
    )
    generator = torch.Generator("cuda").manual_seed(7)
    for parents in ((-1,), TREE):
        tokens = torch.randint(96, (len(parents), num_slots), generator=generator, device="cuda")
        logits = []
        for model in models:
            cache = model.make_cache(CacheSize(num_slots, 16, 4, 32))
            block = make_block(parents, model.conv_widths, model.device)
            hidden = model.forward(tokens, block, cache, first=0, commit=True)
            logits.append(model.logits(hidden))
        assert_close(f"{len(parents)} tokens", *logits, tolerance=TOLERANCE)
