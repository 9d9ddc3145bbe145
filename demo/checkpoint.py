"""The demo pair on disk: Hugging Face folders that hold what the training modules computed."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from modules import DemoModel, Shape
from safetensors.torch import load_file, save as serialise
from torch import Tensor, nn

MAX_BYTES = 16 * 1024 * 1024
CONTEXT_TOKENS = 2048
TOLERANCE = 1e-3
# <|endoftext|> opens and closes every sequence and pads batches.
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

HEAD_PREFIX = "mtp."
DELTA_HEAD = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
DELTA_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
HEAD_CONFIG = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "mlp"]}

TARGET = Shape(
    vocab=4096, hidden=256, layers=8, heads=8, head_dim=64, state=64, attention=(3, 7),
    attention_heads=4, kv_heads=2, intermediate=384,
)  # fmt: skip
DELTA = Shape(
    vocab=4096, hidden=256, layers=8, heads=6, head_dim=64, state=64, attention=(3, 7),
    attention_heads=4, kv_heads=2, intermediate=384, key_heads=2,
)  # fmt: skip
DRAFT = Shape(vocab=4096, hidden=128, layers=3, heads=4, head_dim=64, state=64)


def tiny(shape: Shape) -> Shape:
    """Return a shape of the same kind that a CPU trains in a moment."""
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "head_dim": 16, "state": 8}
    if not shape.intermediate:
        return replace(shape, **sizes)
    if shape.key_heads:
        sizes |= {"key_heads": 2, "attention_heads": 2, "kv_heads": 1}
    return replace(shape, **sizes, attention=(1,), intermediate=48)


def hf_config(shape: Shape) -> dict[str, Any]:
    """Return config.json's content for a shape, made by transformers' own config classes."""
    from transformers import BambaConfig, Mamba2Config, Qwen3_5TextConfig

    shared = {**SPECIAL, "vocab_size": shape.vocab, "hidden_size": shape.hidden}
    shared |= {"num_hidden_layers": shape.layers, "tie_word_embeddings": True}
    if shape.key_heads:
        config: Any = Qwen3_5TextConfig(
            **shared, intermediate_size=shape.intermediate, rms_norm_eps=1e-6,
            layer_types=layer_types(shape), num_attention_heads=shape.attention_heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.hidden // shape.attention_heads,
            linear_num_key_heads=shape.key_heads, linear_num_value_heads=shape.heads,
            linear_key_head_dim=shape.state, linear_value_head_dim=shape.head_dim,
            linear_conv_kernel_dim=shape.conv, max_position_embeddings=CONTEXT_TOKENS,
            rope_parameters=DELTA_ROPE,
        )  # fmt: skip
    elif shape.intermediate:
        config = BambaConfig(
            **shared, intermediate_size=shape.intermediate,
            attn_layer_indices=list(shape.attention), num_attention_heads=shape.attention_heads,
            num_key_value_heads=shape.kv_heads, mamba_n_heads=shape.heads,
            mamba_d_head=shape.head_dim, mamba_d_state=shape.state, mamba_n_groups=1,
            mamba_d_conv=shape.conv, mamba_expand=shape.inner // shape.hidden,
            mamba_conv_bias=True, mamba_proj_bias=False, max_position_embeddings=CONTEXT_TOKENS,
            rms_norm_eps=1e-5,
        )  # fmt: skip
    else:
        config = Mamba2Config(
            **shared, num_heads=shape.heads, head_dim=shape.head_dim, state_size=shape.state,
            n_groups=1, expand=shape.inner // shape.hidden, conv_kernel=shape.conv,
            use_conv_bias=True, use_bias=False, layer_norm_epsilon=1e-5,
        )  # fmt: skip
    name = "BambaForCausalLM" if shape.intermediate else "Mamba2ForCausalLM"
    name = "Qwen3_5ForCausalLM" if shape.key_heads else name
    content = {**config.to_dict(), "architectures": [name], "dtype": "bfloat16"}
    if shape.key_heads:
        content |= DELTA_HEAD
    # Its default, no limit, is infinite, which versions write to JSON in different ways.
    content.pop("time_step_limit", None)
    return content


def layer_types(shape: Shape) -> list[str]:
    """Return what each layer of a hybrid is."""
    return [
        "full_attention" if index in shape.attention else "linear_attention"
        for index in range(shape.layers)
    ]


def shape_of(config: dict[str, Any]) -> Shape:
    """Return the shape that a config.json written by `hf_config` describes."""
    shared = {"vocab": config["vocab_size"], "hidden": config["hidden_size"]}
    shared["layers"] = config["num_hidden_layers"]
    if config["model_type"] == "mamba2":
        return Shape(
            **shared, heads=config["num_heads"], head_dim=config["head_dim"],
            state=config["state_size"], conv=config["conv_kernel"],
        )  # fmt: skip
    if config["model_type"] == "qwen3_5_text":
        kinds = enumerate(config["layer_types"])
        return Shape(
            **shared, heads=config["linear_num_value_heads"],
            head_dim=config["linear_value_head_dim"], state=config["linear_key_head_dim"],
            conv=config["linear_conv_kernel_dim"], key_heads=config["linear_num_key_heads"],
            attention=tuple(index for index, kind in kinds if kind == "full_attention"),
            kv_heads=config["num_key_value_heads"], intermediate=config["intermediate_size"],
            attention_heads=config["num_attention_heads"],
        )  # fmt: skip
    return Shape(
        **shared, heads=config["mamba_n_heads"], head_dim=config["mamba_d_head"],
        state=config["mamba_d_state"], conv=config["mamba_d_conv"],
        attention=tuple(config["attn_layer_indices"]), kv_heads=config["num_key_value_heads"],
        attention_heads=config["num_attention_heads"], intermediate=config["intermediate_size"],
    )  # fmt: skip


def save(folder: Path, model: DemoModel, record: dict[str, Any], tokenizer: str = "") -> None:
    """Write a model folder in bf16, whole or not at all; ValueError above MAX_BYTES."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights: dict[str, Tensor] = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    data = serialise(weights, metadata={"format": "pt"})
    if len(data) > MAX_BYTES:
        raise ValueError(f"a demo model may have {MAX_BYTES} bytes, it has {len(data)}; shrink it")
    (temporary / "model.safetensors").write_bytes(data)
    for name, content in (("config.json", hf_config(model.shape)), ("training.json", record)):
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer:
        (temporary / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


def load(folder: Path) -> DemoModel:
    """Return the fp32 training module with a folder's weights, on the CPU."""
    model = DemoModel(shape_of(load_config(folder)))
    weights = load_file(folder / "model.safetensors")
    own = {n: weight.float() for n, weight in weights.items() if not n.startswith(HEAD_PREFIX)}
    model.load_state_dict(own)
    return model.eval()


def add_head(folder: Path, head: nn.Module, record: dict[str, Any]) -> None:
    """Add an MTP head to a target's weights, in bf16; the rest of them stays as it is.

    What describes it is a file of its own, so that config.json, and all that was measured of the
    target, stays valid; a config of Qwen's kind names it from the start.
    """
    weights = load_file(folder / "model.safetensors")
    kept = {n: weight for n, weight in weights.items() if not n.startswith(HEAD_PREFIX)}
    own = {
        HEAD_PREFIX + name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in head.state_dict().items()
    }
    data = serialise(kept | own, metadata={"format": "pt"})
    if len(data) > MAX_BYTES:
        raise ValueError(f"a demo model may have {MAX_BYTES} bytes, it has {len(data)}; shrink it")
    temporary = folder / ".model.safetensors.part"
    temporary.write_bytes(data)
    temporary.rename(folder / "model.safetensors")
    files = {"mtp_training.json": record}
    if not load_config(folder).keys() >= DELTA_HEAD.keys():
        files["mtp_config.json"] = HEAD_CONFIG
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    """Return what a folder's training.json says."""
    content: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return content


@torch.no_grad()
def check(folder: Path) -> float:
    """Load a folder in transformers and return the largest relative difference of its logits.

    Compares fp32 logits on a few sequences on the CPU; raises ValueError above TOLERANCE.
    """
    # transformers binds mamba_ssm's GPU kernels when it can import them, and fails on a CPU.
    for package in ("mamba_ssm", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder)
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for tokens in (3, 64, 150):
        ids = torch.randint(0, ours.shape.vocab, (2, tokens), generator=generator)
        ids[:, 0] = SPECIAL["bos_token_id"]
        expected, got = theirs(ids).logits, ours(ids)
        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    if worst > TOLERANCE:
        raise ValueError(f"{folder} may differ from transformers by {TOLERANCE}, it does {worst}")
    return worst
