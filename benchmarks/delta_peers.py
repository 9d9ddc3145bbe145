"""Other projects' gated delta kernels, where they can be had: none is part of this project.

Both come as the unpacked folder of a wheel, given by path: `fla` of flash-linear-attention and
fla-core, `sglang` of SGLang. Their packages import much that single kernels do without, so the
packages above the kernels' files are replaced by empty ones with the same path.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Op = Callable[..., Any]
FLA_PACKAGES = ("fla", "fla.ops")
SGLANG_PACKAGES = (
    "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention",
    "sglang.kernels.ops.attention.fla", "sglang.kernels.ops.attention.linear", "sglang.srt",
)  # fmt: skip
SGLANG_OPS = "sglang.kernels.ops.attention."


@dataclass(frozen=True, slots=True)
class DeltaPeers:
    """The peers' ops by a candidate's name; `versions` says which version, or why one is absent."""

    ops: dict[str, Op]
    versions: dict[str, str]


def load_delta_peers(folder: Path | None) -> DeltaPeers:
    """Return what can be imported from a folder of unpacked wheels."""
    if folder is None:
        return DeltaPeers({}, dict.fromkeys(("fla", "sglang"), "absent: no --peers FOLDER"))
    ops: dict[str, Op] = {}
    versions = {
        "fla": _version(folder, "flash_linear_attention"), "sglang": _version(folder, "sglang"),
    }  # fmt: skip
    wanted = {
        "fla": ("fla", "fla.ops.gated_delta_rule.fused_recurrent",
                "fused_recurrent_gated_delta_rule"),
        "fla_chunk": ("fla", "fla.ops.gated_delta_rule.chunk", "chunk_gated_delta_rule"),
        "sglang_tree": ("sglang", SGLANG_OPS + "fla.fused_recurrent",
                        "fused_recurrent_gated_delta_rule_update"),
        "sglang_replay": ("sglang", SGLANG_OPS + "linear.gdn_replayssm_spec_decode",
                          "gdn_replayssm_spec_decode"),
    }  # fmt: skip
    _stub(folder, FLA_PACKAGES, versions["fla"])
    _stub(folder, SGLANG_PACKAGES, versions["sglang"])
    _stub_sglang_utils()
    for name, (package, module, function) in wanted.items():
        try:
            ops[name] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as err:
            versions[package] = f"absent: {err}"
    return DeltaPeers(ops, versions)


def _stub(folder: Path, packages: tuple[str, ...], version: str) -> None:
    for name in packages:
        module: Any = types.ModuleType(name)
        module.__version__ = version
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module


def _stub_sglang_utils() -> None:
    """All that the kernels' files take from SGLang's utilities."""
    utils: Any = types.ModuleType("sglang.srt.utils")
    common: Any = types.ModuleType("sglang.srt.utils.common")
    utils.is_gfx95_supported = lambda: False
    utils.common = common
    common.torch_release = tuple(map(int, torch.__version__.split("+")[0].split(".")))
    sys.modules |= {utils.__name__: utils, common.__name__: common}


def _version(folder: Path, name: str) -> str:
    found = sorted(folder.glob(f"{name}-*.dist-info"))
    return found[0].name.split("-")[1].removesuffix(".dist") if found else "unknown"
