"""The weight files of a model folder: safetensors or torch's .bin, whole or in shards.

Tensors are read one at a time, so that loading holds little more than one copy of a model.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stree_core.errors import CheckpointError
from stree_core.files import read_json
from stree_core.model_shape import Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)

_OpenFile = tuple[frozenset[str], Callable[[str], Tensor]]


class WeightFiles:
    """Reads weights of one folder onto one device; `name` is the model's and goes into errors.

    Raises CheckpointError for a missing or damaged file, a missing key, a wrong shape or dtype.
    """

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        self._folder = folder
        self._name = name
        self._device = device
        self._opened: dict[Path, _OpenFile] = {}
        self._files = self._find()

    def read(self, weight: Weight) -> Tensor:
        """Return a weight in its shape, on the device, in the file's dtype, adapters merged."""
        tensors = [self._tensor(key) for key in weight.keys]
        if weight.adapters:
            tensors = [
                self._adapted(tensor, *factors)
                for tensor, factors in zip(tensors, weight.adapters, strict=True)
            ]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len({shape[1:] for shape in shapes}) > 1 or not _views_as(shapes, weight.shape):
            raise CheckpointError(
                f"{self._name}: {_few(weight.keys)} must hold {weight.shape} by "
                f"config.json, got {_few(shapes)}; use the config that belongs to the weights"
            )
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).view(weight.shape)

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
        path = self._files.get(key)
        if path is None:
            raise CheckpointError(
                f"{self._name} needs weight {key}, no file has it; fetch the model again"
            )
        keys, get = self._open(path)
        if key not in keys:
            raise CheckpointError(
                f"{path} must hold {key} by its index, it does not; fetch the model again"
            )
        tensor = get(key)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self._name}: {key} must be bf16, fp16 or fp32, got {tensor.dtype}; "
                "use weights that are not quantised"
            )
        return tensor.to(self._device)

    def _find(self) -> dict[str, Path]:
        """Return the file that holds each weight."""
        for index_name, name in _NAMES:
            if (self._folder / index_name).exists():
                names = read_json(self._folder / index_name).get("weight_map", {})
                # The file's last part only: an index never points outside its folder.
                return {key: self._folder / Path(file).name for key, file in names.items()}
            path = self._folder / name
            if path.exists():
                return dict.fromkeys(self._open(path)[0], path)
        raise CheckpointError(
            f"{self._name} needs model.safetensors or pytorch_model.bin, whole or with an "
            "index of shards, it has none; fetch the weights"
        )

    def _open(self, path: Path) -> _OpenFile:
        """Return a file's keys and how to get one of its tensors; its content stays mapped."""
        if path not in self._opened:
            if not path.exists():
                raise CheckpointError(
                    f"{self._name} needs the shard {path.name}, it is not there; fetch it"
                )
            try:
                self._opened[path] = _open_bin(path) if path.suffix == ".bin" else _open_safe(path)
            except (SafetensorError, OSError, RuntimeError, pickle.PickleError) as err:
                raise CheckpointError(f"{path} cannot be read ({err}); fetch it again") from err
        return self._opened[path]


def _open_safe(path: Path) -> _OpenFile:
    file: Any = safe_open(path, framework="pt")
    return frozenset(file.keys()), file.get_tensor


def _open_bin(path: Path) -> _OpenFile:
    """Map a .bin file; only tensors are unpickled, never code."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise RuntimeError("it holds no dictionary of tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return frozenset(tensors), tensors.__getitem__


def _views_as(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Tell whether tensors stacked along their first dim are `wanted`, dims of size 1 aside."""
    stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if len(shapes) > 1 and len(wanted) == len(stacked) + 1:
        # One matrix for each entry of the first dim.
        stacked = (len(shapes), shapes[0][0], *shapes[0][1:])
        if any(shape != shapes[0] for shape in shapes):
            return False
    return [n for n in stacked if n != 1] == [n for n in wanted if n != 1]


def _few(items: list[Any] | tuple[Any, ...]) -> str:
    """Return the first items of a list as text."""
    text = ", ".join(str(item) for item in items[:3])
    return text if len(items) <= 3 else f"{text} and {len(items) - 3} more"
