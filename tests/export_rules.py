"""What servers accept, and what they would do: from the sources that docs/serve-it.md names.

Each `check_` raises AssertionError where its server would refuse; each `_at` returns the draft
tokens that its server would use for a number of active sequences.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

VLLM_METHODS = {"draft_model", "ngram", "suffix", "medusa", "mlp_speculator", "eagle", "eagle3"}
VLLM_KEYS = {
    "method",
    "model",
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
    "draft_sample_method",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
}
PROFILE_KEYS = {
    "schema_version",
    "measured",
    "method",
    "draft_checkpoint",
    "target_model",
    "num_speculative_tokens",
    "block_size",
    "max_supported_k",
    "verification_method",
    "conditional_accept_rates",
    "marginal_accept_rates",
    "mean_accept_length",
    "mean_accept_length_per_request",
    "accept_length_model",
    "accept_length_by_k",
    "acceptance_length_histogram",
    "per_category",
    "measurement_conditions",
    "validation",
}


def check_vllm(config: dict[str, Any]) -> None:
    """SpeculativeConfig and validate_and_normalize_dynamic_sd_schedule."""
    assert set(config) <= VLLM_KEYS
    assert config["method"] in VLLM_METHODS
    assert isinstance(config["model"], str)
    assert config.get("draft_sample_method", "greedy") in ("greedy", "probabilistic")
    most = config["num_speculative_tokens"]
    assert most > 0
    end = 0
    for first, last, length in config.get("num_speculative_tokens_per_batch_size", [[1, 1, 1]]):
        assert first == end + 1
        assert first <= last
        assert 0 <= length <= most
        end = last
    rates = config.get("synthetic_acceptance_rates")
    assert (rates is None) == (config.get("rejection_sample_method", "standard") == "standard")
    if rates is not None:
        assert len(rates) == most
        assert all(0 <= rate <= 1 for rate in rates)
        assert rates == sorted(rates, reverse=True)


def vllm_at(config: dict[str, Any], sequences: int) -> int:
    """build_dynamic_sd_schedule_lookup: the last K holds above the last range."""
    length: int = config["num_speculative_tokens"]
    for first, _, here in config.get("num_speculative_tokens_per_batch_size", []):
        if first <= sequences:
            length = here
    return length


def check_sglang_adaptive(config: dict[str, Any]) -> None:
    """_load_adaptive_config: integer keys, each with non-negative candidate steps."""
    assert config
    for key, entry in config.items():
        assert key.isdigit()
        steps = entry["candidate_steps"]
        assert steps
        assert all(isinstance(step, int) and step >= 0 for step in steps)


def sglang_adaptive_at(config: dict[str, Any], sequences: int) -> int:
    """AdaptiveStepRouter: keys are lower bounds."""
    keys = sorted(map(int, config))
    key = keys[max(0, bisect.bisect_right(keys, sequences) - 1)]
    (step,) = config[str(key)]["candidate_steps"]
    return int(step)


def check_sglang_flags(argv: Sequence[str]) -> dict[str, str]:
    """_handle_eagle_family; candidates are top-k, and top-k squared in every further step."""
    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    assert flags["--speculative-algorithm"] == "STANDALONE"
    steps = int(flags["--speculative-num-steps"])
    top_k = int(flags["--speculative-eagle-topk"])
    tokens = int(flags["--speculative-num-draft-tokens"])
    assert steps >= 1
    if top_k == 1:
        assert tokens == steps + 1
    else:
        assert tokens - 1 <= top_k + (steps - 1) * top_k**2
    return flags


def check_tensorrt_llm(content: dict[str, Any]) -> None:
    """DraftTargetDecodingConfig and validate_draft_len_schedule_and_sort."""
    assert set(content) == {"speculative_config"}
    config = content["speculative_config"]
    keys = {"decoding_type", "max_draft_len", "speculative_model", "draft_len_schedule"}
    assert set(config) <= keys
    assert config["decoding_type"] == "Draft_Target"
    assert config["max_draft_len"] > 0
    assert config["speculative_model"]
    schedule = config.get("draft_len_schedule")
    if schedule is not None:
        assert all(isinstance(key, int) and key >= 1 for key in schedule)
        assert schedule[min(schedule)] == config["max_draft_len"]
        assert all(0 <= length <= config["max_draft_len"] for length in schedule.values())


def tensorrt_llm_at(content: dict[str, Any], sequences: int) -> int:
    """get_draft_len_for_batch_size: keys are upper bounds, nothing above the largest."""
    config = content["speculative_config"]
    schedule = config.get("draft_len_schedule")
    if schedule is None:
        return int(config["max_draft_len"])
    fitting = [key for key in sorted(schedule) if key >= sequences]
    return int(schedule[fitting[0]]) if fitting else 0


def check_choices(choices: list[list[int]]) -> None:
    """generate_medusa_buffers: parents present, ranks below TOPK."""
    paths = [tuple(path) for path in choices]
    assert len(set(paths)) == len(paths)
    assert all(len(path) == 1 or path[:-1] in paths for path in paths)
    assert all(0 <= rank < 10 for path in paths for rank in path)


def check_growmap(growmap: dict[str, Any]) -> None:
    """What Tree/SpecTree.py reads: levels in order, children numbered on, masks of ancestors."""
    size = growmap["size"]
    roots, branches = growmap["roots"], growmap["branches"]
    successors, mask, depth = growmap["Successors"], growmap["mask"], growmap["depth"]
    assert [node for level in roots for node in level] == list(range(size))
    assert [len(level) for level in roots[1:]] == [sum(level) for level in branches[:-1]]
    assert sum(branches[-1]) == 0
    assert [count for level in branches for count in level] == [len(s) for s in successors]
    assert [child for children in successors for child in children] == list(range(1, size))
    assert tuple(mask.shape) == (size, size)
    assert mask.diagonal().all()
    for node, children in enumerate(successors):
        for child in children:
            expected = mask[node].clone()
            expected[child] = 1
            assert mask[child].equal(expected)
            assert int(depth[child]) == int(depth[node]) + 1


def check_speculation_profile(profile: dict[str, Any]) -> None:
    """speculation_profile.py of specdec_bench, schema 1.0, and its identity of the mean."""
    assert set(profile) == PROFILE_KEYS
    assert profile["schema_version"] == "1.0"
    length = profile["num_speculative_tokens"]
    marginal, conditional = profile["marginal_accept_rates"], profile["conditional_accept_rates"]
    assert len(marginal) == len(conditional) == length
    assert marginal == sorted(marginal, reverse=True)
    product = 1.0
    for total, share in zip(marginal, conditional, strict=True):
        product *= share
        assert abs(product - total) < 1e-4
    histogram = {int(k): v for k, v in profile["acceptance_length_histogram"].items()}
    assert set(histogram) <= set(range(1, length + 2))
    mean = sum(k * v for k, v in histogram.items()) / sum(histogram.values())
    assert abs(mean - profile["mean_accept_length"]) < 1e-5
    assert abs(1 + sum(marginal) - mean) < 1e-4
    assert profile["accept_length_by_k"][str(length)] == profile["mean_accept_length"]
    assert profile["accept_length_model"] in ("chain_analytic", "measured_per_k")
    assert profile["validation"]["mean_consistency"]["passed"]
    assert profile["validation"]["marginal_monotonicity"] == {"passed": True, "violations": []}


def check_nextn(text: str) -> tuple[int, list[float]]:
    """aiconfigurator's and Dynamo's flags: 1 to 5 draft tokens, and what goes with them."""
    words = text.splitlines()[-1].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    prefix = "--ais-nextn" if "--ais-nextn" in flags else "--nextn"
    length = int(flags.pop(prefix))
    assert 1 <= length <= 5
    ((name, values),) = flags.items()
    numbers = [float(value) for value in values.split(",")]
    if name == "--nextn-accepted":
        assert len(numbers) == 1
        assert 0 <= numbers[0] <= length
    else:
        assert name == "--ais-nextn-accept-rates"
        assert len(numbers) == length
        assert all(0 <= number <= 1 for number in numbers)
    return length, numbers
