"""Model folders in Hugging Face layout: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from stree_core.backend import Backend
from stree_core.errors import CheckpointError, ConfigError
from stree_core.families import shape_from_config
from stree_core.files import read_limited, sha256_of
from stree_core.model import (
    AttentionWeights,
    Mamba2Weights,
    MixerWeights,
    MlpWeights,
    Model,
    ModelWeights,
)
from stree_core.model_shape import AttentionShape, Block, Mamba2Shape, ModelShape
from stree_core.profile import ModelRef
from stree_kernels.rows import ScanHeads

MAX_JSON_BYTES = 64 << 20

Fetch = Callable[[str], Tensor]


def load_shape(folder: Path) -> ModelShape:
    """Read config.json of a model folder; raise CheckpointError when it cannot be used."""
    return shape_from_config(_read_json(folder / "config.json"), folder.name)


def model_ref(folder: Path) -> ModelRef:
    """Return the name and hashes that profiles, tables and traces keep of a model folder."""
    tokenizer = folder / "tokenizer.json"
    return ModelRef(
        name=folder.name,
        config_sha256=sha256_of(folder / "config.json"),
        tokenizer_sha256=sha256_of(tokenizer) if tokenizer.exists() else None,
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json; raise CheckpointError when it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{folder.name} needs a tokenizer.json, it has none; add it")
    try:
        return Tokenizer.from_str(read_limited(path, MAX_JSON_BYTES).decode())
    # The Rust library raises the bare class on malformed content.
    except Exception as err:
        raise CheckpointError(f"{path} is not a tokenizer ({err}); fetch it again") from err


def load_model(folder: Path, backend: Backend, dtype: torch.dtype, device: torch.device) -> Model:
    """Load a model's weights, one tensor at a time, as `dtype` on `device`.

    Raises CheckpointError on missing or truncated files, missing keys and wrong shapes.
    """
    shape = load_shape(folder)
    files = _weight_files(folder)
    expected = shape.parameter_shapes()

    def fetch(key: str) -> Tensor:
        if key not in files:
            raise CheckpointError(f"{folder.name} needs weight {key}, no file has it; fetch again")
        try:
            with safe_open(files[key], framework="pt", device=str(device)) as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{files[key]} cannot be read ({err}); fetch it again") from err
        if tuple(tensor.shape) != expected[key]:
            raise CheckpointError(
                f"{folder.name}: {key} must have shape {expected[key]} by config.json, "
                f"got {tuple(tensor.shape)}; use the config that belongs to the weights"
            )
        return tensor

    return build_model(shape, fetch, backend, dtype, device)


def random_model(
    shape: ModelShape, backend: Backend, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Model:
    """Build a model of `shape` with random weights, for timing: time does not depend on values."""
    generator = torch.Generator(device).manual_seed(seed)
    expected = shape.parameter_shapes()

    def fetch(key: str) -> Tensor:
        extents = expected[key]
        if key.endswith("norm.weight") or len(extents) == 1:
            return torch.ones(extents, device=device, dtype=dtype)
        values = torch.randn(extents, generator=generator, device=device, dtype=dtype)
        return values.mul_(extents[-1] ** -0.5)

    return build_model(shape, fetch, backend, dtype, device)


def build_model(
    shape: ModelShape, fetch: Fetch, backend: Backend, dtype: torch.dtype, device: torch.device
) -> Model:
    """Assemble a model from `fetch(key)`, which returns the parameter of a checkpoint key."""

    def get(key: str) -> Tensor:
        return fetch(key).to(device, dtype).contiguous()

    residual = torch.promote_types(dtype, torch.float32) if shape.residual_fp32 else dtype
    embed = get(shape.embed_key)
    mixers = tuple(
        _mixer_weights(block, fetch(block.norm_key).to(device), get, fetch)
        for block in shape.blocks
    )
    head = embed if shape.lm_head_key == shape.embed_key else get(shape.lm_head_key)
    final_norm = get(shape.final_norm_key).to(residual)
    return Model(shape, ModelWeights(embed, mixers, final_norm, head), backend)


def _mixer_weights(block: Block, norm: Tensor, get: Fetch, fetch: Fetch) -> MixerWeights:
    def named(name: str) -> Tensor:
        return get(block.prefix + name)

    if isinstance(block.mixer, Mamba2Shape):
        conv = named("conv1d.weight").squeeze(1)
        bias = named("conv1d.bias") if block.mixer.conv_bias else conv.new_zeros(conv.shape[0])
        # Kept in fp32 at least: they act in exponents.
        wide = torch.promote_types(conv.dtype, torch.float32)
        a_log, skip, dt_bias = (
            fetch(block.prefix + name).to(conv.device, wide) for name in ("A_log", "D", "dt_bias")
        )
        return Mamba2Weights(
            in_proj=_fold(named("in_proj.weight"), norm),
            conv_CW=conv,
            conv_bias_C=bias,
            heads=ScanHeads(-a_log.exp(), skip, dt_bias),
            out_proj=_fold(named("out_proj.weight"), fetch(block.prefix + "norm.weight")),
        )
    if isinstance(block.mixer, AttentionShape):
        qkv = torch.cat([named(f"{part}_proj.weight") for part in "qkv"])
        inv_freq = _inv_freq(block.mixer, qkv.dtype, qkv.device)
        return AttentionWeights(_fold(qkv, norm), named("o_proj.weight"), inv_freq)
    gate_up = torch.cat([named("gate_proj.weight"), named("up_proj.weight")])
    return MlpWeights(_fold(gate_up, norm), named("down_proj.weight"))


def _fold(weight_NK: Tensor, norm_K: Tensor) -> Tensor:
    """Return the weight of a projection that follows a norm, times the norm's own weight."""
    wide = torch.promote_types(weight_NK.dtype, torch.float32)
    return (weight_NK.to(wide) * norm_K.to(weight_NK.device, wide)).to(weight_NK.dtype)


def _inv_freq(a: AttentionShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of rotated dims, in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, a.rotary_dim, 2, dtype=wide, device=device) / a.rotary_dim
    return 1.0 / a.rope_theta**exponent


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} must hold a {path.name}, it has none; check the path")
    try:
        content = json.loads(read_limited(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError, ConfigError) as err:
        raise CheckpointError(f"{path} is not valid JSON ({err}); fetch it again") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; fetch it again")
    return content


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each weight."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index).get("weight_map", {})
        return {key: folder / Path(name).name for key, name in names.items()}
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{folder.name} needs model.safetensors, it has none; fetch it")
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{path} cannot be read ({err}); fetch it again") from err
