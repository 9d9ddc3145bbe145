"""What proposes a tree's tokens: drafts, their rows, prompts, and the pair of target and draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_core.drafting.draft import (
        Draft as Draft,
        PromptReader as PromptReader,
        StepEnd as StepEnd,
        TargetReader as TargetReader,
        as_draft as as_draft,
    )
    from stree_core.drafting.forced_starts import (
        ForcedStarts as ForcedStarts,
        KnownTexts as KnownTexts,
    )
    from stree_core.drafting.mtp_draft import MtpDraft as MtpDraft
    from stree_core.drafting.pair import (
        Pair as Pair,
        Runtime as Runtime,
        device_name as device_name,
        gpu_warning as gpu_warning,
        load_pair as load_pair,
        load_single as load_single,
        load_with_head as load_with_head,
        require_profile_fits as require_profile_fits,
        short_gpu_name as short_gpu_name,
    )
    from stree_core.drafting.prefill import Prefill as Prefill, PromptPart as PromptPart
    from stree_core.drafting.tree_plan import (
        DraftLevel as DraftLevel,
        ModelRows as ModelRows,
        TreePlan as TreePlan,
        make_plan as make_plan,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "draft": ["Draft", "PromptReader", "StepEnd", "TargetReader", "as_draft"],
        "forced_starts": ["ForcedStarts", "KnownTexts"],
        "mtp_draft": ["MtpDraft"],
        "pair": [
            "Pair",
            "Runtime",
            "device_name",
            "gpu_warning",
            "load_pair",
            "load_single",
            "load_with_head",
            "require_profile_fits",
            "short_gpu_name",
        ],
        "prefill": ["Prefill", "PromptPart"],
        "tree_plan": ["DraftLevel", "ModelRows", "TreePlan", "make_plan"],
    },
)
