"""`stree-tune --measure`: a question answered by live steps on this machine's device."""

from __future__ import annotations

import logging

from stree_autotune.live.measure import live_measure
from stree_autotune.live.search import NUM_LIVE_TRIALS, LiveResult, LiveSearch
from stree_autotune.search import (
    CrossFit,
    Decision,
    Question,
    SearchSetting,
    StudyPlace,
    TreeSpace,
    Trial,
    TuneRequest,
    ask,
    decide,
    open_storage,
)
from stree_autotune.store import PairRequest, open_pair, utc_now, versions
from stree_core.drafting import Pair, Runtime, device_name, short_gpu_name
from stree_core.errors import ConfigError
from stree_core.models import resolve_device
from stree_core.profile import Measured, MeasuredBlock, Profile

logger = logging.getLogger(__name__)


def tune_live(request: TuneRequest) -> Profile:
    """Measure trees of every batch size, decide by what was measured, and return the profile.

    Raises what `ask` raises, and ConfigError when this machine is not the one that is asked about,
    or for sampling, whose steps are not timed live.
    """
    if request.sampling.rule != "greedy":
        raise ConfigError(
            f"--measure times greedy steps, got sampling {request.sampling.label}; leave --measure "
            "out, so that the rule's measured terms are used"
        )
    question = ask(request)
    pair = open_question_pair(question)
    search = live_search(question, pair)
    decisions, rows = [], []
    for batch_size in question.request.batch_sizes:
        result = search.run(batch_size)
        decisions.append(decide_live(question, result))
        logger.info("batch size %d: %s", batch_size, decisions[-1].reason)
        rows += measured_rows(result)
    gpu = device_name(pair.device)
    block = MeasuredBlock(gpu=gpu, date=utc_now(), versions=versions(), rows=tuple(rows))
    return question.profile(decisions, block)


def live_search(question: Question, pair: Pair, *, in_memory: bool = False) -> LiveSearch:
    """Return the search of a question's trees, its trials in a journal unless named elsewhere."""
    request, (target, draft) = question.request, question.refs
    storage = request.storage
    if not storage and not in_memory:
        name = f"{request.gpu}--{target.name}--{draft.name}.journal"
        storage = str(request.studies / name)
        logger.info("trials are kept in %s; delete it to measure anew", storage)
    place = StudyPlace(open_storage(storage), f"live, {question.name}")
    return LiveSearch(
        TreeSpace.of(question.trace, request.max_nodes),
        question.runtime.cost,
        live_measure(pair, question.trace, request.context),
        SearchSetting(request.num_trials or NUM_LIVE_TRIALS, place, question.memory),
        request.seed,
        logger.info,
    )


def decide_live(question: Question, result: LiveResult) -> Decision:
    """Return the verdict among the measured trees, by their measured times."""
    request = question.request
    fit = CrossFit.of(question.trace, result.cost, max_nodes=request.max_nodes, seed=request.seed)
    return decide(result.search, fit, request.max_token_ms, request.prefer)


def measured_rows(result: LiveResult) -> list[Measured]:
    """Return what was measured, the fastest first."""
    ranked = sorted(result.search.trials, key=lambda trial: -trial.tokens_per_s)
    return [_measured(trial, result) for trial in ranked]


def _measured(trial: Trial, result: LiveResult) -> Measured:
    tree, spread_ms = trial.tree, result.cost.steps[trial.tree].spread_ms
    return Measured(
        batch_size=result.search.batch_size,
        mode=tree.full_label,
        tokens_per_step=float(f"{trial.tokens_per_step:.6g}"),
        step_ms=float(f"{trial.step_ms:.6g}"),
        spread_ms=float(f"{spread_ms:.3g}"),
        tokens_per_s=float(f"{trial.tokens_per_s:.6g}"),
    )


def open_question_pair(question: Question) -> Pair:
    """Load the pair in the dtype of its table; raise ConfigError on another device than asked."""
    request, table = question.request, question.runtime.table
    place = "cpu" if request.gpu == "cpu" else "auto"
    device = resolve_device(place)
    here = short_gpu_name(device_name(device), device)
    if here != request.gpu:
        raise ConfigError(
            f"--measure runs on the GPU that it is asked about, got --gpu {request.gpu} on {here}; "
            f"pass --gpu {here}, or leave out --measure"
        )
    shapes = table.weights == "random"
    runtime = Runtime(place, table.dtype, table.backend)
    models = PairRequest(request.target, request.draft, request.data, runtime, shapes)
    return open_pair(models)
