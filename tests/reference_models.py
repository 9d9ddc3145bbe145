"""Models in plain torch, one token after another, from the formulas.

Independent of the product: Mamba-2 (arXiv:2405.21060) sec. 7 as a recurrence, time steps clamped to
the run-time limit in every pass, attention with rotary positions or none, and the key names of the
published checkpoints. All in float64. Nemotron-H and Zamba2 mixers are here because transformers
takes another limit for them, and the native formats because transformers does not read them.

Shape letters: T tokens, D hidden size, H heads, P head dim, N state dim, W conv width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Config = dict[str, Any]

UNLIMITED = (0.0, math.inf)


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    runs = x.unflatten(-1, (groups, -1))
    return (runs / (runs.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


def time_steps(x_TD: Tensor, w: Weights) -> Tensor:
    """Time steps [T, H] of a mixer before they are clamped."""
    dt = x_TD @ w["in_proj.weight"].T[:, -len(w["dt_bias"]) :]
    return functional.softplus(dt + w["dt_bias"])


def mamba2(
    x_TD: Tensor, w: Weights, sizes: dict[str, int], limit: tuple[float, float] = UNLIMITED
) -> Tensor:
    """Run one mixer; `sizes`: heads, head_dim, state_dim, xb_heads (x and B), c_heads."""
    heads, head_dim, state_dim = sizes["heads"], sizes["head_dim"], sizes["state_dim"]
    inner, shared = heads * head_dim, sizes["xb_heads"]
    sections = [inner, sizes["x_heads"] * head_dim, shared * state_dim]
    sections += [sizes["c_heads"] * state_dim, heads]
    state = torch.zeros(heads, head_dim, state_dim, dtype=torch.float64)
    kernel = w["conv1d.weight"][:, 0]
    window = torch.zeros(len(kernel), kernel.shape[1], dtype=torch.float64)
    decay = -w["A_log"].exp()
    outputs = []
    for row in x_TD @ w["in_proj.weight"].T:
        z, x, b, c, dt = row.split(sections)
        window = torch.cat((window[:, 1:], torch.cat((x, b, c))[:, None]), dim=1)
        mixed = functional.silu((window * kernel).sum(1) + w["conv1d.bias"])
        x, b, c = mixed.split(sections[1:4])
        x_HP = x.view(-1, head_dim).repeat_interleave(heads // sizes["x_heads"], 0)
        b_HN = b.view(-1, state_dim).repeat_interleave(heads // shared, 0)
        c_HN = c.view(-1, state_dim).repeat_interleave(heads // sizes["c_heads"], 0)
        step = functional.softplus(dt + w["dt_bias"]).clamp(*limit)
        grown = (step[:, None] * x_HP)[:, :, None] * b_HN[:, None]
        state = (step * decay).exp()[:, None, None] * state + grown
        y = (state * c_HN[:, None]).sum(2) + w["D"][:, None] * x_HP
        gated = y.flatten() * functional.silu(z)
        outputs.append(rms_norm(gated, w["norm.weight"], 1e-5, sizes["c_heads"]))
    return torch.stack(outputs) @ w["out_proj.weight"].T


def frequencies(config: Config, head_dim: int) -> list[float]:
    """Angles per position, with the stretching of Llama 3.1 where the config asks for it."""
    scaling = config.get("rope_scaling")
    result = []
    for index in range(head_dim // 2):
        angle = config["rope_theta"] ** (-2 * index / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / angle
            first = scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength > first / low:
                angle /= scaling["factor"]
            elif wavelength > first / high:
                smooth = (first / wavelength - low) / (high - low)
                angle = (1 - smooth) * angle / scaling["factor"] + smooth * angle
        result.append(angle)
    return result


def attention(x_TD: Tensor, w: Weights, config: Config) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    angles = torch.zeros(len(x_TD), head_dim // 2, dtype=torch.float64)
    if "rope_theta" in config:
        angles = torch.arange(len(x_TD), dtype=torch.float64)[:, None] * torch.tensor(
            frequencies(config, head_dim), dtype=torch.float64
        )

    def project(name: str, count: int) -> Tensor:
        return (x_TD @ w[f"{name}_proj.weight"].T).view(-1, count, head_dim)

    def turn(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    q, k, v = turn(project("q", heads)), turn(project("k", kv_heads)), project("v", kv_heads)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(head_dim)
    future = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", shares, v).flatten(1) @ w["o_proj.weight"].T


def below(weights: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)}


def native_logits(weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    """Logits [T, V] of a native checkpoint."""
    ssm = config["ssm_cfg"]
    groups = ssm.get("ngroups", 1)
    sizes = {
        "heads": ssm["expand"] * config["d_model"] // ssm["headdim"], "head_dim": ssm["headdim"],
        "state_dim": ssm["d_state"], "xb_heads": groups, "c_heads": groups,
    }  # fmt: skip
    sizes["x_heads"] = sizes["heads"]
    limit = ssm.get("dt_limit", UNLIMITED)
    x = weights["backbone.embedding.weight"][tokens]
    for index in range(config["n_layer"]):
        layer = below(weights, f"backbone.layers.{index}.")
        normed = rms_norm(x, layer["norm.weight"], 1e-5)
        x = x + mamba2(normed, below(layer, "mixer."), sizes, limit)
    return rms_norm(x, weights["backbone.norm_f.weight"], 1e-5) @ weights["lm_head.weight"].T


def mamba_in_llama_logits(
    weights: Weights, config: Config, mamba_config: Config, tokens: Tensor
) -> Tensor:
    """Logits [T, V] of a Mamba-in-Llama checkpoint."""
    eps, ssm = config["rms_norm_eps"], mamba_config["ssm_cfg"]
    sizes = {
        "heads": ssm["ngroups"], "head_dim": ssm["d_state"], "state_dim": ssm["d_state"],
        "xb_heads": mamba_config["d_xb"] // ssm["d_state"], "c_heads": ssm["ngroups"],
    }  # fmt: skip
    sizes["x_heads"] = sizes["xb_heads"]
    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        layer = below(weights, f"model.layers.{index}.")
        normed = rms_norm(x, layer["input_layernorm.weight"], eps)
        if index in mamba_config["attn_layers"]:
            x = x + attention(normed, below(layer, "self_attn."), config)
        else:
            limit = ssm.get("dt_limit", UNLIMITED)
            x = x + mamba2(normed, below(layer, "mamba."), sizes, limit)
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        mlp = below(layer, "mlp.")
        gate = functional.silu(normed @ mlp["gate_proj.weight"].T)
        x = x + (gate * (normed @ mlp["up_proj.weight"].T)) @ mlp["down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


def nemotron_h_logits(weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    """Logits [T, V] of a Nemotron-H checkpoint without experts."""
    eps = config["layer_norm_epsilon"]
    sizes = {
        "heads": config["mamba_num_heads"], "x_heads": config["mamba_num_heads"],
        "head_dim": config["mamba_head_dim"], "state_dim": config["ssm_state_size"],
        "xb_heads": config["n_groups"], "c_heads": config["n_groups"],
    }  # fmt: skip
    x = weights["backbone.embeddings.weight"][tokens]
    for index, letter in enumerate(config["hybrid_override_pattern"]):
        layer = below(weights, f"backbone.layers.{index}.")
        normed, mixer = rms_norm(x, layer["norm.weight"], eps), below(layer, "mixer.")
        if letter == "M":
            x = x + mamba2(normed, mixer, sizes, config["time_step_limit"])
        elif letter == "*":
            x = x + attention(normed, mixer, config)
        else:
            up = (normed @ mixer["up_proj.weight"].T).relu().square()
            x = x + up @ mixer["down_proj.weight"].T
    return rms_norm(x, weights["backbone.norm_f.weight"], eps) @ weights["lm_head.weight"].T
