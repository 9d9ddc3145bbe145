"""How many tokens the steps of a walk emit, and the shares that servers ask for, of chains.

Conventions: *emitted* counts the bonus token; the *marginal* rate of draft token i is the share of
steps that accept it (and so all before it), its *conditional* rate the share among the steps that
accept all before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stree_autotune.trace_file import Trace
from stree_autotune.trace_walk import walk
from stree_core.tree import Tree


def emitted_per_step(trace: Trace, tree: Tree) -> NDArray[np.int64]:
    """Return how many tokens each step of a walk emits, in the trace's order.

    A prompt's first step starts where the prompt before it ends, so that steps lie end to end; the
    last step of a prompt counts what is left of it. The mean is the walk's tokens per step.
    """
    starts = walk(trace, tree).starts
    return np.diff(np.append(starts, trace.num_positions))


def marginal_rates(trace: Trace, length: int) -> list[float]:
    """Return the marginal rates of a chain; they never rise, and 1 + sum is tokens per step."""
    emitted = emitted_per_step(trace, Tree.chain(length))
    return [float((emitted > depth).mean()) for depth in range(1, length + 1)]


def conditional_rates(marginals: Sequence[float]) -> list[float]:
    """Return the conditional rates; 0 where no step comes that far."""
    before = [1.0, *marginals[:-1]]
    return [now / then if then else 0.0 for now, then in zip(marginals, before, strict=True)]
