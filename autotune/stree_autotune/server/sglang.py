"""Results of SGLang's bench_serving and its /server_info, as runs.

Read from sglang/benchmark/serving.py and srt/managers/scheduler_metrics_mixin.py of 2026: a result
is a line of JSON that holds the whole /server_info. With SGLANG_RECORD_STEP_TIME=1 its
`step_time_dict` has seconds per step by running requests, one value per decode log. ITL of a
result is divided by the tokens of its chunk, so it is per token and no step time. `accept_length`
counts the bonus token and is a mean since the server started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stree_autotune.server.files import LARGEST, Document, number, text_of
from stree_autotune.server.runs import AGREES, BenchRun, require_milliseconds
from stree_autotune.server.tables import MAX_DRAFT_TOKENS, median
from stree_core.errors import ConfigError, brief
from stree_core.limits import MAX_BATCH_SIZE

FEWEST_LOGS = 3
MAX_LOGS = 100_000


def is_bench(content: Mapping[str, Any]) -> bool:
    """True for a line of bench_serving."""
    return "server_info" in content and "mean_tpot_ms" in content


def is_server_info(content: Mapping[str, Any]) -> bool:
    """True for the answer of /server_info."""
    return "internal_states" in content and "model_path" in content


def read_bench(document: Document) -> BenchRun:
    """Return the run of a line; raise ConfigError when it says what cannot be."""
    info = document.content.get("server_info")
    if not isinstance(info, Mapping) or not is_server_info(info):
        raise ConfigError(
            f"{document.file} has no server_info of SGLang; run bench_serving against its server"
        )
    batch_size = int(number(document, "max_concurrency", least=1))
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ConfigError(f"{document.file}: max_concurrency is too large; check it")
    tpot_ms = number(document, "mean_tpot_ms", least=1e-9)
    rate = number(document, "output_throughput", least=1e-9)
    running = require_milliseconds(document.file, rate, tpot_ms, batch_size)
    tokens = draft_tokens(info, document.file)
    per_step = _tokens_per_step(document, tokens)
    outputs = number(document, "total_output_tokens", least=1)
    steps = round(outputs / per_step) if tokens else 0
    step_ms, notes = _step_ms(document, info, batch_size, tpot_ms * per_step)
    completed = number(document, "completed", least=1)
    context = (number(document, "total_input_tokens") + outputs / 2) / completed
    return BenchRun(
        file=document.file,
        server="sglang",
        version=str(info.get("version") or "unknown")[:60],
        target=str(info["model_path"])[:200],
        draft=str(info.get("speculative_draft_model_path") or "")[:200],
        method=_method(info),
        gpu="",
        date=text_of(document, "date")[:8],
        batch_size=batch_size,
        draft_tokens=tokens,
        round=_round(document),
        step_ms=step_ms,
        usual_ms=0.0,
        tokens_per_s=rate,
        running=running,
        context=max(1, round(context)),
        steps=steps,
        accepted=round((per_step - 1) * steps),
        by_position=(),
        weights=str(info.get("weight_version") or "")[:60],
        notes=tuple(notes),
    )


def _method(info: Mapping[str, Any]) -> str:
    """Return the way to draft by vLLM's names, so that one profile serves both."""
    name = str(info.get("speculative_algorithm") or "").lower()[:60]
    return {"standalone": "draft_model", "nextn": "mtp"}.get(name, name)


def draft_tokens(info: Mapping[str, Any], file: str) -> int:
    """Return K of a server, 0 when it does not speculate; raise ConfigError for trees."""
    if not info.get("speculative_algorithm"):
        return 0
    steps, width = info.get("speculative_num_steps"), info.get("speculative_eagle_topk")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_DRAFT_TOKENS:
        raise ConfigError(
            f"{file}: speculative_num_steps is 1 to {MAX_DRAFT_TOKENS}, got {brief(steps)}; check "
            "it"
        )
    if width not in (None, 1):
        raise ConfigError(
            f"{file}: runs must be chains, got --speculative-eagle-topk {brief(width)}; run it "
            "with 1"
        )
    return steps


def _round(document: Document) -> int:
    tag = text_of(document, "tag").removeprefix("stree-round-")
    return int(tag) if tag.isdecimal() and len(tag) < 5 else 0


def _tokens_per_step(document: Document, tokens: int) -> float:
    if tokens == 0:
        return 1.0
    length = number(document, "accept_length", least=1)
    if length > tokens + 1:
        raise ConfigError(
            f"{document.file}: accept_length is at most K + 1 = {tokens + 1}, got {length:g}; the "
            "server changed its K, run it with a fixed one"
        )
    return length


def _step_ms(
    document: Document, info: Mapping[str, Any], batch_size: int, derived_ms: float
) -> tuple[float, list[str]]:
    """Return the recorded step time where enough of it was, else TPOT x accept length."""
    states = info["internal_states"]
    state = states[0] if isinstance(states, list) and states else {}
    recorded = state.get("step_time_dict") if isinstance(state, Mapping) else None
    values = recorded.get(str(batch_size)) if isinstance(recorded, Mapping) else None
    if not isinstance(values, list) or len(values) < FEWEST_LOGS:
        return derived_ms, []
    if len(values) > MAX_LOGS or not all(_is_time(value) for value in values):
        raise ConfigError(
            f"{document.file}: step_time_dict holds up to {MAX_LOGS} positive seconds, got "
            f"{brief(values[:3])}; run it again"
        )
    step_ms = 1000 * median(values)
    if step_ms > 100 * derived_ms:
        raise ConfigError(
            f"{document.file}: step_time_dict is in seconds, {step_ms / 1000:g} s do not fit "
            f"{derived_ms:.3g} ms by TPOT; convert it"
        )
    if abs(step_ms / derived_ms - 1) <= AGREES:
        return step_ms, []
    return derived_ms, [
        f"{document.file}: step_time_dict says {step_ms:.3g} ms and TPOT x accept length "
        f"{derived_ms:.3g} ms; the former holds whatever happens between two logs, the latter "
        "is used"
    ]


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST
