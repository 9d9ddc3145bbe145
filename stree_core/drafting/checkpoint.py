"""Load a model's weights from its folder, or draw them at random."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stree_core.drafting.mtp_draft import MtpDraft
from stree_core.errors import CheckpointError
from stree_core.families import PREFIX, ModelShape, Weight
from stree_core.fp8 import EXTRAS, row_group
from stree_core.memory import explain_oom, require_memory
from stree_core.models import (
    Backend,
    Model,
    ModelSource,
    Read,
    ReadParts,
    ReadProjection,
    ScaledFiles,
    WeightFiles,
    assemble,
    assemble_head,
    require_present,
    shape_keys,
    skipped_copies,
)
from stree_kernels.fp8.scaled_weight import Projection, random_scaled


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
    files = _files(source.folder, source.name, source.shape, device, dtype)
    require_present(source.shape, files.listed, source.name)
    for copy, original in skipped_copies(source.shape, files.stored, source.name).items():
        files.require_copy(copy, original)
    readers = _Readers(files.read, files.read_projection, files.read_parts)
    return _build(source.shape, readers, backend, dtype, device, num_logits, source.name)


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
    return _build(shape, _random(shape, dtype, device), backend, dtype, device, num_logits, name)


def load_head(source: ModelSource, target: Model, name: str) -> MtpDraft:
    """Load the MTP head that `source` describes; its model, `name` in errors, is `target`.

    Raises CheckpointError when the files hold another head or none, NotEnoughMemory when the
    weights do not fit.
    """
    shape, dtype = source.shape, target.dtype
    if source.folder is None:
        readers = _random(shape, dtype, target.device)
    else:
        files = _files(source.folder, name, shape, target.device, dtype)
        _require_whole_head(shape, files.stored, name)
        readers = _Readers(files.read, files.read_projection, files.read_parts)
    num_bytes = shape.held_bytes(dtype.itemsize)
    what = f"holding the MTP head of {name}"
    require_memory(num_bytes, what, target.device)
    with explain_oom(what, num_bytes, target.device):
        weights = assemble_head(
            shape, readers.read, target.weights, readers.projection, readers.parts
        )
        return MtpDraft(shape, weights, target)


def _require_whole_head(shape: ModelShape, keys: Collection[str], name: str) -> None:
    """Raise CheckpointError unless the weights under `mtp.` are those of the shape, all of them."""
    unread = EXTRAS if shape.fp8 is not None else ()
    held = {
        key
        for key in keys
        if key.startswith(PREFIX) and not any(fnmatchcase(key, pattern) for pattern in unread)
    }
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


class _Readers(NamedTuple):
    """What returns weights: as tensors, and those of projections as they are stored."""

    read: Read
    projection: ReadProjection
    parts: ReadParts


def _files(
    folder: Path, name: str, shape: ModelShape, device: torch.device, dtype: torch.dtype
) -> WeightFiles:
    if shape.fp8 is None:
        return WeightFiles(folder, name, device, shape.renames)
    return ScaledFiles(folder, name, device, shape.fp8, dtype, shape.renames)


def _random(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> _Readers:
    generator = torch.Generator(device).manual_seed(0)

    def draw(weight: Weight) -> Tensor:
        if len(weight.shape) == 1:
            return torch.full(weight.shape, 1 - weight.offset, device=device, dtype=dtype)
        values = torch.randn(weight.shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(weight.shape[-1] ** -0.5)

    def draw_projection(weight: Weight) -> Projection:
        fp8 = shape.fp8
        if fp8 is None or weight.adapters or not fp8.holds(weight.keys):
            return draw(weight)
        group, block = row_group(fp8, ()), fp8.column_block(weight.shape[-1])
        return random_scaled(weight.shape, dtype, generator, row_group=group, column_block=block)

    def draw_parts(weight: Weight) -> list[Projection] | None:
        pieces = () if shape.fp8 is None else weight.split(shape.fp8.scales)
        return [draw_projection(piece) for piece in pieces] if len(pieces) > 1 else None

    return _Readers(draw, draw_projection, draw_parts)


def _build(
    shape: ModelShape, readers: _Readers, backend: Backend, dtype: torch.dtype,
    device: torch.device, num_logits: int | None, name: str,
) -> Model:  # fmt: skip
    num_bytes = shape.held_bytes(dtype.itemsize)
    what = f"holding the weights of {name}"
    require_memory(num_bytes, what, device)
    with explain_oom(what, num_bytes, device):
        weights = assemble(
            shape, readers.read, dtype, num_logits, readers.projection, readers.parts
        )
        return Model(shape, weights, backend)
