"""Tiny models with MTP heads, and a head in plain torch, written from the published formulas.

Sources of the formulas: vLLM's nemotron_h_mtp.py, Megatron-LM's multi_token_prediction.py. A row is
(hidden state at p, token at p + 1); the head is run anew on all rows of a path, without a cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bamba, tiny_nemotron_h, tiny_qwen3_5, tiny_qwen3_next
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stree_core.drafting.pair import Pair, Runtime, load_with_head
from stree_core.models.source import folder_source

FAULTS = (
    "halves swapped",
    "hidden state before the final norm",
    "norms zero-centred",
    "first residual is the hidden state",
    "no final norm between depths",
)
"""What others got wrong; a reference with one of them must draft otherwise."""


NEMOTRON_KEYS = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
BAMBA_KEYS = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "mlp"]}


@dataclass(frozen=True)
class HeadedModel:
    """A model whose checkpoint has a head: on disk, in transformers, and in our own form."""

    folder: Path
    theirs: PreTrainedModel
    pair: Pair


def nemotron_with_head(folder: Path, *, latent: int | None = None, seed: int = 0) -> HeadedModel:
    """Make a Nemotron 3 with a head of attention and experts."""
    settings = {} if latent is None else {"moe_latent_size": latent}
    model = tiny_nemotron_h(seed=seed, **settings)
    model.save_pretrained(folder)
    _change_config(folder, NEMOTRON_KEYS)
    return _with_head(folder, model, seed)


def bamba_with_head(folder: Path, seed: int = 0) -> HeadedModel:
    """Make a Bamba with a head of attention and an MLP, described in a file of its own."""
    model = tiny_bamba(seed=seed)
    model.save_pretrained(folder)
    (folder / "mtp_config.json").write_text(json.dumps(BAMBA_KEYS))
    return _with_head(folder, model, seed)


def qwen_with_head(
    folder: Path, *, next_generation: bool = False, packed: bool = False, seed: int = 0
) -> HeadedModel:
    """Make a Qwen3.5 with a head of attention and an MLP, or a Qwen3-Next, whose head has experts.

    With `packed` the head's experts are stored as two tensors, as Qwen3.6 has them.
    """
    model = tiny_qwen3_next(seed=seed) if next_generation else tiny_qwen3_5(seed=seed)
    model.save_pretrained(folder)
    if not next_generation:
        _change_config(folder, {"mtp_num_hidden_layers": 1})
    headed = _with_head(folder, model, seed)
    if packed:
        pack_experts(folder)
        return _loaded(folder, model)
    return headed


def pack_experts(folder: Path) -> None:
    """Store the experts of a Qwen head as two tensors, as Qwen3.6 does."""
    weights = load_file(folder / "model.safetensors")
    name = "mtp.layers.0.mlp.experts."
    taken = {key: weights.pop(key) for key in list(weights) if key.startswith(name)}
    numbers = range(len(taken) // 3)
    gates, ups, downs = (
        [taken[f"{name}{n}.{kind}_proj.weight"] for n in numbers] for kind in ("gate", "up", "down")
    )
    pairs = zip(gates, ups, strict=True)
    weights[name + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
    weights[name + "down_proj"] = torch.stack(downs)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _change_config(folder: Path, keys: dict[str, Any]) -> None:
    """Set keys of config.json; transformers writes the layers of a head that is not there."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("mtp_layers_block_type", None)
    path.write_text(json.dumps(config | keys))


def _with_head(folder: Path, model: PreTrainedModel, seed: int) -> HeadedModel:
    add_head(folder, seed)
    return _loaded(folder, model)


def _loaded(folder: Path, model: PreTrainedModel) -> HeadedModel:
    pair = load_with_head(folder_source(folder), Runtime("cpu", "float64"))
    # The grouped product that transformers takes for experts knows no float64.
    model.set_experts_implementation("eager")
    return HeadedModel(folder, model.double(), pair)


def add_head(folder: Path, seed: int = 0) -> None:
    """Add random weights of the head that a folder's config describes."""
    shape = folder_source(folder).shape.mtp
    assert shape is not None
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(100 + seed)
    weights = load_file(folder / "model.safetensors")
    for weight in shape.weights:
        for key in weight.keys:
            if key.startswith("mtp."):
                size = _size_of(key, weight.shape, weight.keys, config)
                weights[key] = _drawn(key, size, generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _size_of(
    key: str, shape: tuple[int, ...], keys: tuple[str, ...], config: dict[str, Any]
) -> tuple[int, ...]:
    """Return the size of one of the tensors that are stacked to a weight."""
    if len(keys) == 1:
        return shape
    if len(shape) == 3:
        return (shape[1] * shape[0] // len(keys), shape[2])
    if "_proj" in key and "q_proj" in keys[0]:
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        heads = "num_attention_heads" if "q_proj" in key else "num_key_value_heads"
        # Beside its queries a head of Qwen's has a gate.
        gated = "q_proj" in key and config["model_type"].startswith("qwen")
        return (head * config[heads] * (2 if gated else 1), shape[1])
    return (shape[0] // len(keys), shape[1])


def _drawn(key: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(size, generator=generator)
    if key.endswith("norm.weight"):
        return 1 + 0.4 * values
    return (0.2 if key.endswith("bias") else 1.5 * size[-1] ** -0.5) * values


@dataclass
class ReferenceHead:
    """A head in plain torch, on the CPU in float64; `fault` is one of FAULTS or empty."""

    folder: Path
    fault: str = ""
    position_shift: int = 0
    weights: dict[str, Tensor] = field(init=False)
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        loaded = load_file(self.folder / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in loaded.items()}
        self.config = json.loads((self.folder / "config.json").read_text())

    @property
    def is_bamba(self) -> bool:
        return self.config["model_type"] == "bamba"

    @property
    def eps(self) -> float:
        key = "rms_norm_eps" if self.is_bamba else "layer_norm_epsilon"
        return float(self.config[key])

    def __call__(self, hidden_ND: Tensor, tokens_N: Sequence[int]) -> Tensor:
        """Return the head's output after its last row."""
        w = self.weights
        embed = w["model.embed_tokens.weight" if self.is_bamba else _embed_key(w)]
        first, last = "mtp.layers.0.", "mtp.layers.1."
        e = self._norm(embed[torch.tensor(tokens_N)], first + "enorm.weight")
        h = self._norm(hidden_ND, first + "hnorm.weight")
        both = (h, e) if self.fault == "halves swapped" else (e, h)
        x = torch.cat(both, -1) @ w[first + "eh_proj.weight"].T
        inner = self._attention(self._norm(x, first + "norm.weight"), first + "mixer.")
        x = inner + (hidden_ND if self.fault == "first residual is the hidden state" else x)
        read = self._norm(x, last + "norm.weight")
        x = x + (self._mlp(read) if self.is_bamba else self._experts(read, last + "mixer."))
        return self._norm(x, last + "final_layernorm.weight")[-1]

    def unnormed(self, y_D: Tensor) -> Tensor:
        """Return what is handed to the next depth where the final norm is forgotten."""
        return y_D / self.weights["mtp.layers.1.final_layernorm.weight"]

    def logits(self, y_D: Tensor) -> Tensor:
        w = self.weights
        head = w.get("lm_head.weight", w.get("model.embed_tokens.weight"))
        assert head is not None
        return head @ y_D

    def _norm(self, x: Tensor, key: str) -> Tensor:
        weight = self.weights[key]
        if self.fault == "norms zero-centred":
            weight = 1 + weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight

    def _attention(self, x_ND: Tensor, prefix: str) -> Tensor:
        heads, kv_heads = (self.config[f"num_{n}_heads"] for n in ("attention", "key_value"))
        q, k, v = (
            (x_ND @ self.weights[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (count, -1))
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if self.is_bamba:
            q, k = self._rotated(q), self._rotated(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        distribution = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hnm,mhd->nhd", distribution, v).flatten(1)
        return mixed @ self.weights[prefix + "o_proj.weight"].T

    def _rotated(self, x_NHD: Tensor) -> Tensor:
        """Bamba rotates the first half of every head; the last row may be put elsewhere."""
        width = x_NHD.shape[-1] // 2
        position = torch.arange(len(x_NHD)).double()
        position[-1] += self.position_shift
        angles = position[:, None] * 10000.0 ** -(torch.arange(0, width, 2).double() / width)
        cos, sin = (f(angles)[:, None].repeat(1, 1, 2) for f in (torch.cos, torch.sin))
        turning, rest = x_NHD[..., :width], x_NHD[..., width:]
        low, high = turning.chunk(2, -1)
        return torch.cat((turning * cos + torch.cat((-high, low), -1) * sin, rest), -1)

    def _mlp(self, x_ND: Tensor) -> Tensor:
        gate, up, down = (
            self.weights[f"mtp.layers.1.mixer.{name}_proj.weight"]
            for name in ("gate", "up", "down")
        )
        return (functional.silu(x_ND @ gate.T) * (x_ND @ up.T)) @ down.T

    def _experts(self, x_ND: Tensor, prefix: str) -> Tensor:
        """Sigmoid router whose bias changes the choice alone; ungated relu^2; a shared expert."""
        w, c = self.weights, self.config
        score_NE = (x_ND @ w[prefix + "gate.weight"].T).sigmoid()
        wanted_NE = score_NE + w[prefix + "gate.e_score_correction_bias"]
        groups_NGE = wanted_NE.unflatten(-1, (c["n_group"], -1))
        group_NG = groups_NGE.topk(2, -1).values.sum(-1)
        open_NG = torch.zeros_like(group_NG).scatter(1, group_NG.topk(c["topk_group"]).indices, 1.0)
        closed = (open_NG == 0).repeat_interleave(groups_NGE.shape[-1], -1)
        choice_NC = wanted_NE.masked_fill(closed, 0.0).topk(c["num_experts_per_tok"]).indices
        share_NC = score_NE.gather(1, choice_NC)
        if c["norm_topk_prob"]:
            share_NC = share_NC / (share_NC.sum(-1, keepdim=True) + 1e-20)
        share_NC = share_NC * c["routed_scaling_factor"]
        inner_ND = x_ND
        if c.get("moe_latent_size"):
            inner_ND = x_ND @ w[prefix + "fc1_latent_proj.weight"].T
        out = torch.zeros_like(inner_ND)
        for row, (choice_C, share_C) in enumerate(zip(choice_NC.tolist(), share_NC, strict=True)):
            for expert, share in zip(choice_C, share_C, strict=True):
                name = f"{prefix}experts.{expert}."
                up = (inner_ND[row] @ w[name + "up_proj.weight"].T).relu().square()
                out[row] += share * (up @ w[name + "down_proj.weight"].T)
        if c.get("moe_latent_size"):
            out = out @ w[prefix + "fc2_latent_proj.weight"].T
        up = (x_ND @ w[prefix + "shared_experts.up_proj.weight"].T).relu().square()
        return out + up @ w[prefix + "shared_experts.down_proj.weight"].T


def reference_head(folder: Path, fault: str = "", shift: int = 0) -> ReferenceHead:
    """Return the plain head of a folder's family."""
    config = json.loads((folder / "config.json").read_text())
    kind = QwenHead if config["model_type"].startswith("qwen") else ReferenceHead
    return kind(folder, fault, shift)


QWEN_FAULTS = (
    "halves swapped",
    "hidden state before the final norm",
    "norms not zero-centred",
    "no final norm between depths",
    "gate through silu",
    "queries and gates split flat",
    "heads not normed",
    "whole head rotated",
)
"""The same for a head of Qwen's."""


class QwenHead(ReferenceHead):
    """A head of Qwen3-Next or Qwen3.5; sources are vLLM's qwen3_next_mtp.py and qwen3_next.py."""

    @property
    def eps(self) -> float:
        return float(self.config["rms_norm_eps"])

    def __call__(self, hidden_ND: Tensor, tokens_N: Sequence[int]) -> Tensor:
        """Return the head's output after its last row."""
        w, layer = self.weights, "mtp.layers.0."
        embed = w["model.embed_tokens.weight"]
        e = self._norm(embed[torch.tensor(tokens_N)], "mtp.pre_fc_norm_embedding.weight")
        h = self._norm(hidden_ND, "mtp.pre_fc_norm_hidden.weight")
        both = (h, e) if self.fault == "halves swapped" else (e, h)
        x = torch.cat(both, -1) @ w["mtp.fc.weight"].T
        x = x + self._attention(self._norm(x, layer + "input_layernorm.weight"), layer)
        read = self._norm(x, layer + "post_attention_layernorm.weight")
        experts = "mtp.layers.0.mlp.gate.weight" in w
        x = x + (self._routed(read) if experts else self._gated(read, layer + "mlp."))
        return self._norm(x, "mtp.norm.weight")[-1]

    def unnormed(self, y_D: Tensor) -> Tensor:
        """Return what is handed to the next depth where the final norm is forgotten."""
        return y_D / (1 + self.weights["mtp.norm.weight"])

    def _norm(self, x: Tensor, key: str) -> Tensor:
        centre = 0 if self.fault == "norms not zero-centred" else 1
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return scaled * (centre + self.weights[key])

    def _attention(self, x_ND: Tensor, prefix: str) -> Tensor:
        heads, kv_heads = (self.config[f"num_{n}_heads"] for n in ("attention", "key_value"))
        name = prefix + "self_attn."
        both, k, v = (x_ND @ self.weights[f"{name}{n}_proj.weight"].T for n in "qkv")
        if self.fault == "queries and gates split flat":
            q, gate = (part.unflatten(-1, (heads, -1)) for part in both.chunk(2, -1))
        else:
            q, gate = both.unflatten(-1, (heads, -1)).chunk(2, -1)
        k, v = (part.unflatten(-1, (kv_heads, -1)) for part in (k, v))
        if self.fault != "heads not normed":
            q, k = self._norm(q, name + "q_norm.weight"), self._norm(k, name + "k_norm.weight")
        q, k = self._rotated(q), self._rotated(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        distribution = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hnm,mhd->nhd", distribution, v)
        gate = functional.silu(gate) if self.fault == "gate through silu" else gate.sigmoid()
        return (mixed * gate).flatten(1) @ self.weights[name + "o_proj.weight"].T

    def _rotated(self, x_NHD: Tensor) -> Tensor:
        """A quarter of every head is rotated, as complex numbers here."""
        width = x_NHD.shape[-1] // (1 if self.fault == "whole head rotated" else 4)
        position = torch.arange(len(x_NHD)).double()
        position[-1] += self.position_shift
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = position[:, None] * theta ** -(torch.arange(0, width, 2).double() / width)
        low, high, rest = x_NHD.tensor_split((width // 2, width), -1)
        turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag, rest), -1)

    def _gated(self, x_ND: Tensor, prefix: str) -> Tensor:
        gate, up, down = (
            self.weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return (functional.silu(x_ND @ gate.T) * (x_ND @ up.T)) @ down.T

    def _routed(self, x_ND: Tensor) -> Tensor:
        """The softmax of all experts, of the best ones alone, and a shared one behind a gate."""
        w, name = self.weights, "mtp.layers.0.mlp."
        score_NE = (x_ND @ w[name + "gate.weight"].T).softmax(-1)
        share_NC, choice_NC = score_NE.topk(self.config["num_experts_per_tok"])
        share_NC = share_NC / share_NC.sum(-1, keepdim=True)
        gate_N1 = (x_ND @ w[name + "shared_expert_gate.weight"].T).sigmoid()
        out = gate_N1 * self._gated(x_ND, name + "shared_expert.")
        for row, (choice_C, share_C) in enumerate(zip(choice_NC.tolist(), share_NC, strict=True)):
            for expert, share in zip(choice_C, share_C, strict=True):
                out[row] += share * self._expert(x_ND[row], name + "experts.", expert)
        return out

    def _expert(self, x_D: Tensor, prefix: str, expert: int) -> Tensor:
        w = self.weights
        if prefix + "down_proj" in w:
            gate, up = w[prefix + "gate_up_proj"][expert].chunk(2)
            return w[prefix + "down_proj"][expert] @ (functional.silu(gate @ x_D) * (up @ x_D))
        return self._gated(x_D, f"{prefix}{expert}.")


def _embed_key(weights: dict[str, Tensor]) -> str:
    return next(
        key for key in weights if key.endswith("embeddings.weight") or "embed_tokens" in key
    )


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: Sequence[int], *, normed: bool = True) -> Tensor:
    """Return transformers' hidden states [N, D] of a text, after the final norm or before it."""
    seen: list[Tensor] = []
    body = model.base_model
    names = ("norm_f", "final_layernorm", "norm")
    norm = next(getattr(body, name) for name in names if hasattr(body, name))
    hook = norm.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    body(torch.tensor([list(tokens)]), use_cache=False)
    hook.remove()
    return seen[1 if normed else 0][0].double()
