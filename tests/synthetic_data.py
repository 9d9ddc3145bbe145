"""A runtime table, a trace and a profile by formula, for tests of what reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from stree_autotune.cost.memory import MemoryModel
from stree_autotune.store.library import trace_file_name
from stree_autotune.store.runtime_table import (
    ModelCost,
    Point,
    RulePoint,
    RuntimeTable,
    Step,
    TableMeasured,
    save_runtime_table,
)
from stree_autotune.trace.file import NO_RANK, Trace, TraceMeta, save_trace
from stree_core.profile import (
    GpuRef,
    Interval,
    ModelRef,
    PolicyRow,
    Predicted,
    Profile,
    Provenance,
    Sampling,
    Source,
    Sources,
    TreeText,
)
from stree_core.tree import DEFAULT_TREE, OFF, Tree

VERIFY_SIZES = (1, 2, 4, 8, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65)
WIDTHS = (1, 2, 3, 4, 8, 16, 17, 32)
TREES = {
    "chain-1": Tree.chain(1),
    "chain-2": Tree.chain(2),
    "chain-4": Tree.chain(4),
    "chain-8": Tree.chain(8),
    "published": DEFAULT_TREE,
    "wide": Tree.from_paths([[i] for i in range(8)] + [[i, 0] for i in range(8)]),
}
CONSTANT_MS, PER_LEVEL_MS = 0.05, 0.01


def off_ms(batch_size: int) -> float:
    """One token per sequence."""
    return 3.0 + 0.02 * batch_size


def verify_ms(batch_size: int, size: int) -> float:
    """A staircase in blocks of 16 tokens."""
    return 3.0 + 0.03 * batch_size * math.ceil(size / 16)


def draft_ms(batch_size: int, width: int) -> float:
    """A draft pass, in blocks of 16 nodes."""
    return 0.3 + 0.004 * batch_size * math.ceil(width / 16)


def branch_ms(batch_size: int, width: int) -> float:
    """Picking several children, by rows of logits."""
    return 0.01 + 0.0005 * batch_size * width


def rule_points() -> list[RulePoint]:
    """What rules cost, straight in the rows of logits."""
    works = {"branch": (0.01, 0.0005), "sample": (0.02, 0.001), "sample_truncated": (0.05, 0.004),
             "draw": (0.015, 0.002), "draw_truncated": (0.06, 0.005), "try": (0.01, 0.003),
             "tries": (0.04, 0.006)}  # fmt: skip
    return [
        RulePoint(work, rows, fixed + each * rows, 0.0)  # type: ignore[arg-type]
        for work, (fixed, each) in works.items()
        for rows in (1, 2, 8, 32, 128, 512, 2048, 8192)
    ]


def step_ms(batch_size: int, tree: Tree) -> float:
    """A whole step, written out level by level."""
    if tree.num_nodes == 0:
        return off_ms(batch_size)
    total = CONSTANT_MS + PER_LEVEL_MS * tree.depth + verify_ms(batch_size, tree.num_tokens)
    for level in range(tree.depth):
        inner = [n for n in range(tree.num_tokens) if tree.depths[n] == level and tree.children[n]]
        total += 0.35 if level == 0 else draft_ms(batch_size, len(inner))
        if any(len(tree.children[n]) > 1 for n in inner):
            total += branch_ms(batch_size, len(inner))
    return total


def model_cost(name: str, weight_bytes: int = 12_000_000, kv_bytes_per_token: int = 0) -> ModelCost:
    """A model that exists by name only."""
    return ModelCost(
        num_launches=40,
        held_bytes=weight_bytes,
        kept_bytes=16 * 1000,
        row_bytes=4000,
        name=name,
        config_sha256=name.encode().hex().ljust(64, "0")[:64],
        tokenizer_sha256="a" * 64,
        weight_bytes=weight_bytes,
        state_bytes_per_sequence=400_000,
        kv_bytes_per_token=kv_bytes_per_token,
        vocab_size=4096,
        hidden_size=256,
    )


def make_table(
    gpu: str = "h200",
    target: str = "demo-target",
    draft: str = "demo-draft",
    batch_sizes: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    kv_bytes_per_token: int = 0,
    spread: float = 0.0,
) -> RuntimeTable:
    """A table by the formulas above; `spread` is relative."""
    points: list[Point] = []
    steps: list[Step] = []
    for b in batch_sizes:
        rows = [("draft_root", 1, 0.35)]
        rows += [("verify", size, verify_ms(b, size)) for size in VERIFY_SIZES]
        rows += [("draft", width, draft_ms(b, width)) for width in WIDTHS]
        points += [Point(term, b, size, ms, spread * ms) for term, size, ms in rows]
        steps.append(Step(b, OFF.kind, off_ms(b), spread * off_ms(b)))
        steps += [Step(b, name, step_ms(b, tree), 0.0) for name, tree in TREES.items()]
    return RuntimeTable(
        gpu=gpu,
        gpu_name=f"NVIDIA {gpu.upper()}",
        target=model_cost(target, kv_bytes_per_token=kv_bytes_per_token),
        draft=model_cost(draft, weight_bytes=1_500_000),
        dtype="bfloat16",
        backend="triton",
        context=1024,
        weights="real",
        measured=TableMeasured(
            date="2026-01-01T00:00:00+00:00",
            git_sha="unknown",
            versions={"torch": "2.13.0"},
            driver="580",
            repeats=20,
            command="stree-tune probe --gpu h200",
        ),
        points=tuple(points),
        rules=tuple(rule_points()),
        trees={OFF.kind: TreeText(paths=())}
        | {name: TreeText(paths=tree.paths) for name, tree in TREES.items()},
        steps=tuple(steps),
    )


def make_trace(
    target: str = "demo-target",
    draft: str = "demo-draft",
    dataset: str = "gsm8k",
    num_prompts: int = 64,
    length: int = 60,
) -> Trace:
    """A trace of independent ranks: 0 in 60 %, none in 20 % of positions."""
    rng = np.random.default_rng(7)
    distribution = [0.6, 0.12, 0.05, 0.03, 0.2]
    ranks = rng.choice([0, 1, 2, 3, NO_RANK], p=distribution, size=num_prompts * length).astype(
        np.uint8
    )
    offsets = np.arange(num_prompts + 1, dtype=np.int64) * length
    meta = TraceMeta(
        target=model_ref(target),
        draft=model_ref(draft),
        dataset=dataset,
        sampling=Sampling(),
        num_children=16,
        max_new_tokens=length + 1,
        seed=0,
        dtype="float32",
        num_prompts=num_prompts,
        provenance=Provenance(
            version="0.1.0", git_sha="unknown", versions={}, seed=0, command="", date="2026-01-01"
        ),
    )
    return Trace(ranks, offsets, meta)


def model_ref(name: str) -> ModelRef:
    """The model of `model_cost`, as traces name it."""
    return model_cost(name).ref


def write_library(root: Path, table: RuntimeTable, *traces: Trace) -> Path:
    """Lay a table and traces out as a data folder."""
    save_runtime_table(table, root / "runtime" / table.file_name)
    for trace in traces:
        meta = trace.meta
        name = trace_file_name(meta.target.name, meta.draft.name, meta.dataset)
        save_trace(trace, root / "traces" / name)
    return root


def policy_row(batch_size: int, tree: Tree) -> PolicyRow:
    """A row whose numbers mean nothing."""
    kind = "off" if tree.num_nodes == 0 else "chain" if tree.is_chain else "tree"
    predicted = Predicted(
        tokens_per_step=2.5,
        step_ms=1.25,
        tokens_per_s=2000,
        speedup=1.5,
        speedup_interval=Interval(low=1.4, high=1.6),
    )
    return PolicyRow(
        batch_size=batch_size,
        verdict=kind,  # type: ignore[arg-type]
        tree=TreeText(paths=tree.paths),
        predicted=predicted,
        reason="why: because",
    )


def make_profile(*rows: PolicyRow) -> Profile:
    """A profile of the demo pair with two rows, or the given ones."""
    source = Source(name="runtime/x.yaml", sha256="b" * 64, status="measured")
    return Profile(
        target=ModelRef(name="demo-target", config_sha256="c" * 64),
        draft=ModelRef(name="demo-draft", config_sha256="d" * 64),
        gpu=GpuRef(name="h200", status="measured"),
        dataset="gsm8k",
        sampling=Sampling(),
        context=1024,
        policy=rows or (policy_row(1, DEFAULT_TREE), policy_row(8, Tree.chain(2))),
        sources=Sources(runtime=source, trace=source),
        provenance=Provenance(
            version="0.1.0", git_sha="unknown", versions={}, seed=0, command="x", date="2026-01-01"
        ),
    )


def memory_of(table: RuntimeTable, memory_bytes: float = math.inf) -> MemoryModel:
    """The memory model of a table's pair on a GPU with so much."""
    model = MemoryModel(table.target, table.draft, table.context, table.gpu)
    return replace(model, memory_bytes=memory_bytes)


def memory_for(tree: Tree, batch_size: int) -> MemoryModel:
    """A memory that has just room for a tree."""
    table = make_table()
    return memory_of(table, memory_of(table).needed(batch_size, [tree]).total)
