"""Time draft passes: the MTP head of a shape, and a separate model beside it.

    python benchmarks/draft.py [--batches 1 8 32] [--tokens 1 2 4 8] [--output FILE]

A pass runs so many inner nodes of one level of a tree, LM head and choice of the likeliest tokens
included, with half a context behind it. Of a head's target only the embedding, the LM head and two
blocks are made: a draft pass reads no more of it. Weights are random; with experts each row chooses
its own, as random hidden states do.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import torch
from report import RESULTS, Row, header, save, table

from stree_autotune.probe.plan import even_tree
from stree_autotune.probe.stepper import occupy
from stree_autotune.probe.timing import Effort, Work, captured, time_interleaved
from stree_autotune.store.open_models import PairRequest, open_source
from stree_core.drafting.checkpoint import load_head, random_model
from stree_core.drafting.draft import Draft, ModelDraft
from stree_core.drafting.pair import Runtime
from stree_core.drafting.tree_plan import make_plan
from stree_core.engine.step import make_speculators
from stree_core.models.backend import Backend, load_backend
from stree_core.models.model import Model
from stree_core.models.source import ModelSource, head_source

HEADED, SEPARATE = "nemotron-3-nano-mtp", ("mamba2-2.7b", "mamba2-130m")
CONTEXT = 2048
EFFORT = Effort(5, 40, 0.5)
SHOWN = ("model", "batch", "tokens", "ms", "spread_ms")


def main() -> None:
    options = parse()
    device, dtype = torch.device("cuda"), torch.bfloat16
    backend = load_backend("triton", device)
    head, rows = header(), []
    with torch.inference_mode():
        for name in options.models:
            target, draft = opened(name, backend, dtype, device)
            for batch in options.batches:
                rows += timed(name, target, draft, batch, options.tokens)
                save(options.output, head, rows)
            del target, draft
            torch.cuda.empty_cache()
    print(table(rows, SHOWN), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time draft passes")
    parser.add_argument("--models", nargs="+", default=[f"{HEADED} mtp", SEPARATE[1]])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, default=RESULTS / "draft-h200.json")
    return parser.parse_args()


def opened(
    name: str, backend: Backend, dtype: torch.dtype, device: torch.device
) -> tuple[Model, Draft]:
    """Return a few blocks of a target, and its head or a separate draft."""
    of_head = name.endswith(" mtp")
    source = shape_source(name.removesuffix(" mtp") if of_head else SEPARATE[0])
    few = dataclasses.replace(source.shape, blocks=source.shape.blocks[:2])
    target = random_model(few, backend, dtype, device)
    if of_head:
        return target, load_head(head_source(source), target, source.name)
    shape = shape_source(name).shape
    return target, ModelDraft(random_model(shape, backend, dtype, device))


def shape_source(name: str) -> ModelSource:
    return open_source(PairRequest("", "", (), Runtime(), shapes=True), name)


def timed(name: str, target: Model, draft: Draft, batch: int, widths: list[int]) -> list[Row]:
    """Return a row for each number of inner nodes."""
    pool = torch.cuda.graph_pool_handle()
    trees = {width: even_tree(2 * width, width) for width in widths}
    plans = [
        make_plan(tree, target.conv_widths, draft.layout, target.device) for tree in trees.values()
    ]
    speculators = make_speculators(target, draft, plans, batch, CONTEXT)
    occupy(speculators[0], CONTEXT // 2)
    works: dict[int, Work] = {}
    for width, speculator in zip(widths, speculators, strict=True):
        cache = speculator.draft_cache
        assert cache is not None
        if cache.features_RBD is not None:
            cache.features_RBD.normal_()
        level = speculator.plan.levels[1]
        works[width] = captured(partial(speculator.draft_level, level), target.device, pool)
    timings = time_interleaved(works, target.device, EFFORT)
    return [
        {
            "model": name,
            "batch": batch,
            "tokens": width,
            "ms": round(timing.ms, 5),
            "spread_ms": round(timing.spread_ms, 5),
        }
        for width, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
