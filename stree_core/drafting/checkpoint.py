"""Load a model's weights from its folder, or draw them at random."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from stree_core.drafting.mtp_draft import MtpDraft
from stree_core.errors import CheckpointError
from stree_core.families import PREFIX, ModelShape, Weight
from stree_core.memory import explain_oom, require_memory
from stree_core.models import (
    Backend,
    Model,
    ModelSource,
    Read,
    WeightFiles,
    assemble,
    assemble_head,
    require_present,
    shape_keys,
    skipped_copies,
)


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
    files = WeightFiles(source.folder, source.name, device, source.shape.renames)
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
    """Build a model of `shape` with random weights, for timing.

    Of values, time depends on the choice of experts alone, which is about uniform for random rows.
    Raises NotEnoughMemory when the weights do not fit.
    """
    return _build(shape, _random(dtype, device), backend, dtype, device, num_logits, name)


def load_head(source: ModelSource, target: Model, name: str) -> MtpDraft:
    """Load the MTP head that `source` describes; its model, `name` in errors, is `target`.

    Raises CheckpointError when the files hold another head or none, NotEnoughMemory when the
    weights do not fit.
    """
    shape, dtype = source.shape, target.dtype
    if source.folder is None:
        read = _random(dtype, target.device)
    else:
        files = WeightFiles(source.folder, name, target.device, shape.renames)
        _require_whole_head(shape, files.stored, name)
        read = files.read
    num_bytes = shape.num_parameters * dtype.itemsize
    what = f"holding the MTP head of {name}"
    require_memory(num_bytes, what, target.device)
    with explain_oom(what, num_bytes, target.device):
        return MtpDraft(shape, assemble_head(shape, read, target.weights), target)


def _require_whole_head(shape: ModelShape, keys: Collection[str], name: str) -> None:
    """Raise CheckpointError unless the weights under `mtp.` are those of the shape, all of them."""
    held = {key for key in keys if key.startswith(PREFIX)}
    wanted = {key for key in shape_keys(shape, keys) if key.startswith(PREFIX)}
    if not held:
        raise CheckpointError(
            f"{name} names an MTP head in its config, but its files hold no weight under {PREFIX}; "
            "fetch a checkpoint that has them, or give a draft model"
        )
    for what, names in (("lack", wanted - held), ("also hold", held - wanted)):
        if names:
            raise CheckpointError(
                f"the MTP head of {name} must be as its config says, its files {what} "
                f"{len(names)} weights such as {min(names)}; use the config that belongs to them"
            )


def _random(dtype: torch.dtype, device: torch.device) -> Read:
    generator = torch.Generator(device).manual_seed(0)

    def draw(weight: Weight) -> Tensor:
        if len(weight.shape) == 1:
            return torch.full(weight.shape, 1 - weight.offset, device=device, dtype=dtype)
        values = torch.randn(weight.shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(weight.shape[-1] ** -0.5)

    return draw


def _build(
    shape: ModelShape, read: Read, backend: Backend, dtype: torch.dtype, device: torch.device,
    num_logits: int | None, name: str,
) -> Model:  # fmt: skip
    num_bytes = shape.num_parameters * dtype.itemsize
    what = f"holding the weights of {name}"
    require_memory(num_bytes, what, device)
    with explain_oom(what, num_bytes, device):
        return Model(shape, assemble(shape, read, dtype, num_logits), backend)
