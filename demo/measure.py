"""Rows for training, and what a trained pair is judged by: loss, agreement, loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from streams import EOS_ID, PROMPT_BIT, Stream
from torch import Tensor, nn

LOOP_GRAM = 8
NEW_TOKENS = 256


class Rows:
    """Draws training rows: a source by its weight, then a document that starts the row."""

    def __init__(
        self, streams: dict[str, Stream], weights: dict[str, float], device: str, seed: int
    ) -> None:
        self.names = list(streams)
        self.wanted = {name: weights[name] for name in self.names}
        self.num_tokens = {name: int(stream.starts[-1]) for name, stream in streams.items()}
        self.drawn = Counter(dict.fromkeys(self.names, 0))
        self._device, self._rng = device, np.random.default_rng(seed)
        self._tokens = {n: as_ids(s.tokens, device) for n, s in streams.items()}
        self._starts = {n: s.starts for n, s in streams.items()}
        self._queue = {n: np.empty(0, dtype=np.int64) for n in self.names}
        self.weights = self._normal(self.wanted)

    @staticmethod
    def _normal(weights: dict[str, float]) -> dict[str, float]:
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def limit(self, name: str, epochs: float, planned_tokens: int) -> None:
        """Lower a source's weight so that `planned_tokens` repeat it `epochs` times at most."""
        if name in self.wanted:
            share = epochs * self.num_tokens[name] / max(planned_tokens, 1)
            self.weights = self._normal({**self.wanted, name: min(self.wanted[name], share)})

    def draw(self, batch: int, tokens: int) -> Tensor:
        """Return ids with PROMPT_BIT, int32[batch, tokens + 1]."""
        shares = self._rng.multinomial(batch, [self.weights[name] for name in self.names])
        rows = []
        for name, count in zip(self.names, shares, strict=True):
            starts = torch.from_numpy(self._next_starts(name, int(count))).to(self._device)
            offsets = torch.arange(tokens + 1, device=self._device)
            rows.append(self._tokens[name][starts[:, None] + offsets])
            self.drawn[name] += int(count) * tokens
        return torch.cat(rows)

    def _next_starts(self, name: str, count: int) -> np.ndarray:
        """Take documents in a shuffled order that covers all before it repeats any."""
        while len(self._queue[name]) < count:
            fresh = self._rng.permutation(self._starts[name])
            self._queue[name] = np.concatenate([self._queue[name], fresh])
        taken, self._queue[name] = np.split(self._queue[name], [count])
        return taken


def as_ids(tokens: np.ndarray, device: str) -> Tensor:
    """Return uint16 ids as int32 on a device."""
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def split_rows(rows: Tensor, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (inputs, labels, loss weights) of rows with PROMPT_BIT."""
    ids = (rows & (PROMPT_BIT - 1)).long()
    weight = torch.where((rows[:, 1:] & PROMPT_BIT) > 0, prompt_weight, 1.0)
    return ids[:, :-1], ids[:, 1:], weight


@torch.no_grad()
def held_out(
    models: dict[str, nn.Module], stream: Stream, device: str, tokens: int, batch: int
) -> dict[str, float]:
    """Return each model's loss, and the draft's top-1 agreement, on completions only."""
    if len(stream.starts) == 0:
        return {}
    starts = torch.from_numpy(stream.starts[: 4 * batch])
    offsets = torch.arange(tokens + 1)
    rows = torch.from_numpy(stream.tokens.astype(np.int32))[starts[:, None] + offsets]
    sums: Counter[str] = Counter()
    for part in rows.split(batch):
        inputs, labels, weight = split_rows(part.to(device), 0.0)
        tops = {}
        for name, model in models.items():
            logits = run(model, inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            sums[f"{name}_loss"] += (loss * weight.flatten()).sum().item()
            tops[name] = logits.argmax(-1)
        if len(tops) == 2:
            sums["agreement"] += ((tops["draft"] == tops["target"]) * weight).sum().item()
        sums["tokens"] += weight.sum().item()
    total = max(sums.pop("tokens"), 1.0)
    return {name: round(value / total, 4) for name, value in sums.items()}


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Return fp32 logits; bf16 autocast on a GPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
        logits: Tensor = model(ids)
    return logits.float()


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[list[int]], device: str, count: int) -> list[list[int]]:
    """Return prompts + up to `count` greedy tokens; recomputes the prefix at every token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + count, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    every, alive = torch.arange(len(prompts), device=device), torch.ones_like(lengths).bool()
    for _ in range(count):
        end = min(-(-int(lengths.max()) // 64) * 64, ids.shape[1])
        token = run(model, ids[:, :end])[every, lengths - 1].argmax(-1)
        ids[every[alive], lengths[alive]] = token[alive]
        lengths += alive
        alive &= token != EOS_ID
        if not alive.any():
            break
    pairs = zip(ids.tolist(), lengths.tolist(), strict=True)
    return [row[:length] for row, length in pairs]


@torch.no_grad()
def free_run(
    target: nn.Module, draft: nn.Module, prompts: list[list[int]], device: str, count: int
) -> dict[str, float]:
    """Let the target write; return how it ends, how much it loops, and how the draft follows."""
    texts = greedy(target, prompts, device, count)
    padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long, device=device)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text, device=device)
    guesses = run(draft, padded).argmax(-1).tolist()
    sums: Counter[str] = Counter()
    for prompt, text, guess in zip(prompts, texts, guesses, strict=True):
        looping = in_loop(text[len(prompt) :])
        same = [guess[at - 1] == text[at] for at in range(len(prompt), len(text))]
        sums["ended"] += text[-1] == EOS_ID
        sums["tokens"] += len(same)
        sums["agreed"] += sum(same)
        sums["looping"] += sum(looping)
        sums["agreed_outside"] += sum(s for s, loop in zip(same, looping, strict=True) if not loop)
    outside = max(sums["tokens"] - sums["looping"], 1)
    return {
        "mean_tokens": round(sums["tokens"] / len(prompts), 1),
        "ended_share": round(sums["ended"] / len(prompts), 4),
        "looping_share": round(sums["looping"] / sums["tokens"], 4),
        "agreement": round(sums["agreed"] / sums["tokens"], 4),
        "agreement_outside_loops": round(sums["agreed_outside"] / outside, 4),
    }


def in_loop(tokens: list[int]) -> list[bool]:
    """Mark the tokens of every LOOP_GRAM-gram that has occurred before."""
    marks, seen = [False] * len(tokens), set()
    for end in range(LOOP_GRAM, len(tokens) + 1):
        gram = tuple(tokens[end - LOOP_GRAM : end])
        if gram in seen:
            marks[end - LOOP_GRAM : end] = [True] * LOOP_GRAM
        seen.add(gram)
    return marks
