"""Teach a trained target not to loop: unlikelihood on what it repeats in its own greedy texts.

Welleck et al., "Neural text generation with unlikelihood training" (arXiv:1908.04319), sec. 5: the
model writes, the tokens that complete a repeated n-gram lose likelihood, and an ordinary batch in
the same step keeps the rest as it was.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import measure
import numpy as np
import torch
from modules import DemoModel
from optimise import target_loss
from streams import PROMPT_BIT, Stream
from torch import Tensor

REPEAT_GRAM = 5
NUM_TEXTS = 96
LEARNING_RATE = 3e-4
# Sources that end by themselves after a fixed scheme need no treatment.
SOURCES = ("code", "prose", "jsonl")


def polish(
    model: DemoModel, rows: measure.Rows, streams: dict[str, Stream], args: argparse.Namespace
) -> dict[str, Any]:
    """Run rounds of writing and unlearning for `args.polish_minutes`; return a record."""
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    rng = np.random.default_rng(args.seed)
    start, shares = time.perf_counter(), []
    while time.perf_counter() - start < 60 * args.polish_minutes or not shares:
        prompts = some_prompts(streams, rng)
        texts = measure.greedy(model.eval(), prompts, device, args.polish_tokens)
        ids, repeated = marked(prompts, texts, device)
        likely = measure.run(model.train(), ids[:, :-1]).log_softmax(-1)
        chosen = likely.gather(-1, ids[:, 1:, None])[..., 0]
        unlikely = -torch.log1p(-chosen.exp().clamp(max=1 - 1e-5))
        penalty = (unlikely * repeated[:, 1:]).sum() / repeated.sum().clamp(min=1)
        usual = target_loss(model, rows.draw(args.batch, args.tokens), args.prompt_weight)
        optimizer.zero_grad(set_to_none=True)
        (usual + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        written = sum(len(t) - len(p) for t, p in zip(texts, prompts, strict=True))
        shares.append((round(float(repeated.sum()) / max(written, 1), 4), round(usual.item(), 4)))
        if len(shares) % 5 == 1:
            print(f"polish {len(shares)}: repeated share, loss {shares[-1]}", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"rounds": len(shares), "seconds": seconds, "repeated_share_and_loss": shares}


def some_prompts(streams: dict[str, Stream], rng: np.random.Generator) -> list[list[int]]:
    """Draw prompts of training documents, as many of each source."""
    present = [streams[name] for name in SOURCES if name in streams]
    prompts = []
    for number in range(NUM_TEXTS):
        stream = present[number % len(present)]
        start = int(rng.choice(stream.starts[:-1]))
        end = start + 1
        while stream.tokens[end] & PROMPT_BIT:
            end += 1
        prompts.append([int(token) & (PROMPT_BIT - 1) for token in stream.tokens[start:end]])
    return prompts


def marked(prompts: list[list[int]], texts: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Return padded ids [texts, tokens], and 1.0 where a token completes a repeated n-gram."""
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    repeated = torch.zeros(len(texts), width)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids[row, : len(text)] = torch.tensor(text)
        seen = set()
        for end in range(len(prompt) + REPEAT_GRAM, len(text) + 1):
            gram = tuple(text[end - REPEAT_GRAM : end])
            repeated[row, end - 1] = float(gram in seen)
            seen.add(gram)
    return ids.to(device), repeated.to(device)
