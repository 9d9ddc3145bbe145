"""Results of `vllm bench serve --save-result` and of `vllm bench sweep serve`, as runs.

Read from vllm/benchmarks/serve.py of 0.32: one JSON object a run, keys that `--metadata` adds
beside the others; a sweep's `run=N.json` holds one, its `summary.json` a list. ITL is taken per
streamed chunk, which is a step; TPOT per token. The counters of a run are differences of /metrics,
so that tokens per step are those of this run.
"""

from __future__ import annotations

from collections.abc import Mapping

from stree_autotune.server.files import Document, number, text_of
from stree_autotune.server.runs import AGREES, BenchRun, require_milliseconds, whole_tokens
from stree_core.errors import ConfigError
from stree_core.limits import MAX_BATCH_SIZE

DRAFTS = "spec_decode_num_drafts"


def is_bench(content: Mapping[str, object]) -> bool:
    """True for the result of a run of `vllm bench serve`."""
    return "mean_tpot_ms" in content and "total_output_tokens" in content and "model_id" in content


def read_bench(document: Document) -> BenchRun:
    """Return the run of a result; raise ConfigError when it says what cannot be."""
    content = document.content
    batch_size = _batch_size(document)
    _require_completed(document)
    tpot_ms = number(document, "mean_tpot_ms", least=1e-9)
    rate = number(document, "output_throughput", least=1e-9)
    running = require_milliseconds(document.file, rate, tpot_ms, batch_size)
    given = _given_tokens(document)
    notes: list[str] = []
    tokens, steps, accepted = 0, 0, 0
    by_position: tuple[int, ...] = ()
    if content.get(DRAFTS):
        steps = int(number(document, DRAFTS, least=1))
        drafted = number(document, "spec_decode_draft_tokens", least=1)
        accepted = int(number(document, "spec_decode_accepted_tokens"))
        tokens, note = whole_tokens(document.file, drafted, steps, given)
        by_position = _by_position(document, steps, tokens)
        notes += [note] if note else []
    elif given:
        raise ConfigError(
            f"{document.file} is named a run with K = {given} and has no {DRAFTS}; start the "
            "server with --speculative-config and run it again"
        )
    per_step = 1 + accepted / steps if steps else 1.0
    notes += _disagreement(document, tpot_ms * per_step)
    return BenchRun(
        file=document.file,
        server="vllm",
        version=text_of(document, "server_version", "unknown"),
        target=text_of(document, "stree_target") or text_of(document, "model_id"),
        draft=text_of(document, "stree_draft"),
        method=text_of(document, "stree_method"),
        gpu=text_of(document, "stree_gpu"),
        date=text_of(document, "date")[:8],
        batch_size=batch_size,
        draft_tokens=tokens,
        round=_round(document),
        step_ms=tpot_ms * per_step,
        usual_ms=_optional(document, "median_itl_ms"),
        tokens_per_s=rate,
        running=running,
        context=_context(document),
        steps=steps,
        accepted=accepted,
        by_position=by_position,
        flags=text_of(document, "stree_flags"),
        weights=text_of(document, "stree_weights"),
        notes=tuple(notes),
    )


def _batch_size(document: Document) -> int:
    value = document.content.get("max_concurrency")
    if value is None:
        raise ConfigError(
            f"{document.file} ran without --max-concurrency, so its batch size is unknown; run it "
            "with that flag"
        )
    size = number(document, "max_concurrency", least=1)
    if size > MAX_BATCH_SIZE or size != int(size):
        raise ConfigError(
            f"{document.file}: max_concurrency is a whole number of at most {MAX_BATCH_SIZE}, got "
            f"{size:g}; check it"
        )
    return int(size)


def _require_completed(document: Document) -> None:
    completed = number(document, "completed", least=0)
    failed = document.content.get("failed", 0) or 0
    if completed < 1 or failed:
        raise ConfigError(
            f"{document.file}: every request must succeed, {failed} failed and {completed:g} "
            "completed; look at the server's log and run it again"
        )


def _given_tokens(document: Document) -> int | None:
    text = text_of(document, "stree_k")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 3:
        raise ConfigError(f"{document.file}: stree_k is a whole number, got {text!r}; mend it")
    return int(text)


def _round(document: Document) -> int:
    text = text_of(document, "stree_round")
    return int(text) if text.isdecimal() and len(text) < 5 else 0


def _context(document: Document) -> int:
    """Return the mean length of a sequence halfway through its output."""
    completed = number(document, "completed", least=1)
    length = number(document, "total_input_tokens") + number(document, "total_output_tokens") / 2
    return max(1, round(length / completed))


def _by_position(document: Document, steps: int, tokens: int) -> tuple[int, ...]:
    rates = document.content.get("spec_decode_per_position_acceptance_rates") or []
    if not isinstance(rates, list) or len(rates) > 1024:
        raise ConfigError(f"{document.file}: acceptance by position is a list; run it again")
    counts: list[int] = []
    for rate in rates[:tokens]:
        share = number(Document(document.file, {"a rate by position": rate}), "a rate by position")
        counts.append(min(round(share * steps), counts[-1] if counts else steps))
    return tuple(counts)


def _optional(document: Document, key: str) -> float:
    return number(document, key) if document.content.get(key) is not None else 0.0


def _disagreement(document: Document, step_ms: float) -> list[str]:
    """Say so when streamed chunks took another time than TPOT x tokens per step."""
    chunk_ms = _optional(document, "mean_itl_ms")
    if not chunk_ms or abs(chunk_ms / step_ms - 1) <= AGREES:
        return []
    return [
        f"{document.file}: a streamed chunk takes {chunk_ms:.3g} ms and TPOT x tokens per step "
        f"says {step_ms:.3g} ms; chunks were merged or counters are not this run's; the latter "
        "is used"
    ]
