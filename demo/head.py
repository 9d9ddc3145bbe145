"""An MTP head for the demo target: its module, its loss over several depths, its agreement.

A row p reads the target's hidden state at p and the token at p + 1, and says what comes at p + 2.
Depth d of a start p goes on from what depth d - 1 made of it, with the token at p + 1 + d; it sees
the first rows of all starts up to p, and its own rows since, as it does when it drafts.

Legend: B batch, R rows (starts), D hidden, V vocabulary, H heads, d depth.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import measure
import numpy as np
import torch
import torch.nn.functional as F
from modules import Attention, DemoModel, GatedMLP, RMSNorm, Shape
from optimise import CROSS_ENTROPY_SHARE
from streams import Stream
from torch import Tensor, nn

DEPTH_WEIGHTS = (1.0, 0.8, 0.65, 0.5, 0.4)
"""Of the loss at each depth: the first is drafted in every step."""


class Drafting:
    """Attention over the first rows of all starts and the later ones of its own."""

    head_dim: int
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor, Tensor], Tensor]

    def draft(self, x_BRD: Tensor, depth: int, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the output at one depth; its keys and values are added to `seen`."""
        q, k, v = self.heads(x_BRD, depth)
        seen.append((k, v))
        rows = x_BRD.shape[1]
        first_k, first_v = seen[0]
        scores = q @ first_k[:, :, :rows].transpose(-1, -2)
        later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        parts = [scores.masked_fill(later, -math.inf)]
        parts += [(q * k[:, :, :rows]).sum(-1, keepdim=True) for k, _ in seen[1:]]
        distribution = (torch.cat(parts, -1) * self.head_dim**-0.5).float().softmax(-1).to(v.dtype)
        mixed = distribution[..., :rows] @ first_v[:, :, :rows]
        for place, (_, own_v) in enumerate(seen[1:]):
            mixed = mixed + distribution[..., rows + place, None] * own_v[:, :, :rows]
        return self.out(x_BRD, mixed)


class HeadAttention(Drafting, Attention):
    """The model's attention, to draft."""


class MtpHead(nn.Module):
    """A head of attention and an MLP; names are those of Nemotron's heads, below `mtp.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden
        first, last = nn.Module(), nn.Module()
        first.enorm, first.hnorm, first.norm = (RMSNorm(width) for _ in range(3))
        first.eh_proj = nn.Linear(2 * width, width, bias=False)
        first.mixer = HeadAttention(shape)
        last.norm, last.final_layernorm = RMSNorm(width), RMSNorm(width)
        last.mixer = GatedMLP(width, shape.intermediate)
        self.layers = nn.ModuleList((first, last))

    def forward(
        self, hidden_BRD: Tensor, embed_BRD: Tensor, depth: int, seen: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return what the head makes of rows at one depth."""
        first, last = self.layers
        both = torch.cat((first.enorm(embed_BRD), first.hnorm(hidden_BRD)), -1)
        x = first.eh_proj(both)
        x = x + first.mixer.draft(first.norm(x), depth, seen)
        x = x + last.mixer(last.norm(x))
        made: Tensor = last.final_layernorm(x)
        return made


def make_head(shape: Shape) -> nn.Module:
    """Return a fresh head of the model's kind."""
    if shape.key_heads:
        # It imports this module.
        head: nn.Module = importlib.import_module("delta_model").DeltaHead(shape)
    else:
        head = MtpHead(shape)
    for name, weight in head.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(weight, std=(2 * weight.shape[1]) ** -0.5)
    return head


def drafts(head: nn.Module, target: DemoModel, ids: Tensor, hidden: Tensor) -> list[Tensor]:
    """Return logits [B, R - d, V] of every depth d, given ids [B, T] and the target's states."""
    made, seen, found = hidden, [], []
    for depth in range(len(DEPTH_WEIGHTS)):
        tokens = ids[:, 1 + depth :]
        made = head(made[:, : tokens.shape[1]], target.embed(tokens), depth, seen)
        found.append(F.linear(made, target.embed.weight))
    return found


def head_loss(head: nn.Module, target: DemoModel, rows: Tensor, prompt_weight: float) -> Tensor:
    """Return KL(target || head) with a little cross-entropy over all depths."""
    inputs, labels, weight = measure.split_rows(rows, prompt_weight)
    with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        with torch.no_grad():
            hidden = target.hidden(inputs)
            wanted = F.linear(hidden, target.embed.weight).float().log_softmax(-1)
        found = drafts(head, target, inputs, hidden)
    total = torch.zeros((), device=inputs.device)
    for depth, (logits, share) in enumerate(zip(found, DEPTH_WEIGHTS, strict=True)):
        guess, truth = logits.float().log_softmax(-1), wanted[:, 1 + depth :]
        divergence = (truth.exp() * (truth - guess)).sum(-1)
        own = -guess.gather(-1, labels[:, 1 + depth :, None])[..., 0]
        mixed = (1 - CROSS_ENTROPY_SHARE) * divergence + CROSS_ENTROPY_SHARE * own
        weights = weight[:, 1 + depth :]
        total = total + share * (mixed * weights).sum() / weights.sum()
    return total / sum(DEPTH_WEIGHTS)


@torch.no_grad()
def head_agreement(
    head: nn.Module, target: DemoModel, stream: Stream, device: str, tokens: int, batch: int
) -> list[float]:
    """Return for each depth how often head and target agree on completions, on the true path."""
    if len(stream.starts) == 0:
        return []
    starts = torch.from_numpy(stream.starts[: 2 * batch])
    rows = torch.from_numpy(stream.tokens.astype(np.int32))
    rows = rows[starts[:, None] + torch.arange(tokens + 1)].to(device)
    agreed = torch.zeros(len(DEPTH_WEIGHTS), 2, dtype=torch.float64)
    for part in rows.split(batch):
        inputs, _, weight = measure.split_rows(part, 0.0)
        with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
            hidden = target.hidden(inputs)
            best = F.linear(hidden, target.embed.weight).argmax(-1)
            found = drafts(head, target, inputs, hidden)
        for depth, logits in enumerate(found):
            same = (logits.argmax(-1) == best[:, 1 + depth :]) * weight[:, 1 + depth :]
            agreed[depth] += torch.tensor([same.sum().item(), weight[:, 1 + depth :].sum().item()])
    return [round(float(same / total), 4) for same, total in agreed]
