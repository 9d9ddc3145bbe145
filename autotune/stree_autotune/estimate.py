"""Carry a runtime table to a sibling GPU, which differs from the measured one in memory alone."""

from __future__ import annotations

from dataclasses import dataclass

from stree_autotune.gpu_sheet import GpuSheet
from stree_autotune.runtime_table import ModelCost, Point, RuntimeTable, Step, probe_command
from stree_core.errors import MissingMeasurement
from stree_core.tree import Tree

LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """A table for a GPU nobody measured, with the table it comes from.

    Every true time is taken to lie between the measured one and the measured one times
    `bandwidth_ratio` (measured GPU over wanted GPU); `table` holds the rule's point estimate.
    """

    table: RuntimeTable
    measured: RuntimeTable
    bandwidth_ratio: float
    rule: str


def estimate_table(table: RuntimeTable, measured: GpuSheet, wanted: GpuSheet) -> Estimate:
    """Carry `table`, measured on GPU `measured`, to GPU `wanted`.

    Of a time t, f = min(t, bytes moved / bandwidth of the measured GPU) is memory traffic and grows
    by the ratio of the bandwidths; the rest (launches, latency, arithmetic) stays. Bytes of a pass:
    weights once, per sequence the state read and written and the KV cache read, logits written and
    read. Raises MissingMeasurement unless both have the same architecture, SMs and matrix rate.
    """
    if not measured.is_sibling_of(wanted):
        command = probe_command(wanted.name, table.target.name, table.draft.name)
        raise MissingMeasurement(
            "times are carried over only between GPUs of one architecture, number of SMs and "
            f"matrix rate, got {measured.name} and {wanted.name}; measure with `{command}`"
        )
    ratio = measured.memory_bandwidth_tb_per_s / wanted.memory_bandwidth_tb_per_s
    # 1e12 bytes a second are 1e9 bytes a millisecond
    bytes_per_ms = measured.memory_bandwidth_tb_per_s * 1e9
    content = table.model_copy(
        update={
            "gpu": wanted.name,
            "gpu_name": wanted.full_name,
            "points": tuple(_carry_point(p, table, bytes_per_ms, ratio) for p in table.points),
            "steps": tuple(_carry_step(s, table, bytes_per_ms, ratio) for s in table.steps),
        }
    )
    return Estimate(content, table, ratio, _rule(measured, wanted, ratio))


def pass_bytes(model: ModelCost, batch_size: int, logit_rows: int, context: int) -> int:
    """Return the bytes that one pass moves when nothing stays in a cache."""
    per_sequence = (
        2 * model.state_bytes_per_sequence
        + context * model.kv_bytes_per_token
        + 2 * LOGIT_BYTES * logit_rows * model.vocab_size
    )
    return model.weight_bytes + batch_size * per_sequence


def point_bytes(point: Point, table: RuntimeTable) -> int:
    """Return the bytes that a term moves; choosing children (branch) is counted as moving none."""
    if point.term == "branch":
        return 0
    model = table.target if point.term in ("one_token", "verify") else table.draft
    return pass_bytes(model, point.batch_size, point.size, table.context)


def step_bytes(tree: Tree, batch_size: int, table: RuntimeTable) -> int:
    """Return the bytes of a step: the verify pass and one draft pass per level with children."""
    total = pass_bytes(table.target, batch_size, tree.num_tokens, table.context)
    for level in tree.levels[:-1]:
        width = sum(1 for node in level if tree.children[node])
        total += pass_bytes(table.draft, batch_size, width, table.context)
    return total


def _carry_point(point: Point, table: RuntimeTable, bytes_per_ms: float, ratio: float) -> Point:
    ms = _carry(point.ms, point_bytes(point, table) / bytes_per_ms, ratio)
    return point._replace(ms=ms)


def _carry_step(step: Step, table: RuntimeTable, bytes_per_ms: float, ratio: float) -> Step:
    tree = table.trees[step.tree].build()
    traffic_ms = step_bytes(tree, step.batch_size, table) / bytes_per_ms
    return step._replace(ms=_carry(step.ms, traffic_ms, ratio))


def _carry(ms: float, traffic_ms: float, ratio: float) -> float:
    return ms + min(ms, traffic_ms) * (ratio - 1)


def _rule(measured: GpuSheet, wanted: GpuSheet, ratio: float) -> str:
    return (
        f"measured on {measured.name}; the share of each time that memory traffic explains is "
        f"scaled by {measured.memory_bandwidth_tb_per_s:g}/{wanted.memory_bandwidth_tb_per_s:g} "
        f"(TB/s), the rest is kept; the truth is taken to lie between x1 and x{ratio:.3g}"
    )
