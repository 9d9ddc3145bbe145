"""Other projects' kernels, where they can be had: none is needed, none is part of this project.

mamba-ssm comes from an installed wheel; its package imports a CUDA extension that the Triton ops do
without, so the package itself is replaced by an empty one. SGLang's tree kernel is one file of its
wheel, `sglang/kernels/ops/mamba/triton_ops/mamba_ssm.py`, loaded by itself from a path.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Peers:
    """The peers' ops, None where absent; `versions` says which version, or why it is absent."""

    one_token: Op | None
    chunk_scan: Op | None
    tree_update: Op | None
    versions: dict[str, str]


def load_peers(sglang_file: Path | None) -> Peers:
    """Return what can be imported."""
    mamba, mamba_version = _load_mamba_ssm()
    tree_update, sglang_version = _load_sglang(sglang_file)
    versions = {"mamba_ssm": mamba_version, "sglang": sglang_version}
    one_token, chunk_scan = mamba or (None, None)
    return Peers(one_token, chunk_scan, tree_update, versions)


def _load_mamba_ssm() -> tuple[tuple[Op, Op] | None, str]:
    """Return its one-token update and its chunk scan, and the version."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        return None, "absent: mamba_ssm is not installed"
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["mamba_ssm"] = package
    folder = "mamba_ssm.ops.triton."
    try:
        update = importlib.import_module(folder + "selective_state_update")
        combined = importlib.import_module(folder + "ssd_combined")
    except ImportError as err:
        return None, f"absent: {err}"
    version = importlib.metadata.version("mamba_ssm")
    return (update.selective_state_update, combined.mamba_chunk_scan_combined), version


def _load_sglang(file: Path | None) -> tuple[Op | None, str]:
    """Return its multi-token update, and the version from the METADATA beside the file."""
    if file is None:
        return None, "absent: no --sglang FILE"
    if not file.exists():
        return None, f"absent: {file.name} is not at the path given"
    name = "sglang_mamba_ssm"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # All that the file takes from its package.
    stub: Any = types.ModuleType("sglang.kernels.jit.utils")
    stub.is_arch_support_pdl = _has_pdl
    parents = ("sglang", "sglang.kernels", "sglang.kernels.jit")
    stubs = {parent: types.ModuleType(parent) for parent in parents} | {stub.__name__: stub}
    replaced = {key: sys.modules[key] for key in stubs if key in sys.modules}
    sys.modules |= stubs | {name: module}
    try:
        spec.loader.exec_module(module)
    except ImportError as err:
        return None, f"absent: {err}"
    finally:
        for key in stubs:
            del sys.modules[key]
        sys.modules |= replaced
    return module.selective_state_update, _version_beside(file)


def _version_beside(file: Path) -> str:
    metadata = file.with_name("METADATA")
    lines = metadata.read_text().splitlines() if metadata.exists() else []
    return next((line[9:] for line in lines if line.startswith("Version: ")), "unknown")


def _has_pdl() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
