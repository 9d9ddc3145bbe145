"""Servers that do not exist: a known cost and acceptance, and what a load generator would print.

A run's noise is RUN_NOISE, a start's START_NOISE (standard deviations of logarithms): two runs of
one setting then differ by about two percent. Costs bend where batches are padded to graph sizes, so
no smooth surface has them exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stree_autotune.server.acceptance import from_server
from stree_autotune.server.choice import Choice, choose, options_by_size
from stree_autotune.server.fit import fit_steps
from stree_autotune.server.gather import Names, import_files

RUN_NOISE = 0.01
START_NOISE = 0.005
DRAFT_TOKENS = (0, 1, 2, 3, 5, 8)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 4
OUTPUT_TOKENS = 256
PROMPTS_PER_REQUEST = 8
MARGIN = 0.02
TRAPS = ("none", "prefill", "capped", "table", "dropped", "throttled")


@dataclass
class SyntheticServer:
    """A server with step times and marginal acceptance that are drawn once."""

    seed: int
    trap: str = "none"
    noise: float = RUN_NOISE
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        draw = self.rng.uniform
        self.base_ms, self.per_sequence_ms = draw(5, 25), draw(0.02, 0.1)
        self.draft_ms = self.base_ms * draw(0.04, 0.25)
        self.per_token_ms = draw(0.005, 0.08)
        self.overhead_ms = draw(0.2, 1.5)
        self.padding = draw(0.0, 0.04)
        first, ratio = draw(0.45, 0.9), draw(0.75, 1.02)
        rates, rate = [], first
        for _ in range(max(DRAFT_TOKENS)):
            rates.append(rate if not rates else rates[-1] * rate)
            rate = min(0.97, rate * ratio)
        self.rates = rates if self.trap != "dropped" else [0.0] * len(rates)

    def step_ms(self, batch_size: int, draft_tokens: int) -> float:
        """Return the true time of a step."""
        padded = 2 ** np.ceil(np.log2(batch_size * (draft_tokens + 1)))
        used = (1 - self.padding) * batch_size * (draft_tokens + 1) + self.padding * padded
        verify = self.base_ms + self.per_sequence_ms * batch_size + self.per_token_ms * used
        if draft_tokens == 0:
            return float(verify)
        draft = draft_tokens * (self.draft_ms + 0.3 * self.per_sequence_ms * batch_size)
        return float(verify + draft + self.overhead_ms)

    def tokens_per_step(self, draft_tokens: int) -> float:
        """Return the true accept length + 1."""
        return 1 + sum(self.rates[:draft_tokens])

    def tokens_per_s(self, batch_size: int, draft_tokens: int) -> float:
        """Return the true rate of all requests."""
        return (
            1000
            * batch_size
            * self.tokens_per_step(draft_tokens)
            / self.step_ms(batch_size, draft_tokens)
        )

    def write(self, folder: Path) -> list[Path]:
        """Write the results of a plan's runs as `vllm bench serve` saves them."""
        files = []
        for number in range(1, ROUNDS + 1):
            for draft_tokens in DRAFT_TOKENS:
                start = self.rng.normal(0, START_NOISE)
                for batch_size in BATCH_SIZES:
                    content = self.run(batch_size, draft_tokens, number, start)
                    path = folder / f"k{draft_tokens}-c{batch_size}-r{number}.json"
                    path.write_text(json.dumps(content))
                    files.append(path)
        return files

    def run(
        self, batch_size: int, draft_tokens: int, number: int, start: float
    ) -> dict[str, object]:
        """Return one run's result."""
        requests = PROMPTS_PER_REQUEST * batch_size
        tokens = OUTPUT_TOKENS * requests
        steps = round(tokens / self.tokens_per_step(draft_tokens))
        counts, drafted = self._accepted(steps, draft_tokens), draft_tokens
        accepted = sum(counts)
        actual = 1 + accepted / steps
        step_ms = self.step_ms(batch_size, draft_tokens) * np.exp(
            start + self.rng.normal(0, self.noise)
        )
        running = batch_size
        if self.trap == "throttled" and number == 2 and draft_tokens == 3 and batch_size >= 8:
            step_ms *= 1.3
        if self.trap == "capped" and batch_size == 64 and draft_tokens:
            running = 24
            step_ms *= 0.8
        mean_itl = step_ms * (1.02 if self.trap == "prefill" else 1.0)
        tpot = step_ms / actual
        result: dict[str, object] = {
            "date": f"202611{10 + number}-120000",
            "backend": "openai",
            "model_id": "target",
            "num_prompts": requests,
            "max_concurrency": batch_size,
            "duration": tokens * tpot / 1000 / running,
            "completed": requests,
            "failed": 0,
            "total_input_tokens": 64 * requests,
            "total_output_tokens": tokens,
            "output_throughput": 1000 * running / tpot,
            "mean_ttft_ms": 3 * step_ms,
            "mean_tpot_ms": tpot,
            "mean_itl_ms": mean_itl,
            "median_itl_ms": mean_itl / (1.4 if self.trap == "prefill" else 1.01),
            "std_itl_ms": step_ms / 10,
            "p99_itl_ms": step_ms * 1.3,
            "stree_k": str(draft_tokens),
            "stree_round": str(number),
            "stree_draft": "draft",
            "stree_method": "draft_model",
            "server_version": "0.33.0",
        }
        if draft_tokens:
            total = steps * drafted
            if self.trap == "table" and batch_size == 32 and draft_tokens == 8:
                total = round(steps * 4.6)
            result |= {
                "spec_decode_num_drafts": steps,
                "spec_decode_draft_tokens": total,
                "spec_decode_accepted_tokens": accepted,
                "spec_decode_acceptance_length": actual,
                "spec_decode_acceptance_rate": 100 * accepted / total,
                "spec_decode_per_position_acceptance_rates": [count / steps for count in counts],
            }
        return result

    def is_right(self, choice: Choice) -> bool:
        """True for the best K, and for "cannot tell" where the truth is within MARGIN.

        What could not be measured, such as a capped batch size, is no option.
        """
        rates = {
            count: self.tokens_per_s(choice.batch_size, count)
            for count in choice.options.draft_tokens
        }
        best, second = sorted(rates.values(), reverse=True)[:2]
        if choice.cannot_tell:
            return max(best / second, best / rates[choice.draft_tokens]) <= 1 + MARGIN
        return rates[choice.draft_tokens] == best

    def _accepted(self, steps: int, draft_tokens: int) -> list[int]:
        """Draw how many steps keep at least 1, 2, ... tokens; runs vary more than counts do."""
        left, counts = steps, []
        for place in range(draft_tokens):
            before = self.rates[place - 1] if place else 1.0
            share = self.rates[place] / before if before else 0.0
            spread = self.rng.normal(0, 0.01)
            left = int(self.rng.binomial(left, min(1.0, max(0.0, share * (1 + spread)))))
            counts.append(left)
        return counts


def choices_of(server: SyntheticServer, folder: Path) -> list[Choice]:
    """Write a server's results, import them, and choose at every batch size."""
    files = server.write(folder)
    found = import_files(files, Names(gpu="synthetic", dataset="synthetic"))
    assert found.table is not None
    assert found.acceptance is not None
    rng = np.random.default_rng(0)
    options = options_by_size(fit_steps(found.table), from_server(found.acceptance, rng), rng)
    return [choose(each) for each in options.values()]
