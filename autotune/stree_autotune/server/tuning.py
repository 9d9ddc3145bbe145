"""From a server table and an acceptance to a profile whose times are the server's."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from stree_autotune.server.acceptance import (
    TokensPerStep,
    from_rates,
    from_server,
    from_trace,
)
from stree_autotune.server.choice import Choice, choose, options_by_size
from stree_autotune.server.fit import fit_steps
from stree_autotune.server.policy import at_sizes, explained, next_measurement, smoothed
from stree_autotune.server.tables import (
    ServerTable,
    find_one,
    load_server_acceptance,
    load_server_table,
    short_name,
)
from stree_autotune.store import Library, command, provenance
from stree_autotune.trace import TYPED, load_trace, parse_rates, rates_source
from stree_core.errors import ConfigError, MissingMeasurement
from stree_core.files import sha256_of
from stree_core.profile import (
    GpuRef,
    Interval,
    ModelRef,
    PolicyRow,
    Predicted,
    Profile,
    Sampling,
    ServerRef,
    Source,
    Sources,
    TreeText,
)
from stree_core.tree import Tree, Verdict

logger = logging.getLogger(__name__)

NAMES = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """What `stree-tune --server` was asked; empty words and sizes are taken from the files.

    Acceptance is the dataset's as the server counted it, the trace named `acceptance_from`, or
    marginal `rates` as typed.
    """

    server: str
    gpu: str
    dataset: str
    target: str
    draft: str
    sampling: Sampling
    batch_sizes: tuple[int, ...]
    data: tuple[Path, ...]
    acceptance_from: str
    rates: str
    smooth: bool
    seed: int


@dataclass(frozen=True, slots=True)
class ServerVerdict:
    """A profile, and what would change it most."""

    profile: Profile
    next_step: str


def tune_server(request: ServerRequest) -> ServerVerdict:
    """Decide every batch size of a server table.

    Raises ConfigError for names and files that do not fit each other, MissingMeasurement for what
    was not run.
    """
    if request.server not in NAMES:
        raise ConfigError(f"--server is vllm or sglang, got {request.server}; pass one of them")
    library = Library.open(request.data)
    pattern = (
        request.gpu,
        request.server,
        short_name(request.target),
        short_name(request.draft),
    )
    path = find_one(library.roots, pattern, "times.yaml", _plan_command(request))
    table = load_server_table(path)
    rng = np.random.default_rng(request.seed)
    tokens, source, dataset = _tokens(request, library, table, rng)
    options = options_by_size(fit_steps(table), tokens, rng)
    _say_left_out(table, sorted(options))
    choices: Sequence[Choice] = [choose(each) for each in options.values()]
    choices = smoothed(choices) if request.smooth else explained(choices)
    choices = at_sizes(choices, request.batch_sizes)
    runtime = Source(
        name=library.label(path), sha256=sha256_of(path), status="measured", note=_measured(table)
    )
    sources = Sources(runtime=runtime, trace=source)
    profile = _profile(request, table, choices, sources, dataset)
    return ServerVerdict(profile, next_measurement(choices))


def _plan_command(request: ServerRequest) -> str:
    words = ["plan", "--server", request.server, "--gpu", request.gpu or "GPU"]
    return command(*words, "--target", request.target or "TARGET", "--draft", request.draft or "D")


def _say_left_out(table: ServerTable, decided: Sequence[int]) -> None:
    left = [size for size in table.batch_sizes if size not in decided]
    if left:
        logger.warning(
            "no verdict for batch size %s: it was not measured both off and with a K",
            ", ".join(map(str, left)),
        )


def _measured(table: ServerTable) -> str:
    served = table.served
    return f"measured on {NAMES[served.server]} {served.version}, {shown_date(served.date)}"


def shown_date(date: str) -> str:
    """Return 20261129 as 2026-11-29, anything else as it is."""
    if len(date) == 8 and date.isdecimal():
        return f"{date[:4]}-{date[4:6]}-{date[6:]}"
    return date


def _tokens(
    request: ServerRequest, library: Library, table: ServerTable, rng: np.random.Generator
) -> tuple[TokensPerStep, Source, str]:
    """Return the acceptance that was asked for, its source, and the dataset that it is of."""
    if request.rates and request.acceptance_from:
        raise ConfigError("acceptance has one source, got --rates and --acceptance-from; drop one")
    if request.rates:
        rates = parse_rates(request.rates)
        return from_rates(rates), rates_source(rates), request.dataset or TYPED
    if request.acceptance_from:
        path = library.find_trace_file(request.acceptance_from)
        counts = sorted({cell.draft_tokens for cell in table.cells} - {0})
        trace = load_trace(path)
        lender = f"{trace.meta.target.name} + {trace.meta.draft.name}, {trace.meta.dataset}"
        note = f"borrowed from {lender}, walked as chains"
        source = _source(library, path, note, estimated=True)
        return from_trace(trace, counts), source, request.dataset or trace.meta.dataset
    return *_counted(request, library, table, rng), request.dataset


def _counted(
    request: ServerRequest, library: Library, table: ServerTable, rng: np.random.Generator
) -> tuple[TokensPerStep, Source]:
    served = table.served
    pattern = (
        served.gpu,
        served.server,
        short_name(served.target),
        short_name(served.draft),
        request.dataset,
    )
    if not request.dataset:
        raise ConfigError("tuning needs --dataset, --rates or --acceptance-from; pass one of them")
    made = command("import", "FILES", "--gpu", served.gpu, "--dataset", request.dataset)
    path = find_one(library.roots, pattern, "acceptance.yaml", made)
    acceptance = load_server_acceptance(path)
    theirs = acceptance.served
    if (theirs.target, theirs.draft, theirs.version) != (
        served.target,
        served.draft,
        served.version,
    ):
        raise ConfigError(
            f"times and acceptance must be of one server and pair, got {served.version} of "
            f"{served.target} and {theirs.version} of {theirs.target}; import both together"
        )
    return from_server(acceptance, rng), _source(library, path, "counted by the server")


def _source(library: Library, path: Path, note: str, *, estimated: bool = False) -> Source:
    status: Literal["estimated", "measured"] = "estimated" if estimated else "measured"
    return Source(name=library.label(path), sha256=sha256_of(path), status=status, note=note)


def _profile(
    request: ServerRequest,
    table: ServerTable,
    choices: Sequence[Choice],
    sources: Sources,
    dataset: str,
) -> Profile:
    served = table.served
    return Profile(
        target=_ref(served.target),
        draft=_ref(served.draft),
        gpu=GpuRef(name=served.gpu, status="measured"),
        dataset=dataset,
        sampling=request.sampling,
        context=table.context,
        policy=tuple(_row(choice) for choice in choices),
        server=ServerRef(
            name=served.server,
            version=served.version,
            method=served.method,
            date=shown_date(served.date),
        ),
        sources=sources,
        provenance=provenance(request.seed),
    )


def _ref(name: str) -> ModelRef:
    """Return a model by the server's name; servers report no config, so its hash is the name's."""
    return ModelRef(name=short_name(name), config_sha256=hashlib.sha256(name.encode()).hexdigest())


def _row(choice: Choice) -> PolicyRow:
    options, count = choice.options, choice.draft_tokens
    gain = options.gain(count, 0)
    verdict: Verdict = "chain" if count else "off"
    place = options.place(count)
    return PolicyRow(
        batch_size=choice.batch_size,
        verdict=verdict,
        tree=TreeText(paths=Tree.chain(count).paths),
        predicted=Predicted(
            tokens_per_step=_rounded(options.tokens_per_step[place]),
            step_ms=_rounded(options.step_ms[place]),
            tokens_per_s=_rounded(options.tokens_per_s(count)),
            speedup=_rounded(gain.value),
            speedup_interval=Interval(low=_rounded(gain.low), high=_rounded(gain.high)),
        ),
        reason=choice.reason[:500],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def rates_by_size(table: ServerTable, tokens: TokensPerStep) -> dict[int, dict[int, float]]:
    """Return the fitted tokens/s of every measured K, by batch size."""
    options = options_by_size(fit_steps(table), tokens, np.random.default_rng(0))
    if not options:
        raise MissingMeasurement(
            "the server table has no batch size with off and a K; run the plan"
        )
    return {
        size: {count: each.tokens_per_s(count) for count in each.draft_tokens}
        for size, each in options.items()
    }
