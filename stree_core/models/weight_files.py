"""The weight files of a model folder: safetensors or torch's .bin, whole or in shards.

Tensors are read one at a time, so that loading holds little more than one copy of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stree_core.errors import CheckpointError
from stree_core.families import Weight
from stree_core.models.weight_index import (
    check_archive,
    damaged,
    find_weights,
    nearest_key,
    read_header,
    renamed,
    require_file,
    require_names,
)
from stree_kernels.fp8.scaled_weight import Projection

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What safetensors says of files whose tensors other frameworks lay out in their own way.
FOREIGN_FORMATS = ("flax", "mlx", "tf")

_OpenFile = tuple[frozenset[str], Callable[[str], Tensor]]


class WeightFiles:
    """Reads weights of one folder onto one device; `name` is the model's and goes into errors.

    `renames` are beginnings of names (stored, as asked for).
    Raises CheckpointError for a missing or damaged file, a missing key, a wrong shape or dtype.
    """

    def __init__(
        self, folder: Path, name: str, device: torch.device,
        renames: Sequence[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        found = find_weights(folder)
        if found is None:
            raise CheckpointError(
                f"{name} needs model.safetensors or pytorch_model.bin, whole or with an index of "
                "shards, it has none; fetch the weights"
            )
        self._name = name
        self._device = device
        self._opened = {path: _open(path) for path in found.paths}
        self._files = {key: path for path, (keys, _) in self._opened.items() for key in keys}
        if found.index is not None:
            self._files |= self._checked(found.index)
        listed = self._files if found.index is None else found.index
        self._names = {renamed(key, renames): key for key in self._files}
        self.listed = frozenset(renamed(key, renames) for key in listed)

    @property
    def stored(self) -> frozenset[str]:
        """All tensors of the files; `listed` are those that the index names where there is one."""
        return frozenset(self._names)

    def read(self, weight: Weight) -> Tensor:
        """Return a weight in its shape, on the device, in the file's dtype, adapters merged."""
        keys = weight.keys_in(self._names)
        tensors = [self._tensor(key) for key in keys]
        if weight.adapters:
            tensors = [
                self._adapted(tensor, *factors)
                for tensor, factors in zip(tensors, weight.adapters, strict=True)
            ]
        self.require_shape(weight, keys, tensors)
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).view(weight.shape)

    def require_shape(self, weight: Weight, keys: Sequence[str], tensors: list[Tensor]) -> None:
        """Raise CheckpointError unless stored tensors make up a weight of the config's shape."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len({shape[1:] for shape in shapes}) > 1 or not _views_as(shapes, weight.shape):
            raise CheckpointError(
                f"{self._name}: {_few(keys)} must hold {weight.shape} by "
                f"config.json, got {_few(shapes)}; use the config that belongs to the weights"
            )
        if shapes[0][-1:] == (1,) != weight.shape[-1:]:
            raise CheckpointError(
                f"{self._name}: {keys[0]} is stored as {shapes[0]}, channels last as MLX "
                "conversions are; use the checkpoint that it was converted from"
            )

    def read_projection(self, weight: Weight) -> Projection:
        """Return a weight of a projection; a subclass may leave it in FP8."""
        return self.read(weight)

    def read_parts(self, weight: Weight) -> Sequence[Projection] | None:
        """Return the parts of a projection that a subclass has in FP8 in part, else None."""
        return None

    def require_copy(self, copy: str, original: str) -> None:
        """Raise CheckpointError unless two tensors are the same, value by value."""
        one, other = (self._raw(key) for key in (copy, original))
        if one.dtype.itemsize == 1:
            # Not all operations take FP8.
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise CheckpointError(
                f"{self._name}: {copy} must be a copy of {original} by config.json, it differs; "
                "use the config that belongs to the weights"
            )

    def _adapted(self, tensor: Tensor, first_key: str, second_key: str) -> Tensor:
        """Return a matrix plus the product of its two low-rank factors."""
        first, second = self._tensor(first_key), self._tensor(second_key)
        if tensor.shape != (second.shape[0], first.shape[1]) or first.shape[0] != second.shape[1]:
            raise CheckpointError(
                f"{self._name}: {first_key} and {second_key} must multiply to "
                f"{tuple(tensor.shape)}, got {tuple(first.shape)} and {tuple(second.shape)}; "
                "use the config that belongs to the weights"
            )
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return tensor.to(wide) + second.to(wide) @ first.to(wide)

    def _tensor(self, key: str) -> Tensor:
        tensor = self._raw(key)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self._name}: {key} must be bf16, fp16 or fp32, got {tensor.dtype}; "
                "use weights that are not quantised"
            )
        return tensor.to(self._device)

    def _raw(self, key: str) -> Tensor:
        stored = self._names[key]
        path = self._files[stored]
        try:
            return self._opened[path][1](stored)
        # The file may have changed since it was opened, and the library raises its own classes.
        except Exception as err:
            raise damaged(path, err) from err

    def _checked(self, index: Mapping[str, Path]) -> Mapping[str, Path]:
        for key, path in index.items():
            keys = self._opened[path][0]
            if key not in keys:
                raise CheckpointError(
                    f"{path} must hold {key} by its index, it does not; {nearest_key(key, keys)}"
                )
        return index


def _open(path: Path) -> _OpenFile:
    """Return a file's keys and how to get one of its tensors; its content stays mapped."""
    return _open_bin(path) if path.suffix == ".bin" else _open_safe(path)


def _open_safe(path: Path) -> _OpenFile:
    header = read_header(path)
    if header.format in FOREIGN_FORMATS:
        raise CheckpointError(
            f"{path} is a conversion for {header.format}, whose tensors may have another layout "
            "and other values; use the checkpoint that it was converted from"
        )
    try:
        file: Any = safe_open(path, framework="pt")
        return frozenset(file.keys()), file.get_tensor
    # The Rust library raises classes of its own.
    except Exception as err:
        raise damaged(path, err) from err


def _open_bin(path: Path) -> _OpenFile:
    """Map a .bin file; only tensors are unpickled, never code."""
    require_file(path)
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary of tensors")
        tensors = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        require_names(tensors)
        for key, tensor in tensors.items():
            _require_own_values(key, tensor)
    # An unpickler that reads damaged bytes fails in any way.
    except Exception as err:
        raise damaged(path, err) from err
    return frozenset(tensors), tensors.__getitem__


def _require_own_values(key: str, tensor: Tensor) -> None:
    """Raise ValueError unless the file has each value of a tensor; strides could repeat some."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{key} is not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{key} of shape {tuple(tensor.shape)} has more values than the file")


def _views_as(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Tell whether tensors stacked along their first dim are `wanted`, dims of size 1 aside."""
    stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if len(shapes) > 1 and len(wanted) == len(stacked) + 1:
        # As many matrices for each entry of the first dim.
        each, rest = divmod(len(shapes), wanted[0])
        stacked = (wanted[0], each * shapes[0][0], *shapes[0][1:])
        if rest or any(shape != shapes[0] for shape in shapes):
            return False
    return [n for n in stacked if n != 1] == [n for n in wanted if n != 1]


def _few(items: Sequence[Any]) -> str:
    """Return the first items of a list as text."""
    text = ", ".join(str(item) for item in items[:3])
    return text if len(items) <= 3 else f"{text} and {len(items) - 3} more"
