"""The demo models' training modules, with the parameter names that transformers writes.

Legend: B batch, T tokens, H heads, P head dim, N state dim, C chunks, Q tokens in a chunk.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64
EPS = 1e-5
ROPE_THETA = 10_000.0
# Bamba rotates the first half of every head's dimensions.
ROTARY_FRACTION = 0.5

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model; `attention` names the layers that attend, the others are Mamba2.

    With `key_heads` they are gated delta rule layers of so many heads of q and k, `heads` of v,
    whose widths are `state` and `head_dim`.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    state: int
    attention: tuple[int, ...] = ()
    attention_heads: int = 0
    kv_heads: int = 0
    # 0 means no MLP: then the model is a plain Mamba2.
    intermediate: int = 0
    conv: int = 4
    key_heads: int = 0

    @property
    def inner(self) -> int:
        """Channels inside a mixer."""
        return self.heads * self.head_dim


def ssd_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
) -> Tensor:
    """Run the SSD recurrence from a zero state in chunks; dt is raw, B and C serve all heads.

    Returns y_BTHP, the skip D x included. Differentiable in every argument.
    Source: Mamba-2 (arXiv:2405.21060) sec. 6.
    """
    batch, tokens, heads, head_dim = x_BTHP.shape
    pad = -tokens % CHUNK
    d_BTH = F.softplus(dt_BTH.float() + dt_bias_H)
    dx_BTHP = x_BTHP * d_BTH[..., None].to(x_BTHP.dtype)
    # A padded token has zero x and zero decay, so it neither adds to the state nor shrinks it.
    log_BTH = F.pad(d_BTH * A_H, (0, 0, 0, pad))
    cum_BCHQ = log_BTH.unflatten(1, (-1, CHUNK)).cumsum(2).transpose(2, 3)
    v_BCHQP = F.pad(dx_BTHP, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3)
    b_BCQN = F.pad(B_BTN, (0, 0, 0, pad)).unflatten(1, (-1, CHUNK))
    c_BCQN = F.pad(C_BTN, (0, 0, 0, pad)).unflatten(1, (-1, CHUNK))

    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x_BTHP.device).triu(1)
    score_BCQQ = c_BCQN @ b_BCQN.transpose(-1, -2)
    gap_BCHQQ = (cum_BCHQ[..., :, None] - cum_BCHQ[..., None, :]).masked_fill(later, -math.inf)
    y_BCHQP = (score_BCQQ[:, :, None] * gap_BCHQQ.exp().to(score_BCQQ.dtype)) @ v_BCHQP

    left_BCHQ = (cum_BCHQ[..., -1:] - cum_BCHQ).exp().to(v_BCHQP.dtype)
    own_BCHPN = (v_BCHQP * left_BCHQ[..., None]).transpose(-1, -2) @ b_BCQN[:, :, None]
    start_BCHPN = _states_before(own_BCHPN, cum_BCHQ[..., -1])
    carried_BCHQP = c_BCQN[:, :, None] @ start_BCHPN.transpose(-1, -2).to(c_BCQN.dtype)
    y_BCHQP = y_BCHQP + carried_BCHQP * cum_BCHQ.exp()[..., None].to(v_BCHQP.dtype)
    y_BTHP = y_BCHQP.transpose(2, 3).reshape(batch, tokens + pad, heads, head_dim)[:, :tokens]
    return y_BTHP + x_BTHP * D_H[:, None].to(x_BTHP.dtype)


def _states_before(own_BCHPN: Tensor, total_BCH: Tensor) -> Tensor:
    """Return the state at each chunk's start from each chunk's own contribution."""
    state = torch.zeros_like(own_BCHPN[:, 0])
    before = []
    for chunk in range(own_BCHPN.shape[1]):
        before.append(state)
        decay = total_BCH[:, chunk].exp().to(own_BCHPN.dtype)[..., None, None]
        state = state * decay + own_BCHPN[:, chunk]
    return torch.stack(before, 1)


def mamba_ssm_scan() -> Scan:
    """Return mamba_ssm's Triton scan behind `ssd_scan`'s signature; raises ImportError."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("--scan mamba-ssm needs the package mamba_ssm; install it or drop it")
    # Its __init__ imports a CUDA extension that the Triton kernels do not need.
    stub = types.ModuleType("mamba_ssm")
    stub.__path__ = list(found.submodule_search_locations)
    sys.modules["mamba_ssm"] = stub
    combined = importlib.import_module(
        "mamba_ssm.ops.triton.ssd_combined"
    ).mamba_chunk_scan_combined

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, b: Tensor) -> Any:
        dt = dt.to(x.dtype)
        groups = {"B": B[:, :, None], "C": C[:, :, None], "D": D, "dt_bias": b}
        return combined(x, dt, A, chunk_size=CHUNK, dt_softplus=True, **groups)

    return scan


class RMSNorm(nn.Module):
    """Root-mean-square norm; with a gate it norms x * silu(gate)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        dtype, x = x.dtype, x.float()
        if gate is not None:
            x = x * F.silu(gate.float())
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight).to(dtype)


class Mixer(nn.Module):
    """The Mamba2 mixer: projection, causal depthwise conv, scan, gated norm, projection."""

    def __init__(self, shape: Shape, scan: Scan) -> None:
        super().__init__()
        self.shape, self.scan = shape, scan
        channels = shape.inner + 2 * shape.state
        self.in_proj = nn.Linear(shape.hidden, shape.inner + channels + shape.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, shape.conv, groups=channels)
        self.norm = RMSNorm(shape.inner)
        self.out_proj = nn.Linear(shape.inner, shape.hidden, bias=False)
        # The usual Mamba2 start: decay rates 1 to 16, step sizes 0.001 to 0.1.
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(shape.heads))
        step = torch.empty(shape.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())

    def forward(self, hidden: Tensor) -> Tensor:
        shape = self.shape
        sizes = [shape.inner, shape.inner + 2 * shape.state, shape.heads]
        gate, xbc, dt = self.in_proj(hidden).split(sizes, -1)
        padded = F.pad(xbc, (0, 0, shape.conv - 1, 0))
        taps = self.conv1d.weight[:, 0].to(xbc.dtype).unbind(-1)
        mixed = self.conv1d.bias.to(xbc.dtype)  # type: ignore[union-attr]
        for offset, tap in enumerate(taps):
            mixed = torch.addcmul(mixed, padded[:, offset : offset + xbc.shape[1]], tap)
        x, b, c = F.silu(mixed).split([shape.inner, shape.state, shape.state], -1)
        x = x.unflatten(-1, (shape.heads, shape.head_dim))
        y = self.scan(x, dt, -self.A_log.float().exp(), b, c, self.D, self.dt_bias)
        return self.out_proj(self.norm(y.flatten(-2), gate))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions on half of each head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.attention_heads
        kv_size = shape.kv_heads * self.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def heads(self, hidden: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, heads, T, dim] from position `first` on."""
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, first), rotate(k, first)
        repeats = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.heads(hidden)
        return self.out(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def out(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Return the output of mixed values [B, heads, T, dim]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


def rotate(heads: Tensor, first: int = 0, fraction: float = ROTARY_FRACTION) -> Tensor:
    """Return heads[B, heads, T, dim] with rotary positions on the first part of dim."""
    size = int(heads.shape[-1] * fraction)
    exponents = torch.arange(0, size, 2, device=heads.device).float() / size
    positions = first + torch.arange(heads.shape[2], device=heads.device).float()
    angles = (positions[:, None] * ROPE_THETA**-exponents).repeat(1, 2)
    turning, rest = heads.float()[..., :size], heads[..., size:]
    low, high = turning.chunk(2, -1)
    turned = turning * angles.cos() + torch.cat((-high, low), -1) * angles.sin()
    return torch.cat((turned.to(heads.dtype), rest), -1)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HybridLayer(nn.Module):
    """Bamba's layer: mixer or attention, then the gated MLP, each behind a norm."""

    def __init__(self, shape: Shape, index: int, scan: Scan) -> None:
        super().__init__()
        if index in shape.attention:
            self.self_attn = Attention(shape)
        else:
            self.mamba = Mixer(shape, scan)
        self.attends = index in shape.attention
        self.feed_forward = GatedMLP(shape.hidden, shape.intermediate)
        self.input_layernorm = RMSNorm(shape.hidden)
        self.pre_ff_layernorm = RMSNorm(shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        mixer = self.self_attn if self.attends else self.mamba
        x = x + mixer(self.input_layernorm(x))
        return x + self.feed_forward(self.pre_ff_layernorm(x))


class MambaLayer(nn.Module):
    """Mamba2's layer: the mixer behind a norm."""

    def __init__(self, shape: Shape, scan: Scan) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.hidden)
        self.mixer = Mixer(shape, scan)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class DemoModel(nn.Module):
    """A language model with tied embeddings; logits[B, T, vocab] from token ids[B, T].

    The state dict's keys are transformers' own: "model." for Bamba and Qwen3.5, "backbone." for
    Mamba2.
    """

    def __init__(self, shape: Shape, scan: Scan = ssd_scan) -> None:
        super().__init__()
        self.shape = shape
        embed, body = nn.Embedding(shape.vocab, shape.hidden), nn.Module()
        if shape.key_heads:
            # It imports this module.
            delta = importlib.import_module("delta_model")
            body.embed_tokens = embed
            layers = (delta.DeltaLayer(shape, index) for index in range(shape.layers))
            body.layers, body.norm = nn.ModuleList(layers), delta.CentredNorm(shape.hidden)
            self.model, self._norm = body, "norm"
        elif shape.intermediate:
            body.embed_tokens = embed
            hybrid = [HybridLayer(shape, index, scan) for index in range(shape.layers)]
            body.layers, body.final_layernorm = nn.ModuleList(hybrid), RMSNorm(shape.hidden)
            self.model, self._norm = body, "final_layernorm"
        else:
            body.embeddings = embed
            body.layers = nn.ModuleList(MambaLayer(shape, scan) for _ in range(shape.layers))
            body.norm_f = RMSNorm(shape.hidden)
            self.backbone, self._norm = body, "norm_f"
        self._start(embed)

    def _start(self, embed: nn.Embedding) -> None:
        nn.init.normal_(embed.weight, std=0.02)
        depth = self.shape.layers * (2 if self.shape.intermediate else 1)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and weight is not embed.weight:
                closing = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
                scale = depth**-0.5 if closing else 1.0
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)

    @property
    def body(self) -> Any:
        """The module under transformers' prefix."""
        return self.model if self.shape.intermediate else self.backbone

    def compile_layers(self) -> None:
        """Compile layer by layer: layers of one kind share the compiled code."""
        for layer in self.body.layers:
            layer.compile()

    @property
    def embed(self) -> nn.Embedding:
        """The embedding, which is the LM head as well."""
        found: nn.Embedding = (
            self.body.embed_tokens if self.shape.intermediate else self.body.embeddings
        )
        return found

    def hidden(self, ids: Tensor) -> Tensor:
        """Return hidden states[B, T, hidden] after the final norm."""
        x = self.embed(ids)
        for layer in self.body.layers:
            x = layer(x)
        normed: Tensor = getattr(self.body, self._norm)(x)
        return normed

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.embed.weight)
