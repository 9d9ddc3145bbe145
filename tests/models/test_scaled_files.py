"""Checkpoints in FP8: what they mean, and which are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_models import CONFIGS, save_fp8
from mtp_models import nemotron_with_head, qwen_with_head
from safetensors.torch import load_file, save_file
from tiny_models import (
    tiny_bamba,
    tiny_falcon_h1,
    tiny_granite,
    tiny_nemotron_h,
    tiny_qwen3_5_moe,
    tiny_qwen3_5_with_vision,
    tiny_qwen3_next,
)
from torch import Tensor

from stree_core.drafting.checkpoint import load_model
from stree_core.drafting.pair import Runtime, load_with_head
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig
from stree_core.engine.stop import StopRule
from stree_core.errors import CheckpointError
from stree_core.models.backend import load_backend
from stree_core.models.cache import CacheSize
from stree_core.models.model import Model
from stree_core.models.row_block import make_block
from stree_core.models.scaled_files import ScaledFiles
from stree_core.models.source import folder_source
from stree_core.tree import DEFAULT_TREE, Tree
from stree_kernels.fp8.scaled_weight import ScaledWeight, StackedWeight

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[], Any]] = {
    "bamba": tiny_bamba,
    "granite-moe": lambda: tiny_granite(num_experts=4),
    "nemotron-3": tiny_nemotron_h,
    "falcon-h1": tiny_falcon_h1,
    "qwen3-next": tiny_qwen3_next,
    "qwen3.5-vision": tiny_qwen3_5_with_vision,
    "qwen3.5-moe": tiny_qwen3_5_moe,
}
TREE = (-1, 0, 0, 1, 1, 2, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives a family's folder in fp32, each written once."""
    root = tmp_path_factory.mktemp("fp8")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            FAMILIES[family]().save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture(scope="module")
def quantised(folders: Callable[[str], Path]) -> Path:
    """Return a folder of a Bamba by blocks."""
    return save_fp8(folders("bamba"), "fp8-block")[0]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(folder_source(folder), load_backend("torch", CPU), dtype, CPU)


def logits(model: Model) -> Tensor:
    """Return the logits of a prompt, row by row, and of a tree behind it."""
    cache = model.make_cache(CacheSize(1, len(TREE), len(TREE), 32))
    block = make_block(TREE, model.conv_widths, CPU)
    tokens = torch.arange(5, 5 + len(TREE))[:, None]
    with torch.inference_mode():
        return model.logits(model.forward(tokens, block, cache, first=0, commit=True))


def copy_with(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None] | None = None,
    **config: Any,
) -> Path:  # fmt: skip
    """Write a folder with other tensors or another quantization_config."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= config
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_numbers_it_means(
    folders: Callable[[str], Path], family: str, kind: str
) -> None:
    stored, meant = save_fp8(folders(family), kind)
    model = load(stored)
    assert any(
        isinstance(getattr(part, name, None), ScaledWeight)
        for block in model.weights.blocks
        for part in block.parts
        for name in ("qkv_proj", "up_proj", "up_EZD", "out_proj")
    )
    if "qwen" in family:
        # Decay and beta are in 32 bits beside a projection in FP8.
        stacks = [getattr(b.parts[0], "in_proj", None) for b in model.weights.blocks]
        kinds = [[type(part) for part in s.parts] for s in stacks if isinstance(s, StackedWeight)]
        assert kinds
        assert all(kind == [ScaledWeight, Tensor] for kind in kinds)
    expected = logits(load(meant))
    difference = (logits(model) - expected).abs().max()
    assert difference < 1e-3 * expected.abs().max()
    # In float64 nothing but the order of factors differs.
    exact = logits(load(stored, torch.float64)), logits(load(meant, torch.float64))
    torch.testing.assert_close(*exact, rtol=1e-9, atol=1e-9)


def test_greedy_text_is_the_same_without_and_with_trees(
    folders: Callable[[str], Path], quantised: Path
) -> None:
    model, plain = load(quantised, torch.float64), load(folders("bamba"), torch.float64)
    prompt = torch.randint(1, 96, (9,), generator=torch.Generator().manual_seed(7)).tolist()
    texts = []
    for tree in (Tree.chain(0), Tree.chain(3), DEFAULT_TREE):
        engine = Engine(model, plain, tree, EngineConfig(num_positions=96))
        run = generate(engine, [prompt], StopRule(64))
        texts.append(run.generations[0].tokens)
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 64
    # The same model in 32 bits drafts for it: longer paths are committed.
    assert run.tokens_per_step > 1.2


@pytest.mark.parametrize("make", [nemotron_with_head, qwen_with_head])
def test_an_mtp_head_is_read_with_its_scales(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "model")
    stored, meant = save_fp8(tmp_path / "model", "fp8-tensor")
    pairs = [load_with_head(folder_source(f), Runtime("cpu", "float64")) for f in (stored, meant)]
    assert pairs[0].draft_ref.weights == "fp8-tensor"
    assert pairs[1].draft_ref.weights is None
    tokens = []
    for pair in pairs:
        engine = Engine(pair.target, pair.draft, Tree.chain(2), EngineConfig(num_positions=96))
        tokens.append(generate(engine, [[5, 6, 7]], StopRule(24)))
    assert tokens[0].generations[0].tokens == tokens[1].generations[0].tokens
    assert tokens[0].tokens_per_step == tokens[1].tokens_per_step

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[first({k: v for k, v in tensors.items() if k[:4] == "mtp."}, "_scale")]

    with pytest.raises(CheckpointError, match=r"mtp\..* is in FP8 and needs"):
        folder_source(copy_with(stored, tmp_path / "other", drop))


def test_the_description_of_a_model_says_how_it_is_stored(
    folders: Callable[[str], Path], quantised: Path
) -> None:
    plain, stored = folder_source(folders("bamba")).shape, folder_source(quantised).shape
    assert plain.fp8 is None
    assert stored.fp8 is not None
    assert stored.fp8.kind == "fp8-block"
    assert stored.digest != plain.digest
    assert stored.num_parameters == plain.num_parameters
    assert stored.weight_bytes(2) < plain.weight_bytes(2) == 2 * plain.weight_bytes(1)
    assert stored.held_bytes(2) < plain.held_bytes(2)


def test_held_bytes_are_those_that_a_model_holds(folders: Callable[[str], Path]) -> None:
    model = load(save_fp8(folders("nemotron-3"), "fp8-block")[0])
    held, largest = 0, 0
    for block in model.weights.blocks:
        for part in block.parts:
            for name in part.__slots__:
                weight = getattr(part, name)
                if isinstance(weight, ScaledWeight):
                    held += weight.codes.numel() + 4 * weight.scales.numel()
                    largest = max(largest, weight.codes.numel() * (weight.codes.ndim == 2))
    shape = model.shape
    values = sum(weight.num_values for weight in shape.projections)
    rest = shape.num_parameters - values
    counted = shape.held_bytes(4)
    assert abs(held + 4 * (rest + largest) - counted) < 0.02 * counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_of_16_bits_are_read_as_the_numbers_they_are(
    folders: Callable[[str], Path], dtype: torch.dtype
) -> None:
    stored, meant = save_fp8(folders("bamba"), "fp8-block", scale_dtype=dtype)
    torch.testing.assert_close(logits(load(stored)), logits(load(meant)), rtol=1e-4, atol=1e-4)


def test_parts_with_scales_of_their_own_are_one_projection(folders: Callable[[str], Path]) -> None:
    stored, meant = save_fp8(folders("bamba"), "fp8-tensor")
    source = folder_source(stored)
    assert source.shape.fp8 is not None
    files = ScaledFiles(stored, "x", CPU, source.shape.fp8, torch.float32)
    tensors, numbers = (
        load_file(stored / "model.safetensors"),
        load_file(meant / "model.safetensors"),
    )
    (qkv, *_) = (p.weights["qkv_proj"] for p in source.shape.parts if "qkv_proj" in p.weights)
    weight = files.read_projection(qkv)
    assert isinstance(weight, ScaledWeight)
    assert len({tensors[f"{key}_scale"].item() for key in qkv.keys}) == 3
    expected = torch.cat([numbers[key] for key in qkv.keys])
    assert torch.equal(weight.dequantised(torch.float64), expected)
    assert torch.equal(weight.dequantised(), expected.float())
    # Nothing is stored as a code that the checkpoint does not hold.
    codes = torch.cat([tensors[key].view(torch.uint8) for key in qkv.keys])
    assert torch.equal(weight.bytes, codes)


def test_a_projection_partly_in_fp8_becomes_a_tensor(
    folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, meant = save_fp8(folders("bamba"), "fp8-channel")
    numbers = load_file(meant / "model.safetensors")

    def keep_v(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("v_proj.weight")]:
            tensors[key] = numbers[key]
            del tensors[f"{key}_scale"]

    with caplog.at_level(logging.INFO):
        mixed = load(copy_with(stored, tmp_path / "mixed", keep_v))
    assert "q_proj.weight is in FP8 and becomes a tensor" in caplog.text
    torch.testing.assert_close(logits(mixed), logits(load(meant)), rtol=1e-4, atol=1e-4)


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return min(key for key in tensors if key.endswith(ending))


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[first(tensors, "q_proj.weight_scale_inv")]


def _rename(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "gate_proj.weight_scale_inv")
    tensors[name.replace("gate_proj", "gate_gate_up_proj")] = tensors.pop(name)


def _twice(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "q_proj.weight_scale_inv")
    tensors[name.removesuffix("_inv")] = tensors[name].clone()


def _misshapen(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "in_proj.weight_scale_inv")
    tensors[name] = tensors[name][:-1].contiguous()


def _bytes(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "in_proj.weight_scale_inv")
    tensors[name] = tensors[name].to(torch.uint8)


def _nvfp4(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "q_proj.weight")
    tensors[name] = tensors[name].view(torch.uint8)
    tensors[f"{name}_scale_2"] = torch.ones(())


def _e5m2(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "q_proj.weight")
    tensors[name] = tensors[name].float().to(torch.float8_e5m2)


def _cast(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "q_proj.weight")
    tensors[name] = tensors[name].float().bfloat16()


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.other.weight_scale_inv"] = torch.ones(1)


def _embedding(tensors: dict[str, Tensor]) -> None:
    name = first(tensors, "embed_tokens.weight")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"q_proj\.weight is in FP8 and needs .*_scale_inv or .*_scale, .* hold neither"),
        (_rename, r"gate_proj\.weight is in FP8 and needs .* hold neither"),
        (_twice, r"needs .*_scale_inv or .*_scale, the files hold both"),
        (_misshapen, r"in_proj\.weight_scale_inv must have shape \(\d+, 2\) for \(\d+, 32\) in"),
        (_bytes, r"in_proj\.weight_scale_inv must be fp32, bf16 or fp16, got U8"),
        (_nvfp4, r"q_proj\.weight must be bf16, fp16, fp32 or FP8 \(e4m3\), got U8, NVFP4"),
        (_e5m2, r"q_proj\.weight must be bf16, .*, got F8_E5M2"),
        (_cast, r"q_proj\.weight is BF16 and takes no scales, but the files hold .*_scale_inv"),
        (_embedding, r"embed_tokens\.weight is in FP8 and needs"),
    ],
)
def test_headers_that_contradict_are_one_sentence(
    quantised: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        folder_source(copy_with(quantised, tmp_path / "other", change))
    assert str(refused.value).count("\n") == 0


def test_a_wrong_block_size_is_refused(quantised: Path, tmp_path: Path) -> None:
    folder = copy_with(quantised, tmp_path / "other", weight_block_size=[16, 32])
    with pytest.raises(CheckpointError, match=r"in fp8-block of blocks \[16, 32\], got"):
        folder_source(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_finite_and_positive(quantised: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, "in_proj.weight_scale_inv")][0, 0] = value

    with pytest.raises(CheckpointError, match="must be finite and above 0, got from"):
        load(copy_with(quantised, tmp_path / "other", spoil))


def test_scales_that_look_inverted_are_said(
    quantised: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def invert(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, "in_proj.weight_scale_inv")].fill_(1000)

    load(copy_with(quantised, tmp_path / "other", invert))
    assert "in_proj.weight_scale_inv reaches 1000" in caplog.text


def test_a_scale_that_nothing_reads_is_refused(quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other\.weight_scale_inv that decoding would ign"):
        load(copy_with(quantised, tmp_path / "other", _stray))


def test_an_excluded_layer_that_is_quantised_is_said(
    quantised: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["lm_head", "model.layers.1.self_attn"]
    folder = copy_with(quantised, tmp_path / "other", modules_to_not_convert=names)
    folder_source(folder)
    assert "layers.1.self_attn" in caplog.text
    assert "is in FP8 although config.json excludes it, as are 4 in all" in caplog.text


def test_scales_of_activations_and_of_a_cache_are_not_needed(
    quantised: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        layer = "model.layers.1.self_attn."
        tensors[f"{layer}q_proj.input_scale"] = torch.ones(())
        tensors[f"{layer}k_proj.k_scale"] = torch.ones(())
        tensors[f"{layer}v_proj.v_scale"] = torch.ones(())

    with caplog.at_level(logging.INFO):
        model = load(copy_with(quantised, tmp_path / "other", add))
    assert torch.equal(logits(model), logits(load(quantised)))
    for pattern in ("*.input_scale (1)", "*.k_scale (1)", "*.v_scale (1)"):
        assert pattern in caplog.text


def test_a_cache_that_is_declared_quantised_is_said(
    folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, _ = save_fp8(folders("bamba"), "fp8-tensor")
    scheme = {"type": "float", "num_bits": 8}
    folder_source(copy_with(stored, tmp_path / "other", kv_cache_scheme=scheme))
    assert "config.json declares a quantised key-value cache" in caplog.text


def test_a_tied_lm_head_is_no_fp8_copy(quantised: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        embed = tensors[first(tensors, "embed_tokens.weight")]
        tensors["lm_head.weight"] = embed.clamp(-1, 1).to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale_inv"] = torch.ones(1, 1)

    with pytest.raises(CheckpointError, match=r"must be a copy|decoding would ignore"):
        load(copy_with(quantised, tmp_path / "other", add))


def test_fp8_without_a_declaration_is_refused(quantised: Path, tmp_path: Path) -> None:
    folder = copy_with(quantised, tmp_path / "other")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"weight_scale_inv and \d+ more that decoding would"):
        load(folder)


def test_files_that_torch_pickled_are_refused(quantised: Path, tmp_path: Path) -> None:
    folder = copy_with(quantised, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="FP8 is read from safetensors files alone"):
        folder_source(folder)
