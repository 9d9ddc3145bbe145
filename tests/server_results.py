"""What servers and load generators write, made by formula in their real keys."""

from __future__ import annotations

from typing import Any

SGLANG_INFO: dict[str, Any] = {
    "model_path": "target",
    "version": "0.5.23",
    "speculative_algorithm": None,
    "internal_states": [{"avg_spec_accept_length": 2.0, "step_time_dict": {}}],
}


def vllm_result(
    tokens: int,
    *,
    batch_size: int = 1,
    accepted: tuple[int, ...] = (700, 400, 200, 100),
    drafted: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Return a result of `vllm bench serve` (keys of 0.32): 1000 drafts, off takes 10 ms."""
    steps, kept = 1000, accepted[:tokens]
    per_step = 1 + sum(kept) / steps
    tpot = 10.0 if tokens == 0 else 8.0
    tpot = changes.get("mean_tpot_ms", tpot)
    itl = tpot * per_step if isinstance(tpot, float) else 10.0
    result: dict[str, Any] = {
        "date": "20261129-120000",
        "endpoint_type": "openai",
        "model_id": "target",
        "num_prompts": 8,
        "request_rate": "inf",
        "max_concurrency": batch_size,
        "duration": 20.0,
        "completed": 8,
        "failed": 0,
        "total_input_tokens": 512,
        "total_output_tokens": 2100,
        "output_throughput": batch_size * 1000 / (8.0 if tokens else 10.0),
        "mean_ttft_ms": 30.0,
        "mean_tpot_ms": tpot,
        "mean_itl_ms": itl,
        "median_itl_ms": itl,
        "server_version": "0.33.0",
        "stree_draft": "draft",
    }
    if tokens:
        rates = [count / steps for count in kept]
        result |= {
            "spec_decode_num_drafts": steps,
            "spec_decode_draft_tokens": drafted or steps * tokens,
            "spec_decode_accepted_tokens": sum(kept),
            "spec_decode_acceptance_length": per_step,
            "spec_decode_per_position_acceptance_rates": rates,
        }
    return result | changes


def sglang_line(
    tokens: int,
    batch_size: int,
    *,
    topk: int = 1,
    accept_length: float = 2.0,
    step_s: float = 0.018,
) -> dict[str, Any]:
    """Return a line of bench_serving (keys of 2026): a step takes 12 ms off, 18 ms with K."""
    step_s = step_s if tokens else 0.012
    per_step = accept_length if tokens else 1.0
    tpot = 18.0 / 2.0 if tokens else 12.0
    state = {"step_time_dict": {str(batch_size): [step_s] * 5}}
    info: dict[str, Any] = {
        "model_path": "target",
        "version": "0.5.23",
        "speculative_algorithm": "NEXTN" if tokens else None,
        "speculative_num_steps": tokens or None,
        "speculative_eagle_topk": topk if tokens else None,
        "internal_states": [state],
    }
    return {
        "tag": "stree-round-1",
        "backend": "sglang",
        "max_concurrency": batch_size,
        "server_info": info,
        "completed": 8,
        "total_input_tokens": 512,
        "total_output_tokens": 2048,
        "output_throughput": batch_size * 1000 / tpot,
        "mean_tpot_ms": tpot,
        "mean_itl_ms": tpot,
        "accept_length": per_step if tokens else None,
    }


def metrics_text(drafts: int, tokens: int, by_position: tuple[int, ...]) -> str:
    """Return the counters of vLLM's /metrics (v1/spec_decode/metrics.py of 0.32)."""
    labels = 'engine="0",model_name="target"'
    lines = ["# TYPE vllm:spec_decode_num_drafts_total counter"]
    for name, value in (
        ("drafts", drafts),
        ("draft_tokens", drafts * tokens),
        ("accepted_tokens", sum(by_position)),
    ):
        lines.append(f"vllm:spec_decode_num_{name}_total{{{labels}}} {float(value)}")
        lines.append(f"vllm:spec_decode_num_{name}_created{{{labels}}} 1.79e+09")
    for place, count in enumerate(by_position):
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines.append(f'{name}{{{labels},position="{place}"}} {float(count)}')
    return "\n".join(lines) + "\n"


def response(kind: str) -> dict[str, Any]:
    """Return a request's record with rates 0.7 and 0.4 at K = 2, as three servers report it."""
    histogram = [30, 30, 40]
    if kind == "sglang":
        return {"text": "", "meta_info": {"spec_verify_ct": 100, "completion_tokens": 210,
                "spec_correct_drafts_histogram": histogram}}  # fmt: skip
    record: dict[str, Any] = {
        "mean_acceptance_length": 2.1,
        "draft_acceptance_rate": 0.55,
        "acceptance_histogram": histogram,
        "num_spec_steps": 100,
        "num_accepted_draft_tokens": 110,
        "num_draft_tokens": 200,
        "num_spec_tokens": 2,
    }
    if kind == "aiperf":
        sparse = {str(place): count for place, count in enumerate(histogram)}
        record |= {"engine": "vllm", "acceptance_histogram": sparse}
        return {"metadata": {"session_num": 1}, "spec_decode": record}
    return {"id": "cmpl-1", "metrics": {"speculative_decoding": record}}
