"""What one pass of a model is made of, by its typed shape: products, scans, attention, experts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from stree_autotune.store import Library, ModelCost, RuntimeTable
from stree_core.errors import StreeError
from stree_core.families import AttentionShape, Mixer, MlpShape, ModelShape, MoeShape
from stree_core.models import MTP, ModelSource

LEAST_SIDE = 64
"""Matrices with a shorter side (convolutions, norms) are no products."""

_KINDS = {AttentionShape: "attention", MlpShape: "MLP", MoeShape: "experts"}
_STACKS = ("up_proj", "down_proj")


class Product(NamedTuple):
    """`number` weights of these rows (outputs) and columns (inputs)."""

    rows: int
    columns: int
    number: int


class ExpertLayer(NamedTuple):
    """`number` layers of experts; `values` are those of one expert.

    Every row uses `num_chosen` of `num_experts`, and `num_shared` further ones.
    """

    num_experts: int
    num_chosen: int
    values: int
    number: int
    num_shared: int = 0

    def distinct(self, num_rows: int) -> float:
        """Return how many experts some rows are expected to use, each choosing by chance."""
        share = min(self.num_chosen / self.num_experts, 1 - 1e-12)
        return self.num_shared - self.num_experts * math.expm1(num_rows * math.log1p(-share))


@dataclass(frozen=True, slots=True)
class Layout:
    """What a pass multiplies, scans and attends; `score_flops` are per row and position.

    `kinds` names the kinds of mixers, none where the layout was guessed from sizes.
    """

    products: tuple[Product, ...]
    head: Product
    num_scans: int
    num_attention: int
    score_flops: float
    experts: tuple[ExpertLayer, ...] = ()
    kinds: frozenset[str] = frozenset()


def layout_of(shape: ModelShape) -> Layout:
    """Return the layout of a shape; a mixer of any other kind than these counts as recurrent."""
    products: Counter[tuple[int, ...]] = Counter()
    experts: Counter[tuple[int, int, int, int]] = Counter()
    kinds: Counter[str] = Counter()
    score_flops = 0.0
    for part in shape.parts:
        mixer = part.mixer
        kinds[kind_of(mixer)] += 1
        if isinstance(mixer, AttentionShape):
            score_flops += 4 * mixer.num_heads * mixer.row_dim
        stacks: tuple[str, ...] = ()
        if isinstance(mixer, MoeShape):
            stacks = _STACKS
            total = sum(part.weights[name].num_values for name in stacks)
            stacked = part.weights[stacks[0]].shape[0]
            more = stacked - mixer.num_experts
            experts[mixer.num_experts, mixer.router.num_chosen, total // stacked, more] += 1
        dims = (weight.shape for name, weight in part.weights.items() if name not in stacks)
        products.update(dim for dim in dims if len(dim) == 2 and min(dim) >= LEAST_SIDE)
    beside = [block.shared.linear.shape for block in shape.blocks if block.shared is not None]
    if shape.join is not None:
        beside.append(shape.join.proj.shape)
    products.update(beside)
    return Layout(
        products=tuple(Product(n, k, count) for (n, k), count in sorted(products.items())),
        head=Product(shape.vocab_size, shape.hidden_size, 1),
        num_scans=sum(count for kind, count in kinds.items() if kind not in _KINDS.values()),
        num_attention=kinds["attention"],
        score_flops=score_flops,
        experts=tuple(
            ExpertLayer(*key[:3], count, key[3]) for key, count in sorted(experts.items())
        ),
        kinds=frozenset(kinds),
    )


def kind_of(mixer: Mixer) -> str:
    """Return the kind of a mixer, a recurrent one's by its class."""
    named = (name for kind, name in _KINDS.items() if isinstance(mixer, kind))
    return next(named, f"{type(mixer).__name__.removesuffix('Shape')} layers")


def rough_layout(cost: ModelCost, element_bytes: int) -> Layout:
    """Return a guess by sizes alone, for a model whose shape is not at hand.

    Every other launch is a product, all alike; every fourth is a scan where there is a state.
    """
    head = Product(cost.vocab_size, cost.hidden_size, 1)
    body = max(0, cost.weight_bytes // element_bytes - head.rows * head.columns)
    count = max(1, cost.num_launches // 2)
    attends = cost.kv_bytes_per_token > 0
    scans = cost.num_launches // 4 if cost.state_bytes_per_sequence else 0
    return Layout(
        products=(Product(max(1, body // (count * cost.hidden_size)), cost.hidden_size, count),),
        head=head,
        num_scans=scans // 2 if attends else scans,
        num_attention=cost.num_launches // 8 if attends else 0,
        # four query heads share a key head
        score_flops=4 * cost.kv_bytes_per_token / element_bytes * 2,
    )


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of known shapes by their digest; others are guessed."""

    known: Mapping[str, Layout] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Iterable[ModelSource]) -> Layouts:
        """Return the layouts of models and of their own heads."""
        shapes = [source.shape for source in sources]
        shapes += [shape.mtp for shape in shapes if shape.mtp is not None]
        return cls({shape.digest: layout_of(shape) for shape in shapes})

    def at(self, cost: ModelCost, element_bytes: int) -> Layout:
        """Return the layout of a model of a table."""
        found = self.known.get(cost.shape_sha256 or "")
        return rough_layout(cost, element_bytes) if found is None else found


def find_layouts(
    library: Library, tables: Iterable[RuntimeTable], read: Sequence[ModelSource] = ()
) -> Layouts:
    """Return the layouts of the models of tables whose shapes the library has.

    `read` are models whose configs were read already.
    """
    names = {model.name for table in tables for model in (table.target, table.draft)} - {MTP}
    names -= {source.name for source in read}
    sources = list(read)
    with quiet_families():
        for name in sorted(names):
            try:
                sources.append(library.find_described(name))
            except StreeError:
                # one that another machine has; its sizes are in the table
                continue
    return Layouts.of(sources)


@contextmanager
def quiet_families() -> Iterator[None]:
    """Keep the families from telling which keys of configs nobody asked about they do not use."""
    told = logging.getLogger("stree_core.families")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(level)
