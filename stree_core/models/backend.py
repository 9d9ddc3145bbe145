"""The kernels a model runs on, chosen by name once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stree_core.errors import BackendUnavailable, nearest
from stree_kernels.linear.deferred_norm import DeferredNorm

_OPS = {
    "tree_scan": "ssm.tree_scan",
    "prompt_conv": "ssm.prompt_conv",
    "prompt_scan": "ssm.prompt_scan",
    "prompt_kv_write": "attention.prompt_attention",
    "prompt_attention": "attention.prompt_attention",
    "delta_conv": "delta.delta_conv",
    "delta_scan": "delta.delta_scan",
    "delta_chunk_scan": "delta.delta_chunk_scan",
    "project_and_convolve": "fp8.in_projection",
    "linear": "fp8.projection",
    "linear_activated": "fp8.projection",
    "linear_add": "fp8.projection",
    "start_residual": "linear.residual",
    "join_rows": "linear.residual",
    "add_residual": "linear.residual",
    "scale_rows": "linear.residual",
    "route": "routing.router",
    "expert_mlps": "fp8.experts",
    "rope_kv_write": "attention.rope_kv_write",
    "tree_attention": "attention.tree_attention",
    "gate_output": "attention.output_gate",
    "workspace_size": "attention.tree_attention",
    "fill_uniforms": "sampling.uniforms",
    "place_top_tokens": "sampling.top_tokens",
    "place_drawn_tokens": "sampling.children",
    "sample_tokens": "sampling.children",
    "try_children": "sampling.children",
    "commit_path": "sampling.commit_path",
}
"""The module of stree_kernels that holds each op; its reference is in a module ending in _ref."""

_SUFFIXES = {"torch": "_ref", "triton": ""}


@dataclass(frozen=True, slots=True)
class Backend:
    """The ops of passes and steps; signatures as in stree_kernels."""

    name: str
    tree_scan: Callable[..., None]
    prompt_conv: Callable[..., None]
    prompt_scan: Callable[..., None]
    prompt_kv_write: Callable[..., None]
    prompt_attention: Callable[..., None]
    delta_conv: Callable[..., None]
    delta_scan: Callable[..., None]
    delta_chunk_scan: Callable[..., None]
    project_and_convolve: Callable[..., None]
    linear: Callable[..., None]
    linear_activated: Callable[..., None]
    linear_add: Callable[..., DeferredNorm]
    start_residual: Callable[..., None]
    join_rows: Callable[..., None]
    add_residual: Callable[..., None]
    scale_rows: Callable[..., None]
    route: Callable[..., tuple[Tensor, Tensor]]
    expert_mlps: Callable[..., None]
    rope_kv_write: Callable[..., None]
    tree_attention: Callable[..., None]
    gate_output: Callable[..., None]
    workspace_size: Callable[..., int]
    fill_uniforms: Callable[..., None]
    place_top_tokens: Callable[..., None]
    place_drawn_tokens: Callable[..., None]
    sample_tokens: Callable[..., None]
    try_children: Callable[..., None]
    commit_path: Callable[..., None]


def load_backend(name: str, device: torch.device) -> Backend:
    """Return the backend `name` ("torch" or "triton") for models on `device`.

    Raises BackendUnavailable when the name is unknown, or the kernels cannot run on the device.
    """
    if name not in _SUFFIXES:
        raise BackendUnavailable(f"backend must be known, got {name!r}; {nearest(name, _SUFFIXES)}")
    if name == "triton" and device.type != "cuda":
        raise BackendUnavailable(
            f"backend triton needs a CUDA device, got {device.type}; use --backend torch"
        )
    try:
        ops = {
            op: getattr(importlib.import_module(f"stree_kernels.{module}{_SUFFIXES[name]}"), op)
            for op, module in _OPS.items()
        }
    except ImportError as err:
        raise BackendUnavailable(
            f"backend {name} cannot be imported ({err}); install it or use --backend torch"
        ) from err
    return Backend(name, **ops)


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device; raise BackendUnavailable when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda is not on this machine; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise BackendUnavailable(f"device must be auto, cpu or cuda, got {name!r}; use one of them")
    return torch.device(name)


def resolve_backend(name: str, device: torch.device) -> str:
    """Turn "auto" into the backend for `device`: triton on CUDA, torch elsewhere."""
    if name != "auto":
        return name
    return "triton" if device.type == "cuda" else "torch"


DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto" or a name into a dtype: bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise BackendUnavailable(f"dtype must be known, got {name!r}; {nearest(name, DTYPES)}")
    return DTYPES[name]
