"""Load a model's weights from its folder, or draw them at random."""

from __future__ import annotations

import torch
from torch import Tensor

from stree_core.backend import Backend
from stree_core.memory import explain_oom, require_memory
from stree_core.model import Model
from stree_core.model_shape import ModelShape, Weight
from stree_core.model_source import ModelSource
from stree_core.model_weights import Read, assemble
from stree_core.weight_check import require_present, skipped_copies
from stree_core.weight_files import WeightFiles


def load_model(
    source: ModelSource,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    num_logits: int | None = None,
) -> Model:
    """Load a model's weights, one tensor at a time, as `dtype` on `device`.

    It scores the first `num_logits` tokens, all by default. Raises CheckpointError for files that
    cannot be used or hold weights that would not be, NotEnoughMemory when they do not fit.
    """
    if source.folder is None:
        return random_model(source.shape, backend, dtype, device, num_logits, source.name)
    files = WeightFiles(source.folder, source.name, device)
    require_present(source.shape, files.listed, source.name)
    for copy, original in skipped_copies(source.shape, files.stored, source.name).items():
        files.require_copy(copy, original)
    return _build(source.shape, files.read, backend, dtype, device, num_logits, source.name)


def random_model(
    shape: ModelShape,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    num_logits: int | None = None,
    name: str = "this shape",
) -> Model:
    """Build a model of `shape` with random weights, for timing: time does not depend on values.

    Raises NotEnoughMemory when the weights do not fit.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(weight: Weight) -> Tensor:
        if len(weight.shape) == 1:
            return torch.ones(weight.shape, device=device, dtype=dtype)
        values = torch.randn(weight.shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(weight.shape[-1] ** -0.5)

    return _build(shape, draw, backend, dtype, device, num_logits, name)


def _build(
    shape: ModelShape, read: Read, backend: Backend, dtype: torch.dtype, device: torch.device,
    num_logits: int | None, name: str,
) -> Model:  # fmt: skip
    num_bytes = shape.num_parameters * dtype.itemsize
    what = f"holding the weights of {name}"
    require_memory(num_bytes, what, device)
    with explain_oom(what, num_bytes, device):
        return Model(shape, assemble(shape, read, dtype, num_logits), backend)
