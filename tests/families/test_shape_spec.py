"""Shape specs: what ships loads, means what was published, and malformed ones are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stree_profiles
import yaml

from stree_core.errors import ConfigError
from stree_core.families.registry import shape_from_config
from stree_core.families.shape_spec import find_shape_spec, load_shape_spec

ROOT = Path(next(iter(stree_profiles.__path__)))
SHEETS = sorted((ROOT / "shapes").glob("*.yaml"))

# Counted by hand from the published extents, a tied LM head once.
#
# mamba2-130m: 24 layers of in_proj (1536 z + 1536 x + 2 * 128 B and C + 24 dt = 3352) * 768
# = 2 574 336, conv 1792 * (4 + 1) = 8960, dt_bias, A_log and D 72, gated norm 1536, out_proj
# 768 * 1536 = 1 179 648, norm 768: 3 765 320 each; embedding 50 288 * 768, final norm 768.
#
# nemotron-h-8b: 24 Mamba2 of 18 560 * 4096 + 10 240 * 5 + 384 + 8192 + 4096 * 8192 + 4096
# = 109 640 064; 24 MLPs of 2 * 4096 * 21 504 + 4096 = 176 164 864; 4 attentions of
# (2 * 4096 + 2 * 1024) * 4096 + 4096 = 41 947 136; two of 131 072 * 4096; final norm 4096.
#
# mamba-in-llama: Llama's own count less its even layers' attention, plus a Mamba2 in each: of 8b
# 8 030 261 248 + 16 * (10 272 * 4096 + 6144 * 5 + 96 + 4096 + 4096 * 4096 - 41 943 040).
#
# mamba2-distilled-small: 2 layers of 2568 * 1024 + 1536 * 5 + 24 + 1024 + 1024 * 1024, MLPs of
# 3 * 2048 * 1024 and two norms; embedding 128 256 * 1024, final norm 1024.
#
# qwen3.5-27b: 48 delta layers of (6144 z + 2 * 2048 q and k + 6144 v + 96) * 5120 + 10 240 * 4 + 96
# + 128 + 6144 * 5120 + 5120 = 115 881 184; 16 attentions of (2 * 6144 + 2 * 1024) * 5120 + 512
# + 6144 * 5120 + 5120 = 104 863 232; 64 MLPs of 3 * 17 408 * 5120 + 5120 = 267 392 000; two of
# 248 320 * 5120; final norm 5120. Experts of qwen3.5-35b-a3b: 257 of 3 * 512 * 2048, the router
# 256 * 2048, the gate 2048 and the norm. The other Qwens likewise.
NUM_PARAMETERS = {
    # as the loader counts; PUBLISHED holds them against their makers' numbers
    "bamba-9b-v2": 9_780_235_392,
    "codestral-mamba-7b": 7_285_403_648,
    "falcon-h1-34b": 33_642_516_224,
    "falcon-h1-7b": 7_585_654_880,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-4.0-h-small": 32_207_337_984,
    "granite-4.0-h-tiny": 6_939_037_248,
    "nemotron-3-nano-30b-a3b": 31_577_940_288,
    "nemotron-3-super-120b-a12b": 120_668_707_840,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "zamba2-7b": 8_433_440_592,
    # by hand
    "granite-4-h-1b": 1_461_538_368,
    "mamba-in-llama-3b": 3_346_305_008,
    "mamba-in-llama-8b": 8_301_352_448,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-130m": 128_989_632,
    "mamba2-2.7b": 2_702_599_680,
    "mamba2-distilled-small": 151_296_048,
    "nemotron-3-nano-mtp": 31_577_940_288,
    "nemotron-h-8b": 8_100_852_736,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-2b": 1_881_825_088,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3.5-4b": 4_205_751_296,
}
# By the makers' own counts or by the sizes of their files.
PUBLISHED = {
    "nemotron-3-nano-30b-a3b": 31.6e9,
    "nemotron-3-super-120b-a12b": 120.6e9,
    "nemotron-nano-9b-v2": 8.89e9,
    "falcon-h1-7b": 7.59e9,
    "falcon-h1-34b": 33.6e9,
    "bamba-9b-v2": 9.78e9,
    "codestral-mamba-7b": 7.29e9,
    "granite-4.0-h-tiny": 6.94e9,
    "granite-4.0-h-small": 32.2e9,
    "granite-4.0-h-micro": 3.19e9,
    # with every copy of the shared blocks' adapters merged; the makers count 7.36e9
    "zamba2-7b": 8.43e9,
    "mamba-in-llama-8b": 33.2e9 / 4,
    "mamba2-1.3b": 1.34e9,
    "mamba2-130m": 129e6,
    "mamba2-2.7b": 2.70e9,
    "nemotron-h-8b": 8.10e9,
}


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside nested mappings and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_every_sheet_is_counted() -> None:
    assert [path.stem for path in SHEETS] == sorted(NUM_PARAMETERS)


@pytest.mark.parametrize("path", SHEETS, ids=lambda path: path.stem)
def test_shipped_sheets_give_the_published_model(path: Path) -> None:
    spec = load_shape_spec(path)
    assert spec.name == path.stem
    shape = shape_from_config(spec.config_dict, spec.name)
    assert shape.num_parameters == NUM_PARAMETERS[spec.name]
    published = PUBLISHED.get(spec.name, NUM_PARAMETERS[spec.name])
    assert shape.num_parameters == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("path", SHEETS, ids=lambda path: path.stem)
def test_no_number_was_read_as_text(path: Path) -> None:
    # YAML takes 1e-05 for a word: it wants 1.0e-05.
    for leaf in leaves(load_shape_spec(path).config_dict):
        assert not (isinstance(leaf, str) and leaf[:1].isdigit()), leaf


def test_layers_of_one_kind_each() -> None:
    spec = load_shape_spec(ROOT / "shapes" / "nemotron-h-8b.yaml")
    pattern = str(spec.config["hybrid_override_pattern"])
    assert len(pattern) == spec.config["num_hidden_layers"]
    assert [pattern.count(kind) for kind in "M-*"] == [24, 24, 4]


def test_the_second_file_goes_under_its_key() -> None:
    spec = load_shape_spec(ROOT / "shapes" / "mamba-in-llama-3b.yaml")
    merged = spec.config_dict
    assert merged["mamba_config"] == spec.mamba_config
    assert {key: value for key, value in merged.items() if key != "mamba_config"} == spec.config
    merged["mamba_config"]["attn_layers"].clear()
    assert spec.config_dict["mamba_config"]["attn_layers"] == list(range(1, 28, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": "x"}, r"unknown key nam; did you mean name\?"),
        ({"name": None}, "name: "),
        ({"kind": "stree-gpu"}, "kind: "),
        ({"schema_version": 2}, "schema_version: "),
        ({"sources": []}, "sources: "),
        ({"sources": ["x" * 501]}, r"sources\.0: "),
        ({"config": {}}, "config: "),
        ({"config": {str(number): 0 for number in range(201)}}, "config: "),
        ({"config": {"model_type": "llama", "mamba_config": {}}}, "stands beside config"),
        ({"config": {"model_type": "mamba2"}, "mamba_config": {"d_xb": 1}}, "belongs to .* llama"),
        ({"note": ""}, "note: "),
    ],
)
def test_malformed_sheets(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = {
        "schema_version": 1, "kind": "stree-shape", "name": "x", "sources": ["a"],
        "config": {"model_type": "mamba2"},
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_shape_spec(path).note is None
    path.write_text(yaml.safe_dump(content | changes))
    with pytest.raises(ConfigError, match=message):
        load_shape_spec(path)


def test_sheets_are_found_by_name_in_the_first_root(tmp_path: Path) -> None:
    own = tmp_path / "shapes" / "mamba2-130m.yaml"
    own.parent.mkdir()
    own.write_text("x")
    assert find_shape_spec([tmp_path, ROOT], "mamba2-130m") == own
    assert find_shape_spec([tmp_path, ROOT], "mamba2-2.7b") == ROOT / "shapes" / "mamba2-2.7b.yaml"
    assert find_shape_spec([tmp_path], "mamba2-2.7b") is None
    assert find_shape_spec([], "mamba2-130m") is None


@pytest.mark.parametrize("name", ["../shapes/mamba2-130m", "", "/etc/x", "a/b", ".x", "x\n"])
def test_names_cannot_leave_their_folder(name: str) -> None:
    assert find_shape_spec([ROOT], name) is None


def test_specs_of_qwens_have_the_head_of_their_checkpoints() -> None:
    """Of 27B by hand: 2 * 5120 * 5120 + 2 * 5120, one attention layer, one MLP and a norm."""
    heads = {
        path.stem: shape_from_config(load_shape_spec(path).config_dict, path.stem).mtp
        for path in SHEETS
        if path.stem.startswith("qwen")
    }
    assert len(heads) == 6
    assert heads["qwen3.5-27b"] is not None
    assert heads["qwen3.5-27b"].num_parameters == 424_699_392
    assert None not in heads.values()


def test_a_section_describes_a_head_that_the_model_has_not() -> None:
    """As many weights as Nemotron 3.5 Lightning's head is published to have, 1.34 billion."""
    spec = load_shape_spec(ROOT / "shapes" / "nemotron-3-nano-mtp.yaml")
    shape = shape_from_config(spec.config_dict, spec.name)
    assert shape.mtp is not None
    assert shape.mtp.num_parameters == 1_335_325_952
    published = shape_from_config(spec.config, spec.name)
    assert published.mtp is None
    assert published.digest == shape.digest
    without = load_shape_spec(ROOT / "shapes" / "nemotron-h-8b.yaml")
    assert shape_from_config(without.config_dict, without.name).mtp is None
