"""Acceptance traces: recording, files, and walking a tree over one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.trace.checkpoint import (
        Settings as Settings,
        TraceCheckpoint as TraceCheckpoint,
        explained_writing as explained_writing,
    )
    from stree_autotune.trace.file import (
        MAX_FILE_BYTES as MAX_FILE_BYTES,
        RELIABLE_PROMPTS as RELIABLE_PROMPTS,
        Trace as Trace,
        TraceMeta as TraceMeta,
        load_trace as load_trace,
        parse_trace as parse_trace,
        save_trace as save_trace,
        trace_meta as trace_meta,
    )
    from stree_autotune.trace.lockstep import Lockstep as Lockstep
    from stree_autotune.trace.record import (
        RecordConfig as RecordConfig,
        Recording as Recording,
        make_meta as make_meta,
        make_trace as make_trace,
        record_prompts as record_prompts,
        record_trace as record_trace,
    )
    from stree_autotune.trace.shard import (
        Shard as Shard,
        current_shard as current_shard,
        take_own_gpu as take_own_gpu,
    )
    from stree_autotune.trace.tree_walk import (
        FlatTrace as FlatTrace,
        Ints as Ints,
        advance_table as advance_table,
        conditional_rates as conditional_rates,
        count_starts as count_starts,
        emitted_per_step as emitted_per_step,
        flat_trace as flat_trace,
        level_slices as level_slices,
        longest_paths as longest_paths,
        marginal_rates as marginal_rates,
        pooled_tokens_per_step as pooled_tokens_per_step,
        sibling_ranks as sibling_ranks,
        start_places as start_places,
        walk as walk,
        walk_nested as walk_nested,
    )
    from stree_autotune.trace.typed_rates import (
        RATES as RATES,
        TYPED as TYPED,
        parse_rates as parse_rates,
        rates_of as rates_of,
        rates_source as rates_source,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "checkpoint": ["Settings", "TraceCheckpoint", "explained_writing"],
        "file": [
            "MAX_FILE_BYTES",
            "RELIABLE_PROMPTS",
            "Trace",
            "TraceMeta",
            "load_trace",
            "parse_trace",
            "save_trace",
            "trace_meta",
        ],
        "lockstep": ["Lockstep"],
        "record": [
            "RecordConfig",
            "Recording",
            "make_meta",
            "make_trace",
            "record_prompts",
            "record_trace",
        ],
        "shard": ["Shard", "current_shard", "take_own_gpu"],
        "tree_walk": [
            "FlatTrace",
            "Ints",
            "advance_table",
            "conditional_rates",
            "count_starts",
            "emitted_per_step",
            "flat_trace",
            "level_slices",
            "longest_paths",
            "marginal_rates",
            "pooled_tokens_per_step",
            "sibling_ranks",
            "start_places",
            "walk",
            "walk_nested",
        ],
        "typed_rates": ["RATES", "TYPED", "parse_rates", "rates_of", "rates_source"],
    },
)
