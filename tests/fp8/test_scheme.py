"""How configs declare FP8, and which quantisations are refused."""

from __future__ import annotations

from typing import Any

import pytest

from stree_core.fp8 import Fp8Weights, Unsupported, find_scheme, row_group
from stree_core.fp8.scheme import Fp8Scheme

LINEAR = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": LINEAR | {"strategy": strategy} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


BLOCK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
FLAT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
NESTED = {"producer": {}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
MIXED = {
    "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "FP8"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind", "block"),
    [
        ({"quantization_config": BLOCK}, "fp8-block", (128, 128)),
        ({"text_config": {"quantization_config": BLOCK}}, "fp8-block", (128, 128)),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8-tensor", (128, 128)),
        ({"quantization_config": FLAT}, "fp8-tensor", (128, 128)),
        ({"quantization_config": {"quant_algo": "FP8"}}, "fp8-tensor", (128, 128)),
        ({"hf_quant_config": NESTED}, "fp8-tensor", (128, 128)),
        ({"quantization_config": FLAT, "hf_quant_config": NESTED}, "fp8-tensor", (128, 128)),
        ({"quantization_config": MIXED}, "fp8-tensor", (128, 128)),
        ({"quantization_config": FLAT | {"quant_algo": "FP8_PB_WO"}}, "fp8-block", (128, 128)),
        ({"quantization_config": compressed("tensor")}, "fp8-tensor", (128, 128)),
        ({"compression_config": compressed("channel")}, "fp8-channel", (128, 128)),
        (
            {"quantization_config": compressed("block", block_structure=[64, 128])},
            "fp8-block",
            (64, 128),
        ),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fp8-channel", (128, 128)),
    ],
)
def test_published_declarations_are_found(
    config: dict[str, Any], kind: str, block: tuple[int, int]
) -> None:
    scheme = find_scheme(config)
    assert scheme is not None
    assert (scheme.kind, scheme.block) == (kind, block)


def test_a_config_without_a_declaration_is_not_quantised() -> None:
    cache_only = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert find_scheme({}) is None
    assert find_scheme({"quantization_config": None, "hf_quant_config": cache_only}) is None


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"bits": 4}, r"quantised \('unnamed' by config\.json\)"),
        ({"quant_method": "awq", "bits": 4}, r"quantised \('awq' by config\.json\)"),
        ({"quant_method": "mxfp4"}, r"quantised \('mxfp4' by"),
        ({"quant_method": "bitsandbytes"}, r"quantised \('bitsandbytes' by"),
        ({"quant_method": "quark"}, r"quantised \('quark' by"),
        (FLAT | {"quant_algo": "NVFP4"}, r"quantised \('NVFP4' by"),
        (FLAT | {"quant_algo": "MXFP8"}, r"quantised \('MXFP8' by"),
        (
            MIXED | {"quantized_layers": {"a": {"quant_algo": "FP8"},
                                          "x.mlp": {"quant_algo": "W4A16_NVFP4"}}},
            r"quantised \('W4A16_NVFP4' by config\.json, 'x\.mlp'\)",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantised \('fp8 with fmt e5m2' by"),
        ({"quant_method": "fp8", "store_dtype": "mxfp4"}, r"fp8 with store_dtype mxfp4"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, r"fp8 with expert_dtype fp4"),
        (compressed("channel") | {"format": "pack-quantized"}, r"compressed-tensors pack-quant"),
        (compressed("channel", num_bits=4), r"float of 4 bits by channel"),
        (compressed("channel", type="int"), r"int of 8 bits by channel"),
        (compressed("group"), r"float of 8 bits by group"),
        (BLOCK | {"weight_block_size": [128]}, r"weight_block_size must be rows and columns"),
        (BLOCK | {"weight_block_size": [0, 128]}, r"weight_block_size must be rows and columns"),
        (BLOCK | {"modules_to_not_convert": "lm_head"}, r"must be a list of names, got 'lm_head'"),
        (MIXED | {"quantized_layers": {}}, r"several FP8 schemes|compressed|quantised"),
    ],
)  # fmt: skip
def test_every_other_quantisation_is_refused_by_name(
    declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        find_scheme({"quantization_config": declared})


def test_lists_have_bounds() -> None:
    with pytest.raises(Unsupported, match="at most 10000 modules are excluded, got 10001"):
        find_scheme({"quantization_config": BLOCK | {"ignore": ["x"] * 10_000}})


def test_declarations_that_contradict_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"declared twice with another scheme, .*'fp8-block'"):
        find_scheme({"quantization_config": BLOCK, "hf_quant_config": NESTED})
    other = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["mtp*"]}}
    with pytest.raises(Unsupported, match=r"another excluded modules, .*\['mtp\*'\]"):
        find_scheme({"quantization_config": FLAT, "hf_quant_config": other})


@pytest.mark.parametrize(
    ("pattern", "key", "skipped"),
    [
        ("lm_head", "lm_head.weight", True),
        ("mlp.gate", "model.layers.0.mlp.gate.weight", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj.weight", False),
        ("b_proj", "model.layers.0.q_b_proj.weight", False),
        ("model.layers.1.self_attn", "model.layers.1.self_attn.q_proj.weight", True),
        ("model.layers.1", "model.layers.10.self_attn.q_proj.weight", False),
        ("mtp*", "mtp.layers.0.mlp.up_proj.weight", True),
        ("mtp*", "model.mtp.layers.0.mlp.up_proj.weight", True),
        ("*.mlp.shared_expert.*", "model.layers.3.mlp.shared_expert.up_proj.weight", True),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate.weight", True),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate_proj.weight", False),
        ("re:.*mixer\\.(in|out)_proj$", "model.layers.0.mixer.in_proj.weight", False),
        ("re:(a+)+$", "a" * 40, False),
        ("re:(", "model.layers.0.mlp.gate_proj.weight", False),
    ],
)
def test_excluded_modules_are_matched_by_whole_names(pattern: str, key: str, skipped: bool) -> None:
    assert Fp8Scheme("fp8-block", "x", skipped=(pattern,)).skips(key) == skipped


@pytest.mark.parametrize(
    ("kind", "block", "starts", "group"),
    [
        ("fp8-block", (128, 128), [4096, 5120], 128),
        ("fp8-block", (128, 128), [4160], 64),
        ("fp8-block", (128, 128), [4097], 1),
        ("fp8-block", (192, 128), [], 64),
        ("fp8-tensor", (128, 128), [], 128),
        ("fp8-tensor", (128, 128), [96, 48], 16),
        ("fp8-channel", (128, 128), [128], 1),
    ],
)
def test_rows_are_grouped_by_what_all_parts_agree_on(
    kind: Any, block: tuple[int, int], starts: list[int], group: int
) -> None:
    assert row_group(Fp8Weights(kind, {}, block), starts) == group


def test_ragged_blocks_have_scales_at_the_nominal_pitch() -> None:
    fp8 = Fp8Weights("fp8-block", {})
    assert fp8.scale_shape((1000, 192)) == (8, 2)
    assert fp8.scale_shape((64, 32)) == (1, 1)
    assert Fp8Weights("fp8-tensor", {}).scale_shape((1000, 192)) == ()
    assert Fp8Weights("fp8-channel", {}).scale_shape((4, 1000, 192)) == (4, 1000, 1)
    assert fp8.held_bytes((1000, 192)) == 192_000 + 4 * 8 * 2
