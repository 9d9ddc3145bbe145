"""Optuna's side of a search: what a trial proposes, and what is queued before it may propose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import optuna

from stree_autotune.growth import MAX_DEPTH
from stree_autotune.tree_space import Cell, TreeSpace
from stree_core.tree import DEFAULT_TREE, Tree

LONGEST_CHAIN = 8
EXACT = "exact"
"""The user attribute of a trial whose tree is given as it stands."""


def suggest(trial: optuna.Trial, space: TreeSpace) -> Tree:
    """Let Optuna choose a cell, and return its tree."""
    trial.suggest_int("depth", 1, MAX_DEPTH)
    trial.suggest_categorical("width", space.widths)
    trial.suggest_int("num_nodes", 0, space.max_nodes)
    return tree_of(trial, space)


def tree_of(trial: optuna.Trial | optuna.trial.FrozenTrial, space: TreeSpace) -> Tree:
    """Return the tree of a trial: its cell's, or the one that was enqueued as it stands."""
    text = trial.user_attrs.get(EXACT)
    return space.solve(Cell(**trial.params)) if text is None else tree_from_text(text)


def enqueue(study: optuna.Study, space: TreeSpace, picks: Sequence[Cell]) -> None:
    """Queue off, the chains, the picked cells, and the default tree where it fits the limits.

    What the study knows already is not queued again.
    """
    chains = range(1, min(LONGEST_CHAIN, space.max_nodes) + 1)
    cells = [Cell(1, 1, 0), *(Cell(length, 1, length) for length in chains), *picks]
    for cell in cells:
        study.enqueue_trial(asdict(cell), skip_if_exists=True)
    fits_trace = DEFAULT_TREE.max_children <= space.slots.num_children
    if fits_trace and DEFAULT_TREE.num_nodes <= space.max_nodes:
        enqueue_tree(study, space, DEFAULT_TREE)


def enqueue_tree(study: optuna.Study, space: TreeSpace, tree: Tree) -> None:
    """Queue a tree as it stands rather than what its cell would be solved to."""
    text = text_of(tree)
    known = study.get_trials(deepcopy=False)
    if all(trial.user_attrs.get(EXACT) != text for trial in known):
        fitting = (width for width in space.widths if width >= tree.max_children)
        cell = Cell(max(1, tree.depth), next(fitting, space.widths[-1]), tree.num_nodes)
        study.enqueue_trial(asdict(cell), user_attrs={EXACT: text})


def text_of(tree: Tree) -> str:
    """Return the text by which studies name a tree."""
    return json.dumps(tree.parents[1:])


def tree_from_text(text: str) -> Tree:
    """Return the tree that `text_of` has written."""
    return Tree((-1, *json.loads(text)))
