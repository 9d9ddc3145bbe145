"""How a checkpoint's weights are quantised, by its config.

The declaration stands in config.json (`quantization_config`, `compression_config`, also inside
`text_config`), or in ModelOpt's hf_quant_config.json. Which tensors are in FP8 is what the files'
headers say (`stored`); the config says how, and what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from stree_core.errors import brief
from stree_core.fp8.layout import BLOCK, Fp8Kind

HF_QUANT = "hf_quant_config"
HF_QUANT_FILE = "hf_quant_config.json"
_SECTIONS = ("quantization_config", "compression_config")
_MODELOPT: dict[str, Fp8Kind] = {
    "FP8": "fp8-tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel",
    "FP8_PB_WO": "fp8-block",
    "FP8_BLOCK_SCALES": "fp8-block",
}
_COMPRESSED: dict[str, Fp8Kind] = {
    "tensor": "fp8-tensor",
    "channel": "fp8-channel",
    "block": "fp8-block",
}
_MAX_BLOCK = 1 << 16
_MAX_SKIPPED = 10_000
_EXPRESSION = re.compile(r"(?:[A-Za-z0-9_$^.-]|\\.|\.\*|\\d\+)*")
_MAX_REPEATS = 4
"""Expressions of a config are anybody's: only those are tried that cannot take for ever."""


class Unsupported(Exception):
    """A quantisation that cannot be run; its text says which, where, and the remedy."""


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """What a config says of its FP8 weights; `skipped` are names or patterns of modules without."""

    kind: Fp8Kind
    file: str
    block: tuple[int, int] = BLOCK
    skipped: tuple[str, ...] = ()
    quantised_cache: bool = False

    def skips(self, key: str) -> bool:
        """Tell whether the config excludes a tensor: by name, part of a path, glob or `re:`."""
        module = key.removesuffix(".weight")
        return any(_matches(pattern, module) for pattern in self.skipped)


def find_scheme(config: Mapping[str, Any]) -> Fp8Scheme | None:
    """Return how the weights of a config are in FP8, None where they are not quantised.

    Raises Unsupported for every other quantisation, and for declarations that contradict.
    """
    found = [_parse(section, file) for section, file in _declarations(config)]
    if not found:
        return None
    first = found[0]
    for other in found[1:]:
        for what, mine, theirs in (
            ("scheme", (first.kind, first.block), (other.kind, other.block)),
            ("excluded modules", sorted(first.skipped), sorted(other.skipped)),
        ):
            if mine != theirs:
                raise Unsupported(
                    f"its quantisation is declared twice with another {what}, {brief(mine)} by "
                    f"{first.file} and {brief(theirs)} by {other.file}; remove the wrong one"
                )
    return first


def _declarations(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each declaration and the file that holds it."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        for name in _SECTIONS:
            if section.get(name) is not None:
                yield _object(section[name], name, "config.json"), "config.json"
    if config.get(HF_QUANT) is not None:
        declared = _object(config[HF_QUANT], HF_QUANT, HF_QUANT_FILE)
        nested = declared.get("quantization")
        if nested is not None:
            declared = _object(nested, "quantization", HF_QUANT_FILE)
        if declared.get("quant_algo") is not None:
            yield declared, HF_QUANT_FILE


def _parse(declared: Mapping[str, Any], file: str) -> Fp8Scheme:
    method, algorithm = declared.get("quant_method"), declared.get("quant_algo")
    if (
        file == HF_QUANT_FILE
        or str(method).startswith("modelopt")
        or (method is None and algorithm is not None)
    ):
        return _modelopt(declared, file)
    if method == "fp8":
        return _plain(declared, file)
    if method == "compressed-tensors":
        return _compressed(declared, file)
    if method == "fbgemm_fp8":
        return Fp8Scheme("fp8-channel", file, skipped=_skipped(declared, file))
    raise _refused(algorithm or method or "unnamed", file)


def _plain(declared: Mapping[str, Any], file: str) -> Fp8Scheme:
    """The scheme of `quant_method: fp8`: with blocks, or one scale for a tensor."""
    for key, allowed in (("fmt", ("e4m3",)), ("store_dtype", ()), ("expert_dtype", ("fp8",))):
        if declared.get(key) is not None and declared[key] not in allowed:
            raise _refused(f"fp8 with {key} {declared[key]}", file)
    block = declared.get("weight_block_size")
    if block is None:
        return Fp8Scheme("fp8-tensor", file, skipped=_skipped(declared, file))
    sizes = _block(block, "weight_block_size", file)
    return Fp8Scheme("fp8-block", file, sizes, _skipped(declared, file))


def _modelopt(declared: Mapping[str, Any], file: str) -> Fp8Scheme:
    """The scheme of ModelOpt: one algorithm for all layers, or one for each."""
    algorithm = declared.get("quant_algo")
    algorithms = {str(algorithm).upper(): ""}
    if str(algorithm).upper() == "MIXED_PRECISION":
        layers = _object(declared.get("quantized_layers") or {}, "quantized_layers", file)
        algorithms = {
            str(_object(layer, name, file).get("quant_algo")).upper(): name
            for name, layer in reversed(list(layers.items()))
        }
    for name, layer in algorithms.items():
        if name not in _MODELOPT:
            raise _refused(name, file, layer)
    kinds = {_MODELOPT[name] for name in algorithms}
    if len(kinds) != 1:
        raise _refused(f"several FP8 schemes: {', '.join(sorted(algorithms))}", file)
    cache = declared.get("kv_cache_quant_algo") or declared.get("kv_cache_scheme")
    return Fp8Scheme(
        kinds.pop(), file, skipped=_skipped(declared, file), quantised_cache=bool(cache)
    )


def _compressed(declared: Mapping[str, Any], file: str) -> Fp8Scheme:
    """The scheme of compressed-tensors, whose groups must all have the same."""
    layout = declared.get("format")
    if layout not in ("float-quantized", "naive-quantized"):
        raise _refused(f"compressed-tensors {layout}", file)
    groups = _object(declared.get("config_groups") or {}, "config_groups", file)
    found = set()
    for name, group in groups.items():
        weights = _object(_object(group, name, file).get("weights") or {}, f"{name}.weights", file)
        strategy = str(weights.get("strategy"))
        is_fp8 = weights.get("num_bits") == 8 and weights.get("type") == "float"
        if not is_fp8 or strategy not in _COMPRESSED or weights.get("symmetric") is False:
            what = f"{weights.get('type')} of {weights.get('num_bits')} bits by {strategy}"
            raise _refused(f"compressed-tensors {what}", file, name)
        block = weights.get("block_structure")
        sizes = _block(block, f"{name}.weights.block_structure", file) if block else BLOCK
        found.add((_COMPRESSED[strategy], sizes))
    if len(found) != 1:
        raise _refused(f"compressed-tensors with {len(found)} schemes", file)
    kind, sizes = found.pop()
    cache = bool(declared.get("kv_cache_scheme"))
    return Fp8Scheme(kind, file, sizes, _skipped(declared, file), cache)


def _skipped(declared: Mapping[str, Any], file: str) -> tuple[str, ...]:
    """Return the excluded modules, under whichever of their names stands there."""
    names: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        values = declared.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise Unsupported(f"{key} must be a list of names, got {brief(values)}; correct {file}")
        names += values
    if len(names) > _MAX_SKIPPED:
        raise Unsupported(
            f"at most {_MAX_SKIPPED} modules are excluded, got {len(names)}; correct {file}"
        )
    return tuple(dict.fromkeys(names))


def _block(value: Any, name: str, file: str) -> tuple[int, int]:
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(type(n) is int and 0 < n <= _MAX_BLOCK for n in value):
        raise Unsupported(
            f"{name} must be rows and columns of a block, got {brief(value)}; correct {file}"
        )
    return value[0], value[1]


def _object(value: Any, name: str, file: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unsupported(f"{name} must be an object, got {brief(value)}; correct {file}")
    return value


def _refused(what: object, file: str, where: str = "") -> Unsupported:
    place = f", {brief(where)}" if where else ""
    return Unsupported(
        f"its weights are quantised ({brief(what)} by {file}{place}) and bf16, fp16, fp32 or FP8 "
        "(e4m3 by block, tensor or channel) are run; use the checkpoint in bf16 or FP8"
    )


def _matches(pattern: str, module: str) -> bool:
    """Tell whether a pattern names a module, a part of its path, or a module that it lies in."""
    if pattern.startswith("re:"):
        expression = pattern[3:]
        repeats = expression.count("*") + expression.count("+")
        if repeats > _MAX_REPEATS or not _EXPRESSION.fullmatch(expression):
            return False
        return re.match(expression, module) is not None
    parts: Sequence[str] = pattern.removesuffix(".weight").split(".")
    if any(letter in pattern for letter in "*?["):
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")
    path = module.split(".")
    width = len(parts)
    return any(path[i : i + width] == parts for i in range(len(path) - width + 1))
