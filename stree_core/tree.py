"""The token tree: which draft tokens one verify pass looks at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from stree_core.errors import TreeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_NODES = 255
"""Draft nodes of one tree, root not counted: a verify pass takes at most 256 tokens."""

Path = tuple[int, ...]
Verdict = Literal["off", "chain", "tree"]
"""How to decode: without speculation, or with which kind of tree."""


@dataclass(frozen=True)
class Tree:
    """A rooted tree of draft tokens in breadth-first order.

    `parents[i]` is the node that node i hangs from, -1 at the root. Breadth-first order with
    siblings by rank means that `parents` never decreases, so that equal shapes are equal trees.
    Node 0, the root, is the last emitted token; `num_nodes` does not count it.
    Raises TreeError when `parents` breaks one of these rules.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parents) - 1 > MAX_NODES:
            raise TreeError(
                f"a tree has at most {MAX_NODES} nodes, got {len(self.parents) - 1}; drop some"
            )
        if not self.parents or self.parents[0] != -1:
            raise TreeError("a tree starts with its root, whose parent is -1; put the root first")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node or parent < self.parents[node - 1]:
                raise TreeError(
                    f"parents stand before their children in breadth-first order, but node {node} "
                    f"has parent {parent}; build the tree with Tree.from_paths"
                )

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> Tree:
        """Build the tree whose nodes are `paths` (child ranks from the root), in any order.

        Raises TreeError on a duplicate, an empty path, a path without its parent, a gap among
        siblings or more than MAX_NODES paths.
        """
        ordered: list[Path] = []
        for path in paths:
            if len(ordered) == MAX_NODES:
                raise TreeError(f"a tree has at most {MAX_NODES} nodes; drop some paths")
            ordered.append(tuple(path))
        ordered.sort(key=lambda path: (len(path), path))
        index: dict[Path, int] = {(): 0}
        parents = [-1]
        for path in ordered:
            _check_path(path, index)
            index[path] = len(parents)
            parents.append(index[path[:-1]])
        return cls(tuple(parents))

    @classmethod
    def chain(cls, num_nodes: int) -> Tree:
        """Build the tree with one node on each of `num_nodes` levels."""
        return cls(tuple(range(-1, num_nodes)))

    @property
    def num_nodes(self) -> int:
        """Draft tokens, root not counted."""
        return len(self.parents) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that one verify pass processes: the nodes and the root."""
        return len(self.parents)

    @property
    def is_chain(self) -> bool:
        """True when no node has a sibling (the root alone counts as a chain)."""
        return self.parents == tuple(range(-1, self.num_nodes))

    @property
    def kind(self) -> Verdict:
        """The verdict that decodes with this tree: off when it has no nodes."""
        if not self.num_nodes:
            return "off"
        return "chain" if self.is_chain else "tree"

    @property
    def label(self) -> str:
        """How sentences name the tree: off, chain 3, a tree of 7 nodes."""
        named = {"off": "off", "chain": f"chain {self.num_nodes}"}
        return named.get(self.kind, f"a tree of {self.num_nodes} nodes")

    @property
    def full_label(self) -> str:
        """The label, of a tree with its depth: lists tell trees of one size apart by it."""
        return f"{self.label}, depth {self.depth}" if self.kind == "tree" else self.label

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Edges from the root, per node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Edges from the root to the deepest node."""
        return self.depths[-1]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Child nodes by rank, per node."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Order among siblings, per node; -1 at the root."""
        ranks = [-1]
        for node in range(1, self.num_tokens):
            ranks.append(self.children[self.parents[node]].index(node))
        return tuple(ranks)

    @property
    def max_children(self) -> int:
        """The largest number of children of one node."""
        return max(map(len, self.children))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth; level 0 is the root."""
        levels: list[list[int]] = [[] for _ in range(self.depth + 1)]
        for node, depth in enumerate(self.depths):
            levels[depth].append(node)
        return tuple(map(tuple, levels))

    @cached_property
    def node_paths(self) -> tuple[tuple[int, ...], ...]:
        """Nodes from the root to each node, both included."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node in range(1, self.num_tokens):
            paths.append((*paths[self.parents[node]], node))
        return tuple(paths)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The text form: child ranks from the root to every node but the root itself."""
        return tuple(tuple(self.ranks[n] for n in nodes[1:]) for nodes in self.node_paths[1:])

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Tree mask [T, T], True where the column is the row's ancestor or the row itself."""
        import numpy as np

        mask = np.zeros((self.num_tokens, self.num_tokens), dtype=np.bool_)
        for node, nodes in enumerate(self.node_paths):
            mask[node, list(nodes)] = True
        mask.flags.writeable = False
        return mask


def _check_path(path: Path, index: dict[Path, int]) -> None:
    """Raise TreeError unless `path` may be added to the paths in `index`, which come before it."""
    if not path or path[-1] < 0:
        raise TreeError(f"a path is a list of child ranks from 0, got {list(path)}; remove it")
    if path in index:
        raise TreeError(f"every path stands once, got {list(path)} twice; remove one")
    if path[:-1] not in index:
        raise TreeError(
            f"a path needs its parent, but {list(path)} stands without {list(path[:-1])}; add it"
        )
    if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in index:
        sibling = [*path[:-1], path[-1] - 1]
        raise TreeError(
            f"siblings have ranks without gaps, but {list(path)} stands without {sibling}; add it"
        )


OFF = Tree.chain(0)
"""Decoding without speculation: one token, no draft."""

DEFAULT_TREE = Tree.from_paths(
    [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    + [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
)
"""The static tree that STree publishes (arXiv:2505.14969, Fig. 4a): 12 nodes, depth 4."""
