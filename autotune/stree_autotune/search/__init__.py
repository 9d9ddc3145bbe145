"""Which tree to use: solver, Optuna study, certificate, verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.search.bootstrap import (
        PairedBootstrap as PairedBootstrap,
        interval as interval,
    )
    from stree_autotune.search.certificate import (
        Certificate as Certificate,
        certificate_path as certificate_path,
        certify_file as certify_file,
        describe as describe,
        has_certificate as has_certificate,
    )
    from stree_autotune.search.cross_fit import CrossFit as CrossFit
    from stree_autotune.search.draft_choice import best_draft as best_draft
    from stree_autotune.search.profile_sources import (
        find_source_file as find_source_file,
        is_of_server as is_of_server,
        profile_cost as profile_cost,
        profile_runtime as profile_runtime,
        profile_trace as profile_trace,
    )
    from stree_autotune.search.request import TuneRequest as TuneRequest
    from stree_autotune.search.study import (
        EXACT as EXACT,
        Candidates as Candidates,
        CostModel as CostModel,
        SearchResult as SearchResult,
        SearchSetting as SearchSetting,
        StudyPlace as StudyPlace,
        Trial as Trial,
        enqueue as enqueue,
        enqueue_tree as enqueue_tree,
        fastest as fastest,
        open_storage as open_storage,
        search_batch as search_batch,
        search_result as search_result,
        suggest as suggest,
        text_of as text_of,
        tree_from_text as tree_from_text,
    )
    from stree_autotune.search.tree_space import TreeSpace as TreeSpace
    from stree_autotune.search.tuning import Question as Question, ask as ask, tune as tune
    from stree_autotune.search.verdict import (
        Decision as Decision,
        decide as decide,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "bootstrap": ["PairedBootstrap", "interval"],
        "certificate": [
            "Certificate",
            "certificate_path",
            "certify_file",
            "describe",
            "has_certificate",
        ],
        "draft_choice": ["best_draft"],
        "profile_sources": [
            "find_source_file",
            "is_of_server",
            "profile_cost",
            "profile_runtime",
            "profile_trace",
        ],
        "request": ["TuneRequest"],
        "study": [
            "Candidates",
            "CostModel",
            "EXACT",
            "SearchResult",
            "SearchSetting",
            "StudyPlace",
            "Trial",
            "enqueue",
            "enqueue_tree",
            "fastest",
            "open_storage",
            "search_batch",
            "search_result",
            "suggest",
            "text_of",
            "tree_from_text",
        ],
        "tree_space": ["TreeSpace"],
        "tuning": ["Question", "ask", "tune"],
        "cross_fit": ["CrossFit"],
        "verdict": ["Decision", "decide"],
    },
)
