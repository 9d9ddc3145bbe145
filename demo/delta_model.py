"""A demo model of Qwen3.5's kind: gated delta rule layers, gated attention, and its MTP head.

Parameter names are those that transformers writes.

Legend: B batch, T tokens, H value heads, G key heads, P value head dim, N key head dim, C chunks,
Q tokens in a chunk, D hidden, R rows (starts).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from head import Drafting
from modules import Attention, GatedMLP, Shape, rotate
from torch import Tensor, nn

CHUNK = 32
EPS = 1e-6
L2_EPS = 1e-6
ROPE_THETA = 10_000.0
ROTATED = 0.25


def delta_rule(
    q_BTHN: Tensor, k_BTHN: Tensor, v_BTHP: Tensor, g_BTH: Tensor, beta_BTH: Tensor
) -> Tensor:
    """Run the gated delta rule from a zero state in chunks, in fp32; q and k are of unit norm.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t / sqrt(N).
    Returns o_BTHP. Differentiable in every argument.
    Source: Gated DeltaNet (arXiv:2412.06464) sec. 3.3.
    """
    tokens, pad = v_BTHP.shape[1], -v_BTHP.shape[1] % CHUNK
    q, k, v = (
        F.pad(x.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3)
        for x in (q_BTHN * q_BTHN.shape[-1] ** -0.5, k_BTHN, v_BTHP)
    )
    # A padded token has beta and decay 0: it neither adds to the state nor shrinks it.
    g, beta = (
        F.pad(x.float(), (0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3)
        for x in (g_BTH, beta_BTH)
    )
    cum = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).triu(1)
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    unit = torch.eye(CHUNK, device=v.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
    values = inverse @ (beta[..., None] * v)
    keys = inverse @ ((beta * cum.exp())[..., None] * k)
    scores = (q @ k.mT) * decay
    faded_q = q * cum.exp()[..., None]
    left_k = k * (cum[..., -1:] - cum).exp()[..., None]
    state, outputs = v.new_zeros(*v[:, 0].shape[:2], k.shape[-1], v.shape[-1]), []
    for chunk in range(v.shape[1]):
        u = values[:, chunk] - keys[:, chunk] @ state
        outputs.append(faded_q[:, chunk] @ state + scores[:, chunk] @ u)
        state = state * cum[:, chunk, :, -1, None, None].exp() + left_k[:, chunk].mT @ u
    return torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, :tokens]


class CentredNorm(nn.Module):
    """Root-mean-square norm whose weight is added to 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + self.weight)).to(
            dtype
        )


class GatedNorm(nn.Module):
    """Root-mean-square norm of a head, then the gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight
        return (x * F.silu(gate.float())).to(gate.dtype)


class DeltaMixer(nn.Module):
    """The gated delta rule mixer: projections, causal depthwise conv, rule, gated norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        keys = shape.key_heads * shape.state
        channels, width = 2 * keys + shape.inner, shape.hidden
        self.in_proj_qkv = nn.Linear(width, channels, bias=False)
        self.in_proj_z = nn.Linear(width, shape.inner, bias=False)
        self.in_proj_b = nn.Linear(width, shape.heads, bias=False)
        self.in_proj_a = nn.Linear(width, shape.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, shape.conv, groups=channels, bias=False)
        self.norm = GatedNorm(shape.head_dim)
        self.out_proj = nn.Linear(shape.inner, width, bias=False)
        # Decays of a token from 0.999 to 0.5 or so: some heads remember a whole text.
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(-5, -0.5))
        self.dt_bias = nn.Parameter(torch.ones(shape.heads))

    def forward(self, hidden: Tensor) -> Tensor:
        shape = self.shape
        qkv = self.in_proj_qkv(hidden)
        padded = F.pad(qkv, (0, 0, shape.conv - 1, 0))
        mixed = torch.zeros_like(qkv)
        for offset, tap in enumerate(self.conv1d.weight[:, 0].to(qkv.dtype).unbind(-1)):
            mixed = torch.addcmul(mixed, padded[:, offset : offset + qkv.shape[1]], tap)
        keys = shape.key_heads * shape.state
        q, k, v = F.silu(mixed).split([keys, keys, shape.inner], -1)
        q, k = (self._of_heads(x.unflatten(-1, (shape.key_heads, -1))) for x in (q, k))
        v = v.unflatten(-1, (shape.heads, -1))
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden).float() + self.dt_bias)
        beta = self.in_proj_b(hidden).float().sigmoid()
        with torch.autocast(hidden.device.type, enabled=False):
            o = delta_rule(q, k, v, g, beta)
        z = self.in_proj_z(hidden).unflatten(-1, (shape.heads, -1))
        return self.out_proj(self.norm(o, z).flatten(-2))

    def _of_heads(self, x_BTGN: Tensor) -> Tensor:
        """Return q or k of unit norm for every value head."""
        x = x_BTGN.float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
        return x.repeat_interleave(self.shape.heads // self.shape.key_heads, 2)


class GatedAttention(Attention):
    """Attention with normed heads, a quarter of each rotated, and a gate on its output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.q_proj = nn.Linear(shape.hidden, 2 * shape.hidden, bias=False)
        self.q_norm, self.k_norm = CentredNorm(self.head_dim), CentredNorm(self.head_dim)

    def heads(self, hidden: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, heads, T, dim] from position `first` on."""
        q, _ = self._queries(hidden)
        k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.k_proj, self.v_proj)
        )
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        q, k = (rotate(x, first, ROTATED) for x in (q, k))
        repeats = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    def out(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Return the output of mixed values [B, heads, T, dim]."""
        _, gate = self._queries(hidden)
        return super().out(hidden, mixed * gate.transpose(1, 2).sigmoid())

    def _queries(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        both = self.q_proj(hidden).unflatten(-1, (-1, 2 * self.head_dim))
        q, gate = both.chunk(2, -1)
        return q, gate


class GatedHeadAttention(Drafting, GatedAttention):
    """The same over the first rows of all starts and the later ones of its own."""


class DeltaLayer(nn.Module):
    """Qwen3.5's layer: mixer or attention, then the gated MLP, each behind a norm."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.attends = index in shape.attention
        if self.attends:
            self.self_attn = GatedAttention(shape)
        else:
            self.linear_attn = DeltaMixer(shape)
        self.mlp = GatedMLP(shape.hidden, shape.intermediate)
        self.input_layernorm = CentredNorm(shape.hidden)
        self.post_attention_layernorm = CentredNorm(shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        mixer = self.self_attn if self.attends else self.linear_attn
        x = x + mixer(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class DeltaHead(nn.Module):
    """Qwen's MTP head: a layer with attention; names are those below `mtp.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, layer = shape.hidden, nn.Module()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = (CentredNorm(width) for _ in range(2))
        self.fc = nn.Linear(2 * width, width, bias=False)
        layer.input_layernorm, layer.post_attention_layernorm = (
            CentredNorm(width) for _ in range(2)
        )
        layer.self_attn = GatedHeadAttention(shape)
        layer.mlp = GatedMLP(width, shape.intermediate)
        self.layers, self.norm = nn.ModuleList((layer,)), CentredNorm(width)

    def forward(
        self, hidden_BRD: Tensor, embed_BRD: Tensor, depth: int, seen: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return what the head makes of rows at one depth."""
        (layer,) = self.layers
        halves = self.pre_fc_norm_embedding(embed_BRD), self.pre_fc_norm_hidden(hidden_BRD)
        x = self.fc(torch.cat(halves, -1))
        x = x + layer.self_attn.draft(layer.input_layernorm(x), depth, seen)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        made: Tensor = self.norm(x)
        return made
