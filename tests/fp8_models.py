"""Checkpoints in FP8, made of a checkpoint in fp32 as quantisers make them.

The folder beside each holds the same numbers as fp64 tensors: codes times scales.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = (16, 16)
ENDING = {"fp8-block": "_scale_inv", "fp8-tensor": "_scale", "fp8-channel": "_scale"}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8-block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
    "fp8-tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "fp8-channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
                },
            }
        },
    },
}  # fmt: skip
_NAMES = (
    "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "input_linear", "output_linear", "in_proj_qkvz", "in_proj_qkv", "in_proj_z",
)  # fmt: skip


def is_projection(key: str, tensor: Tensor) -> bool:
    """Tell what a quantiser would take: matrices of projections, experts' stacks among them."""
    return tensor.ndim >= 2 and key.removesuffix(".weight").rpartition(".")[2] in _NAMES


def quantise(tensor: Tensor, kind: str, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Return codes, and scales as they are stored."""
    *lead, num_rows, num_columns = tensor.shape
    if kind == "fp8-tensor":
        block = (num_rows, num_columns)
    elif kind == "fp8-channel":
        block = (1, num_columns)
    rows, columns = torch.arange(num_rows) // block[0], torch.arange(num_columns) // block[1]
    scales = torch.zeros(*lead, int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            tile = tensor[..., rows == i, :][..., columns == j]
            scales[..., i, j] = tile.abs().amax((-2, -1)).clamp(min=1e-6) / 448
    spread = scales[..., rows, :][..., columns]
    codes = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales.view(tuple(lead)) if kind == "fp8-tensor" else scales


def save_fp8(
    source: Path, kind: str, *, scale_dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Path, Path]:
    """Write a folder in FP8 and one of what it means in fp64 beside `source`; return both."""
    tensors = _unpacked(load_file(source / "model.safetensors"))
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stored[key] = meant[key] = tensor
        if is_projection(key, tensor):
            codes, scales = quantise(tensor, kind)
            scales = scales.to(scale_dtype)
            stored[key], stored[key + ENDING[kind]] = codes, scales
            meant[key] = by_hand(codes, scales, kind)
    config = json.loads((source / "config.json").read_text())
    folders = (source.parent / f"{source.name}-{kind}", source.parent / f"{source.name}-meant")
    for folder, content, more in (
        (folders[0], stored, {"quantization_config": CONFIGS[kind] | changes}),
        (folders[1], meant, {}),
    ):
        folder.mkdir(exist_ok=True)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))
    return folders


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the experts of Qwen's models one by one, as FP8 files hold them."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stem, _, name = key.rpartition(".experts.")
        if name not in ("gate_up_proj", "down_proj"):
            found[key] = tensor
            continue
        for index, expert in enumerate(tensor):
            names = ("gate", "up") if name == "gate_up_proj" else ("down",)
            for part, rows in zip(names, expert.chunk(len(names)), strict=True):
                found[f"{stem}.experts.{index}.{part}_proj.weight"] = rows.contiguous()
    return found


def by_hand(codes: Tensor, scales: Tensor, kind: str, block: tuple[int, int] = BLOCK) -> Tensor:
    """Return codes times their scales, element (i, j) with scale [i // rows, j // columns]."""
    *lead, num_rows, num_columns = codes.shape
    if kind == "fp8-tensor":
        return codes.double() * scales.view(*lead, 1, 1)
    if kind == "fp8-channel":
        return codes.double() * scales.view(*lead, num_rows, 1)
    rows, columns = torch.arange(num_rows) // block[0], torch.arange(num_columns) // block[1]
    return codes.double() * scales[..., rows, :][..., columns]
