"""The training loop: a plan of steps that ends on time, AdamW, and the two losses."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import measure
import torch
import torch.nn.functional as F
from modules import DemoModel
from torch import Tensor, nn

# Steps before the step time is trusted, and the steps from one plan of the end to the next.
WARM_STEPS, PLAN_STEPS = 20, 100
UNPLANNED = 1_000_000
LEARNING_RATE = {"target": 3e-3, "draft": 4e-3, "head": 3e-3}
# Of the draft's loss; the rest is the divergence from the target's distribution.
CROSS_ENTROPY_SHARE = 0.1


@dataclass(slots=True)
class Plan:
    """When training ends: after fixed steps, or where the measured step time meets the clock."""

    seconds: float
    steps: int = 0
    # Before the first plan: only large, so that the warm-up is the longest.
    total: int = UNPLANNED
    _start: float = field(default_factory=time.perf_counter)
    _mark: tuple[int, float] = (0, 0.0)

    def update(self, step: int) -> bool:
        """Look at the clock now and then; return whether the total changed."""
        if self.steps:
            self.total = self.steps
            return step == 0
        warm = step in (WARM_STEPS, 2 * WARM_STEPS)
        if not warm and (step == 0 or step % PLAN_STEPS or self.total - step < PLAN_STEPS):
            return False
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._start
        previous, self._mark = self._mark, (step, elapsed)
        if step == WARM_STEPS:
            return False
        step_seconds = (elapsed - previous[1]) / (step - previous[0])
        self.total = step + max(1, int((self.seconds - elapsed) / step_seconds))
        return True

    def rate(self, step: int) -> float:
        """Return the learning rate's factor: linear warm-up, then a cosine to zero."""
        warm = min(200, max(1, self.total // 10))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / max(1, self.total - warm)))


def optimise(
    model: nn.Module, name: str, loss_of: Callable[[Tensor], Tensor], rows: measure.Rows,
    plan: Plan, args: argparse.Namespace,
) -> list[tuple[int, float]]:  # fmt: skip
    """Train until the plan's end; return (step, loss) now and then."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    peak = LEARNING_RATE[name]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    losses: list[tuple[int, float]] = []
    for step in itertools.count():
        if plan.update(step):
            rows.limit("jsonl", args.jsonl_epochs, plan.total * args.batch * args.tokens)
        if step >= plan.total:
            return losses
        for group in optimizer.param_groups:
            group["lr"] = peak * plan.rate(step)
        loss = loss_of(rows.draw(args.batch, args.tokens))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % PLAN_STEPS == 0 or step == plan.total - 1:
            losses.append((step, round(loss.item(), 4)))
            total = "?" if plan.total == UNPLANNED else plan.total
            print(f"{name} {step}/{total} loss {losses[-1][1]}", flush=True)
    raise AssertionError("the count never ends")


def target_loss(model: DemoModel, rows: Tensor, prompt_weight: float) -> Tensor:
    """Return the weighted cross-entropy of one batch."""
    inputs, labels, weight = measure.split_rows(rows, prompt_weight)
    losses = F.cross_entropy(
        measure.run(model, inputs).flatten(0, 1), labels.flatten(), reduction="none"
    )
    return (losses * weight.flatten()).sum() / weight.sum()


def draft_loss(draft: DemoModel, target: DemoModel, rows: Tensor, prompt_weight: float) -> Tensor:
    """Return KL(target || draft) with a little cross-entropy, weighted like the target's loss."""
    inputs, labels, weight = measure.split_rows(rows, prompt_weight)
    with torch.no_grad():
        wanted = measure.run(target, inputs).log_softmax(-1)
    guess = measure.run(draft, inputs).log_softmax(-1)
    divergence = (wanted.exp() * (wanted - guess)).sum(-1)
    truth = -guess.gather(-1, labels[..., None])[..., 0]
    mixed = (1 - CROSS_ENTROPY_SHARE) * divergence + CROSS_ENTROPY_SHARE * truth
    return (mixed * weight).sum() / weight.sum()
