"""One weight of a model: under which names it is stored, and how its rows lie there."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model: checkpoint tensors stacked along their first dim, viewed as `shape`.

    `row_scales` are runs of rows (count, factor); none is all ones. `adapters` holds for each key,
    if for any, the keys of two low-rank factors whose product `second @ first` is added to it.
    `row_order` are runs of stacked rows (first, count) in the order in which the model holds them;
    none is as they are. `offset` is added to stored values: 1 of a zero-centred norm. `other_keys`
    are further ways to store it: the first of which all keys are there is read. `part_rows` are the
    rows of each key where the keys may be stored in different ways.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    row_scales: tuple[tuple[int, float], ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    row_order: tuple[tuple[int, int], ...] = ()
    offset: float = 0.0
    other_keys: tuple[tuple[str, ...], ...] = ()
    part_rows: tuple[int, ...] = ()

    def split(self, marked: Collection[str]) -> tuple[Weight, ...]:
        """Return the weights that it is made of, each with keys that are all marked or all not.

        Empty where it cannot be cut: its rows are not known by key, are scaled, or change places
        across the cut.
        """
        if not self.part_rows or self.row_scales or self.adapters:
            return ()
        pieces: list[Weight] = []
        first, order = 0, list(self.row_order)
        for _, group in groupby(
            zip(self.keys, self.part_rows, strict=True), key=lambda part: part[0] in marked
        ):
            keys, rows = zip(*group, strict=True)
            end, runs = first + sum(rows), []
            while order and first <= order[0][0] and sum(order[0]) <= end:
                start, count = order.pop(0)
                runs.append((start - first, count))
            if self.row_order and sum(count for _, count in runs) != end - first:
                return ()
            pieces.append(Weight(keys, (end - first, *self.shape[1:]), row_order=tuple(runs)))
            first = end
        return tuple(pieces)

    @property
    def num_values(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)

    def keys_in(self, stored: Collection[str]) -> tuple[str, ...]:
        """Return the keys under which files hold it; the first way where they hold it in none."""
        ways = (self.keys, *self.other_keys)
        return next((way for way in ways if all(key in stored for key in way)), self.keys)
