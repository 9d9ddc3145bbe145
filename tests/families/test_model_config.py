"""Every config.json loads to what it says or is refused in one sentence that helps."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from native_models import LLAMA, MAMBA, NATIVE, save_mamba_in_llama
from published_shapes import BAMBA, PUBLISHED
from tiny_models import FAMILIES as TINY, ours, tiny_bamba

from stree_core.engine.engine import Engine, EngineConfig
from stree_core.errors import CheckpointError
from stree_core.families.model_shape import AttentionShape, Mamba2Shape, ModelShape
from stree_core.families.registry import WIDTH_MULTIPLE, shape_from_config
from stree_core.models.source import folder_source
from stree_core.tree import Tree
from stree_kernels.linear.deferred_norm import COLUMNS_PER_SUM

Config = dict[str, Any]
KINDS = ["mamba", "attention"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """A small config of every family, as transformers writes it, and of the native formats."""
    folder = tmp_path_factory.mktemp("configs")
    found: dict[str, Config] = {"native": NATIVE, "mamba-in-llama": LLAMA | {"mamba_config": MAMBA}}
    for name in (
        "mamba2", "bamba", "granite-moe", "nemotron-3", "falcon-h1-norm", "zamba2", "qwen3-next",
        "qwen3.5-vision",
    ):  # fmt: skip
        TINY[name]().config.save_pretrained(folder)
        found[name] = json.loads((folder / "config.json").read_text())
    return found


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def attends(shape: ModelShape) -> list[bool]:
    mixers = [part.mixer for part in shape.parts]
    return [
        isinstance(m, AttentionShape) for m in mixers if isinstance(m, AttentionShape | Mamba2Shape)
    ]


ANYWHERE: list[tuple[Config, str | None]] = [
    ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ({"quantization_config": {"quant_method": "awq"}}, r"quantised \('awq' by config\.json\)"),
    ({"quantization_config": {"bits": 4}}, r"quantised \('unnamed' by config\.json\)"),
    ({"hf_quant_config": {"quantization": {"quant_algo": "NVFP4"}}}, r"\('NVFP4' by hf_quant_c"),
]
BY_FAMILY: dict[str, list[tuple[Config, str | None]]] = {
    "mamba2": [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"state_size": None}, "needs key 'state_size'"),
        ({"expand": 3}, "num_heads times head_dim must be 96 by expand, got 64"),
        ({"layer_types": ["linear_attention", "full_attention"]}, r"layer_types\[1\] = 'full_att"),
    ],
    "bamba": [
        ({"model_type": "Bamba"}, r"got 'Bamba'; did you mean bamba\?"),
        ({"mamba_d_state": None}, "needs key 'mamba_d_state'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"time_step_limit": "wide"}, "time_step_limit must be a list, got 'wide'"),
        ({"time_step_limit": [0.1]}, "time_step_limit must be a list of 2 numbers"),
        (
            {"time_step_limit": [0.0, 1e300]},
            r"to 1e\+15, or infinite, got 1e\+300",
        ),
        ({"time_step_limit": [0.2, 0.1]}, "a least and a greatest time step"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0 is not supported, only 0.5"),
        ({"mamba_d_head": 5}, "mamba_n_heads times mamba_d_head must be 64, got 20"),
        ({"mamba_n_groups": 3}, r"must be a divisor of the Mamba2 heads \(4\), got 3"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"attn_layer_indices": None}, "'layers_block_type' or 'layer_types' or 'attn_layer_indic"),
        ({"attn_layer_indices": [4]}, "different layers below 4"),
        ({"layer_types": KINDS + KINDS[::-1]}, "layer_types .* attn_layer_indices .* at layer 2;"),
        ({"num_key_value_heads": 3}, r"a divisor of num_attention_heads \(4\), got 3"),
    ],
    "granite-moe": [
        ({"normalization_function": "layernorm"}, "normalization_function"),
        ({"layer_types": ["mamba"] * 3}, "num_hidden_layers is 4, but layer_types lists 3 layers"),
        ({"layer_types": ["mamba", "wave", "mamba", "mamba"]}, r"layer_types\[1\] = 'wave' is not"),
        ({"layer_types": None}, "needs key 'layers_block_type' or 'layer_types' to say what each"),
        ({"num_experts_per_tok": None}, "'num_experts_per_tok'"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be from 1 to 6, got 7"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
    ],
    "nemotron-3": [
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported, only 'relu2'"),
        ({"use_bias": True}, "use_bias"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M?MEE"}, r"hybrid_over.* = '\?'"),
        ({"layers_block_type": None}, "'layer_types' or 'hybrid_override_pattern' to say what"),
        ({"hybrid_override_pattern": "M*-ME"}, None),
        ({"hybrid_override_pattern": "M*M-E"}, "hybrid_override_pattern .* first at layer 2;"),
        ({"n_groups": "two"}, "n_groups must be a whole number, got 'two'"),
        ({"mamba_n_groups": 4}, "n_groups = 2 and mamba_n_groups = 4 are one setting"),
        ({"mamba_dt_limit": [0.0, 9.0]}, "time_step_limit and mamba_dt_limit are one setting"),
        ({"attention_head_dim": 8}, "head_dim = 16 and attention_head_dim = 8 are one setting"),
        ({"head_dim": None}, "needs key 'head_dim'"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2 is not supported, only 1"),
        ({"residual_in_fp32": True}, "residual_in_fp32 = True"),
        ({"moe_latent_size": "a--b"}, "moe_latent_size must be a whole number, got 'a--b'"),
        ({"n_group": 3}, r"n_group must be a divisor of n_routed_experts \(8\), got 3"),
        ({"n_group": 8}, r"n_group must be at most half of n_routed_experts \(8\), got 8"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_exp.* from 1 to 2, got 3"),
    ],
    "falcon-h1-norm": [
        ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate = True"),
        ({"projectors_bias": True}, "projectors_bias"),
        ({"mamba_d_conv": None}, "needs key 'mamba_d_conv'"),
        ({"ssm_multipliers": [1.0] * 4}, "ssm_multipliers must be a list of 5 numbers"),
        ({"layer_types": ["hybrid", "hybrid", "mamba"]}, r"layer_types\[2\] = 'mamba'"),
    ],
    "zamba2": [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'gelu' and 'silu'"),
        ({"use_long_context": True}, "use_long_context"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"use_conv_bias": False}, "use_conv_bias = False is not supported, only True"),
        ({"num_mem_blocks": 0}, "num_mem_blocks must be from 1 to"),
        ({"mamba_headdim": 8}, "mamba_headdim = 8 is not supported, only 16"),
        ({"state_size": 64}, "has state_size, which is of Zyphra's first Zamba2 format"),
    ],
    "qwen3-next": [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported, only 1"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported, only \[\]"),
        ({"head_dim": 24}, "head_dim = 24 is not supported, only powers of two from 16 on"),
        ({"linear_num_key_heads": 3}, r"a divisor of linear_num_value_heads \(4\), got 3"),
        ({"shared_expert_intermediate_size": 40}, "must be a multiple of 24, got 40"),
        ({"layer_types": None}, "or 'full_attention_interval' to say what each layer is"),
        ({"layer_types": None, "full_attention_interval": 2}, None),
        ({"full_attention_interval": 3}, "layer_types .* full_attention_interval .* at layer 1;"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.25 is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers = 2 is not supported, only 1"),
    ],
    "qwen3.5-vision": [
        ({"text_config": None}, "needs key 'hidden_size'"),
        ({"text_config": {}}, "needs key 'text_config.hidden_size'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings differs inside text_config and out"),
        (
            {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
            r"quantised \('gptq' by config\.json\)",
        ),
        ({"text_config": {"attn_output_gate": False}}, "attn_output_gate = False is not supp"),
        (
            {"text_config": {"mtp_use_dedicated_embeddings": True}},
            "text_config.mtp_use_dedicated_embeddings = True is not supported",
        ),
    ],
    "native": [
        (
            {"d_model": 36, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}},
            "the hidden size must be a multiple of 8, .* got 36",
        ),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]"),
        ({"ssm_cfg": {}}, "layer = 'Mamba1' is not supported, only 'Mamba2'"),
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"d_model": None}, "'d_model'"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "ssm_cfg.headdim must be a divisor"),
    ],
    "mamba-in-llama": [
        ({"model_type": "gemma2"}, "model_type = 'gemma2'"),
        ({"mamba_config": without(MAMBA, "attn_layers")}, r"mamba_config\.json needs key 'attn_la"),
        (
            {"mamba_config": MAMBA | {"d_inner": 48}},
            r"d_inner must be ngroups times d_state \(64\)",
        ),
        (
            {"mamba_config": MAMBA | {"n_layer": 5}},
            r"n_layer must be num_hidden_layers of config\.",
        ),
        ({"mamba_config": MAMBA | {"attn_layers": [9]}}, r"attn_layers\[0\] must be from 0 to 3"),
        ({"mamba_config": MAMBA | {"ssm_cfg": {}}}, r"mamba_config\.json needs key 'ssm_cfg\.ng"),
        (
            {
                "mamba_config": MAMBA
                | {"ssm_cfg": MAMBA["ssm_cfg"] | {"repeat_kv_before_conv": True}}
            },
            r"ssm_cfg\.repeat_kv_before_conv = True",
        ),
    ],
}


@pytest.mark.parametrize("family", BY_FAMILY)
def test_configs_that_cannot_be_run_are_refused(family: str, configs: dict[str, Config]) -> None:
    for changes, message in ANYWHERE + BY_FAMILY[family]:
        changed = configs[family] | changes
        if message is None:
            shape_from_config(changed, "x")
            continue
        with pytest.raises(CheckpointError, match=message):
            shape_from_config(changed, "x")


@pytest.mark.parametrize(
    "keys",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layers_block_type": KINDS},
        {"layer_types": KINDS, "layers_block_type": KINDS, "attn_layer_indices": [1]},
    ],
)
def test_bambas_attention_is_found_under_every_key(keys: Config) -> None:
    config = without(BAMBA, "attn_layer_indices") | {"num_hidden_layers": 2} | keys
    assert attends(shape_from_config(config, "x")) == [False, True]


def test_a_model_without_attention_says_so_with_an_empty_list() -> None:
    assert not shape_from_config(BAMBA | {"attn_layer_indices": []}, "x").has_attention


def test_nemotrons_aliases_mean_the_same_model(configs: dict[str, Config]) -> None:
    config = configs["nemotron-3"]
    aliases = {
        "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
        "use_conv_bias": "mamba_conv_bias", "time_step_limit": "mamba_dt_limit",
        "n_routed_experts": "num_local_experts", "layers_block_type": "layer_types",
        "head_dim": "attention_head_dim",
    }  # fmt: skip
    renamed = {aliases.get(key, key): value for key, value in config.items()}
    assert shape_from_config(renamed, "x") == shape_from_config(config, "x")


def test_qwens_older_spellings_mean_the_same_model(configs: dict[str, Config]) -> None:
    config = configs["qwen3-next"]
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25
    older = without(config, "rope_parameters", "layer_types") | {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_scaling": None,
        "full_attention_interval": 2, "use_sliding_window": False, "norm_topk_prob": True,
    }  # fmt: skip
    assert shape_from_config(older, "x") == shape_from_config(config, "x")
    turned = {part.mixer.rope.dim for part in shape_from_config(older, "x").parts
              if isinstance(part.mixer, AttentionShape) and part.mixer.rope}  # fmt: skip
    assert turned == {4}


def test_the_language_model_inside_a_vision_model_is_taken_and_said(
    configs: dict[str, Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stree_core")
    config = configs["qwen3.5-vision"] | {"eos_token_id": [3, 4]}
    shape = shape_from_config(config, "x")
    text = config["text_config"] | {"eos_token_id": [3, 4], "mtp_num_hidden_layers": 1}
    alone = shape_from_config(text, "x")
    assert shape == dataclasses.replace(alone, mtp=None)
    assert alone.mtp is not None
    assert shape.lm_head == shape.embed
    first, second, *_ = (record.getMessage() for record in caplog.records)
    assert first == "config.json describes a vision model: its text_config is run"
    assert second.startswith("x: config keys not used: image_token_id,")
    assert "vision_config" in second


@pytest.mark.parametrize(
    ("family", "name"),
    [("nemotron-3", "time_step_limit"), ("nemotron-3", "mamba_dt_limit"),
     ("zamba2", "time_step_limit"), ("bamba", "time_step_limit")],
)  # fmt: skip
def test_time_steps_are_limited_by_the_run_time_key_alone(
    family: str, name: str, configs: dict[str, Config]
) -> None:
    """`time_step_min` and `time_step_max` are where training starts."""
    config = without(configs[family], "time_step_limit") | {
        "time_step_min": 0.5, "time_step_max": 0.6, "time_step_floor": 0.4,
    }  # fmt: skip
    for given, limit in (
        ({}, (0.0, float("inf"))),
        ({name: None}, (0.0, float("inf"))),
        ({name: [0.001, 0.1]}, (0.001, 0.1)),
        ({name: [0.0, {"__float__": "Infinity"}]}, (0.0, float("inf"))),
    ):
        mixers = [part.mixer for part in shape_from_config(config | given, "x").parts]
        assert {m.dt_limit for m in mixers if isinstance(m, Mamba2Shape)} == {limit}


def test_falcons_mixer_width_is_given_or_null(configs: dict[str, Config]) -> None:
    config = configs["falcon-h1-norm"]
    with pytest.raises(CheckpointError, match=r"needs key 'mamba_d_ssm', the nearest it has is"):
        shape_from_config(without(config, "mamba_d_ssm"), "x")
    wider = config | {"mamba_d_ssm": None, "mamba_n_heads": 4}
    mixers = [part.mixer for part in shape_from_config(wider, "x").parts]
    assert {m.inner_dim for m in mixers if isinstance(m, Mamba2Shape)} == {64}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "jamba"}, "model_type jamba has Mamba-1 layers; only Mamba-2"),
        ({"model_type": "zamba"}, "model_type zamba has Mamba-1 layers"),
        ({"model_type": "mamba"}, "model_type mamba has Mamba-1 layers"),
        ({"model_type": "mamba3"}, "model_type mamba3 has Mamba-3 layers"),
        ({"model_type": "granitemoeshared"}, "got 'granitemoeshared'; known: bamba"),
        ({"model_type": "lfm2"}, "short convolution layers"),
        (
            {"model_type": "NemotronH_Nano_VL_V2", "llm_config": {"model_type": "nemotron_h"}},
            "several modalities, .* config is llm_config of model_type nemotron_h",
        ),
        ({"model_type": "omni", "thinker_config": {"model_type": []}}, "config is thinker_config;"),
        (
            {"architectures": ["NemotronHForCausalLM"]},
            r"needs key 'model_type', the nearest it has",
        ),
        ({"model_type": None}, "needs key 'model_type'; add it, one of bamba"),
        ({"model_type": "llama"}, r"needs mamba_config\.json"),
        ({"model_type": "gpt2"}, "got 'gpt2'; known: bamba"),
        ({"model_type": 5}, "model_type must be a text, got 5"),
    ],
)
def test_models_of_no_family_are_refused_for_the_true_reason(config: Config, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        shape_from_config(config, "x")
    for misleading in ("did you mean", "None", "again"):
        assert misleading not in str(caught.value)


def test_a_missing_key_is_named_with_the_nearest_that_is_there(configs: dict[str, Config]) -> None:
    renamed = without(configs["mamba2"], "state_size") | {"ssm_state_size": 16}
    with pytest.raises(CheckpointError, match="'state_size', the nearest it has is 'ssm_state_si"):
        shape_from_config(renamed, "x")


def test_keys_that_nothing_reads_are_listed_once(
    configs: dict[str, Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stree_core")
    for config in configs.values():
        shape_from_config(config, "x")
    caplog.clear()
    odd = {"mystery": 1, "esc\x1b": 2, "unset": None}
    shape_from_config(configs["bamba"] | odd, "x")
    (record,) = caplog.records
    assert record.getMessage() == "x: config keys not used: 'esc\\x1b', mystery"
    assert record.levelno == logging.INFO


def test_a_quantisation_in_its_own_file_is_read(tmp_path: Path) -> None:
    save_mamba_in_llama(tmp_path / "model", seed=0)
    own = tmp_path / "model" / "hf_quant_config.json"
    own.write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    folder_source(tmp_path / "model")
    own.write_text('{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match=r"\('NVFP4' by hf_quant_config\.json\)"):
        folder_source(tmp_path / "model")


def test_a_context_beyond_the_models_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tiny_bamba()
    theirs.config.max_position_embeddings = 77
    model = ours(theirs, tmp_path)
    for positions, warnings in ((77, 0), (78, 1)):
        Engine(model, None, Tree.chain(0), EngineConfig(num_positions=positions))
        assert len(caplog.records) == warnings
    assert "slots of 78 positions exceed max_position_embeddings = 77" in caplog.text


HOSTILE: list[Any] = [
    None, True, 0, -1, 3, 10**9, 10**400, 1.5, -1e300, float("inf"), float("nan"), "", "x" * 10_000,
    [], [[]], [None, 1], ["mamba"] * 5000, [10**9], {}, {"a": {}}, {"__float__": []},
]  # fmt: skip


@pytest.mark.parametrize(
    "family",
    ["mamba2", "bamba", "granite-moe", "nemotron-3", "falcon-h1-norm", "zamba2", "native",
     "mamba-in-llama", "qwen3-next"],
)  # fmt: skip
def test_any_value_of_any_key_loads_or_is_refused_in_one_line(
    family: str, configs: dict[str, Config]
) -> None:
    refusals = {}
    for path, changed in _mutations(configs[family]):
        try:
            assert 0 < shape_from_config(changed, "x").num_parameters < 1 << 62
        except CheckpointError as err:
            refusals[str(err)] = path
    assert len(refusals) > 100
    assert [
        path for text, path in refusals.items() if len(text) > 400 or not text.isprintable()
    ] == []


def _mutations(config: Config) -> list[tuple[str, Config]]:
    """Return the config with each value replaced, inner objects' values included."""
    found = []
    for key, value in config.items():
        found += [(key, config | {key: hostile}) for hostile in HOSTILE]
        if isinstance(value, dict):
            found += [(f"{key}.{p}", config | {key: inner}) for p, inner in _mutations(value)]
    return found


def test_a_billion_layers_are_refused_before_any_is_made() -> None:
    for name in ("codestral-mamba-7b", "falcon-h1-34b", "bamba-9b-v1", "zamba2-7b"):
        config = PUBLISHED[name].config | {"num_hidden_layers": 10**9}
        with pytest.raises(CheckpointError, match="num_hidden_layers must be from 1 to 1024"):
            shape_from_config(config, name)


def test_the_multiple_of_widths_is_the_kernels_own() -> None:
    assert WIDTH_MULTIPLE == COLUMNS_PER_SUM
