"""STree's published step times against our roofline: numbers that are not ours.

Their code launches some 50 kernels for each Mamba2 layer, copies its whole key cache, and works on
the host between passes; none of that is in our roofline. So a prediction is the roofline's time of
the passes that their method runs, plus host terms that are fitted to their own numbers: one for
each target pass, one for each draft pass, and one for each node of a beam, whose tree is built on
the host. Every row is predicted with the terms fitted to the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stree_autotune.cost.layout import find_layouts, layout_of
from stree_autotune.cost.roofline import Efficiencies, fit
from stree_autotune.cost.traffic import model_cost
from stree_autotune.cost.work import PassModel, PassSize, all_samples, pass_work
from stree_autotune.store.gpu_spec import GpuSpec
from stree_autotune.store.library import Library
from stree_autotune.store.runtime_table import RuntimeTable
from stree_core.families.registry import shape_from_config
from stree_core.families.shape_spec import load_shape_spec
from stree_core.models.source import ModelSource, spec_source

TARGET, DRAFT, GPU = "mamba-in-llama-8b", "mamba2-distilled-small", "rtx3090"
CONTEXT = 600
BYTES = 2


@dataclass(frozen=True, slots=True)
class Published:
    """A row of arXiv:2505.14969's recorded runs: RTX 3090, batch 1, bf16, MT-Bench, greedy.

    `width` beams on `depth` levels; `beams` is False for a chain, whose width is 1.
    """

    layers: str
    method: str
    depth: int
    width: int
    ms: float


ROWS = (
    Published("half Mamba", "autoregressive", 0, 0, 24.82),
    Published("half Mamba", "autoregressive, again", 0, 0, 25.01),
    Published("half Mamba", "chain 3", 3, 1, 29.20),
    Published("half Mamba", "chain 5", 5, 1, 30.52),
    Published("half Mamba", "beam 2 x 4", 4, 2, 36.54),
    Published("half Mamba", "beam 3 x 4", 4, 3, 38.03),
    Published("half Mamba", "beam 3 x 5", 5, 3, 40.05),
    Published("all Mamba", "autoregressive", 0, 0, 22.59),
    Published("all Mamba", "chain 4", 4, 1, 27.69),
    Published("half Mamba, again", "autoregressive", 0, 0, 24.96),
    Published("half Mamba, again", "chain 4", 4, 1, 30.10),
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A published row, the roofline's time of its passes, and the host's as the other rows say."""

    row: Published
    passes_ms: float
    host_ms: float

    @property
    def error(self) -> float:
        """The relative error."""
        return (self.passes_ms + self.host_ms) / self.row.ms - 1


def predictions(
    tables: Sequence[RuntimeTable], measured: GpuSpec, library: Library
) -> list[Prediction]:
    """Predict every row with host terms fitted to the others."""
    spec = library.gpu_spec(GPU)
    assert spec is not None
    found = fit(all_samples(tables, find_layouts(library, tables)), measured)
    passes = np.array([_passes_ms(row, found, spec, library) for row in ROWS])
    terms = np.array([_host_terms(row) for row in ROWS], dtype=np.float64)
    left = np.array([row.ms for row in ROWS]) - passes
    predicted = []
    for index, row in enumerate(ROWS):
        rest = np.arange(len(ROWS)) != index
        host = float(terms[index] @ _host_ms(terms[rest], left[rest]))
        predicted.append(Prediction(row, float(passes[index]), host))
    return predicted


def published_table(tables: Sequence[RuntimeTable], measured: GpuSpec, library: Library) -> str:
    """Return the rows with their predictions as Markdown."""
    lines = [
        "**RTX 3090, Mamba-in-Llama 8B, published; predicted by a roofline fitted on "
        f"{measured.name} (estimated)**",
        "",
        "| layers | method | published ms | passes ms | host ms | predicted ms | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {p.row.layers} | {p.row.method} | {p.row.ms:.2f} | {p.passes_ms:.2f} | "
        f"{p.host_ms:.2f} | {p.passes_ms + p.host_ms:.2f} | {p.error:+.1%} |"
        for p in predictions(tables, measured, library)
    ]
    return "\n".join(lines) + "\n"


def _host_terms(row: Published) -> tuple[int, ...]:
    attends = int(not row.layers.startswith("all Mamba"))
    return 1, int(row.depth > 0), row.depth, row.depth * row.width * int(row.width > 1), attends


def _host_ms(terms: NDArray[np.float64], left: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.optimize import nnls

    found: NDArray[np.float64] = nnls(terms, left)[0]
    return found


def _passes_ms(row: Published, found: Efficiencies, spec: GpuSpec, library: Library) -> float:
    """Return the roofline's time of a step: a draft pass a level, and the target's pass."""
    target, draft = _target(row.layers, library), _model(DRAFT, library)
    tokens = 1 + row.depth * row.width
    size = PassSize(1, tokens, tokens, tokens, CONTEXT)
    total = float(found.ms([pass_work(target, size)], spec)[0])
    if row.depth:
        size = PassSize(1, row.width, 2 + row.width, row.width, CONTEXT)
        total += row.depth * float(found.ms([pass_work(draft, size)], spec)[0])
    return total


def _model(name: str, library: Library) -> PassModel:
    return _pass_model(spec_source(library.find_shape(name)))


def _pass_model(source: ModelSource) -> PassModel:
    cost = model_cost(source.shape, source.ref, BYTES)
    return PassModel(cost, layout_of(source.shape), BYTES)


def _target(layers: str, library: Library) -> PassModel:
    """Return the cost of the target with every attention layer a Mamba2 one, or as it is."""
    if layers != "all Mamba":
        return _model(TARGET, library)
    path = library.find_shape(TARGET)
    config = load_shape_spec(path).config_dict
    config["mamba_config"]["attn_layers"] = []
    return _pass_model(replace(spec_source(path), shape=shape_from_config(config, TARGET)))
