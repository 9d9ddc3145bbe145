"""What a decoding step costs in time and memory, measured or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.cost.estimate import Estimate as Estimate
    from stree_autotune.cost.layout import (
        kind_of as kind_of,
        quiet_families as quiet_families,
    )
    from stree_autotune.cost.memory import MemoryModel as MemoryModel
    from stree_autotune.cost.shape_table import (
        ShapeQuestion as ShapeQuestion,
        estimate_shapes as estimate_shapes,
        nearest_measured as nearest_measured,
    )
    from stree_autotune.cost.step_cost import StepCost as StepCost
    from stree_autotune.cost.table_cost import (
        RuntimeInputs as RuntimeInputs,
        load_table as load_table,
        off_disagreements as off_disagreements,
        read_runtime as read_runtime,
        runtime_cost as runtime_cost,
        siblings_of as siblings_of,
    )
    from stree_autotune.cost.terms import PER_TOKENS as PER_TOKENS
    from stree_autotune.cost.traffic import model_cost as model_cost
    from stree_autotune.cost.tree_shape import FEWEST_ROWS as FEWEST_ROWS
    from stree_autotune.cost.work import (
        PRODUCT_TILE as PRODUCT_TILE,
        ROW_EDGES as ROW_EDGES,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "estimate": ["Estimate"],
        "layout": ["kind_of", "quiet_families"],
        "memory": ["MemoryModel"],
        "shape_table": ["ShapeQuestion", "estimate_shapes", "nearest_measured"],
        "step_cost": ["StepCost"],
        "table_cost": [
            "RuntimeInputs",
            "load_table",
            "off_disagreements",
            "read_runtime",
            "runtime_cost",
            "siblings_of",
        ],
        "terms": ["PER_TOKENS"],
        "traffic": ["model_cost"],
        "tree_shape": ["FEWEST_ROWS"],
        "work": ["PRODUCT_TILE", "ROW_EDGES"],
    },
)
