"""Verdicts on server tables: fitted times, ties, smoothing, rows between measured ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_server import BATCH_SIZES, DRAFT_TOKENS, TRAPS, SyntheticServer, choices_of

from stree_autotune.server.acceptance import (
    NUM_DRAWS,
    TokensPerStep,
    from_rates,
    from_server,
)
from stree_autotune.server.choice import Choice, Options, choose, options_by_size
from stree_autotune.server.fit import fit_steps
from stree_autotune.server.gather import Names, import_files
from stree_autotune.server.policy import (
    at_sizes,
    doubts,
    explained,
    next_measurement,
    smoothed,
)
from stree_autotune.server.tables import (
    AcceptedRun,
    Served,
    ServerAcceptance,
    ServerTable,
    TimedCell,
)
from stree_autotune.trace.typed_rates import parse_rates
from stree_core.errors import ConfigError, MissingMeasurement

SERVED = Served(
    server="vllm",
    version="0.33.0",
    gpu="h100",
    target="target",
    draft="draft",
    method="draft_model",
    date="20261129",
)


def table_of(cells: dict[tuple[int, int], tuple[float, ...]]) -> ServerTable:
    made = [
        TimedCell(
            batch_size=size,
            draft_tokens=tokens,
            rounds=tuple(range(1, len(times) + 1)),
            step_ms=times,
        )
        for (size, tokens), times in cells.items()
    ]
    return ServerTable(served=SERVED, context=100, derived="typed", cells=tuple(made))


def options(rates: dict[int, float], spread: float = 0.001, batch_size: int = 1) -> Options:
    """Return options with these tokens/s and independent spreads, one ms a step."""
    rng = np.random.default_rng(0)
    draws = [np.log(rate) + spread * rng.standard_normal(NUM_DRAWS) for rate in rates.values()]
    return Options(
        batch_size=batch_size,
        draft_tokens=tuple(rates),
        step_ms=tuple(1000 * batch_size / rate for rate in rates.values()),
        tokens_per_step=tuple(1.0 for _ in rates),
        log_rates_RK=np.stack(draws, axis=1),
    )


def choice(rates: dict[int, float], batch_size: int, spread: float = 0.001) -> Choice:
    return choose(options(rates, spread, batch_size))


@pytest.mark.parametrize("seed", range(len(TRAPS)))
def test_verdicts_on_known_servers(tmp_path: Path, seed: int) -> None:
    """The fast version of benchmarks/server.py: its first cases, one with every trap."""
    server = SyntheticServer(seed, TRAPS[seed])
    choices = choices_of(server, tmp_path)
    wrong = [each.batch_size for each in choices if not server.is_right(each)]
    assert wrong == []
    assert len(choices) >= len(BATCH_SIZES) - 1


def test_fitted_times_are_nearer_to_the_truth_than_medians(tmp_path: Path) -> None:
    server = SyntheticServer(40, noise=0.03)
    table = import_files(server.write(tmp_path), Names(gpu="g", dataset="d")).table
    assert table is not None
    fit = fit_steps(table)
    truth = np.log([server.step_ms(*cell) for cell in fit.cells])
    cells = {(cell.batch_size, cell.draft_tokens): cell.step_ms for cell in table.cells}
    medians = np.log([np.median(cells[cell]) for cell in fit.cells])
    assert np.abs(fit.mean_C - truth).mean() < 0.8 * np.abs(medians - truth).mean()
    assert 0.5 * 0.03 < fit.noise < 2 * 0.03
    deviations = np.sqrt(np.diag(fit.covariance_CC))
    assert (np.abs(fit.mean_C - truth) < 4 * deviations).all()


def test_a_cell_that_is_off_every_surface_keeps_its_own_time() -> None:
    rng = np.random.default_rng(1)
    cells = {}
    for size in (1, 2, 4, 8, 16):
        for tokens in (0, 1, 2, 4):
            ms = (10 + 0.1 * size + tokens) * (1.5 if (size, tokens) == (4, 2) else 1.0)
            cells[size, tokens] = tuple(float(ms * np.exp(rng.normal(0, 0.003))) for _ in range(3))
    fit = fit_steps(table_of(cells))
    assert np.exp(fit.mean_C[fit.index(4, 2)]) == pytest.approx(1.5 * 12.4, rel=0.02)


def test_one_run_a_cell_takes_the_assumed_noise() -> None:
    cells = {(size, tokens): (10.0 + tokens,) for size in (1, 4) for tokens in (0, 2)}
    assert fit_steps(table_of(cells)).noise == 0.03


def test_too_many_runs_are_refused() -> None:
    cells = {(size, tokens): (10.0,) * 100 for size in range(1, 9) for tokens in (0, 2)}
    with pytest.raises(ConfigError, match="at most 1500 runs, it has 1600"):
        fit_steps(table_of(cells))


def test_the_best_is_taken_and_ties_go_to_the_simpler() -> None:
    firm = choose(options({0: 100.0, 1: 150.0, 2: 149.0}))
    assert (firm.draft_tokens, firm.cannot_tell) == (1, False)
    tie = choose(options({0: 100.0, 1: 149.5, 2: 150.0}, spread=0.003))
    assert (tie.draft_tokens, tie.cannot_tell) == (1, True)
    assert "cannot tell chain 1 and chain 2 apart" in tie.reason
    # may be as fast, may as well lose more than 2 %: not given away for being simpler
    wide = choose(options({0: 100.0, 1: 146.0, 2: 150.0}, spread=0.03))
    assert (wide.draft_tokens, wide.cannot_tell) == (2, True)
    off = choose(options({0: 100.0, 1: 90.0}))
    assert off.draft_tokens == 0
    assert off.reason.startswith("off: chain 1 would change speed by -10.0 %")


def test_smoothing_takes_the_fastest_policy_that_never_rises() -> None:
    choices = [
        choice({0: 100.0, 1: 110.0, 2: 120.0}, 1),
        choice({0: 100.0, 1: 103.0, 2: 90.0}, 2),
        choice({0: 100.0, 1: 99.0, 2: 80.0}, 4),
        choice({0: 100.0, 1: 104.0, 2: 80.0}, 8),
        choice({0: 100.0, 1: 80.0, 2: 60.0}, 16),
    ]
    assert [each.draft_tokens for each in choices] == [2, 1, 0, 1, 0]
    assert [each.draft_tokens for each in smoothed(choices)] == [2, 1, 1, 1, 0]
    assert "so that K never rises" in smoothed(choices)[2].reason
    told = explained(choices)
    assert "K rises from 0 at batch size 4" in told[3].reason
    assert told[1].reason == choices[1].reason


def test_smoothing_is_the_best_of_all_policies_that_never_rise() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        rates = rng.uniform(80, 120, (4, 3))
        choices = [choice(dict(enumerate(row)), 2**place) for place, row in enumerate(rates)]
        found = [each.draft_tokens for each in smoothed(choices)]
        paths = [
            (a, b, c, d)
            for a in range(3) for b in range(a + 1) for c in range(b + 1) for d in range(c + 1)
        ]  # fmt: skip
        value = {path: np.log([rates[i, k] for i, k in enumerate(path)]).sum() for path in paths}
        assert tuple(found) == max(value, key=lambda path: value[path])


def test_rows_between_measured_ones_are_taken_where_neighbours_agree() -> None:
    choices = [
        choice({0: 100.0, 2: 120.0}, 1),
        choice({0: 400.0, 2: 480.0}, 4),
        choice({0: 1600.0, 2: 1500.0}, 16),
    ]
    (between,) = at_sizes(choices, [2])
    assert between.draft_tokens == 2
    assert between.options.tokens_per_s(2) == pytest.approx(240.0)
    assert "interpolated" in between.reason
    with pytest.raises(MissingMeasurement, match=r"between 4 \(chain 2\) and 16 \(off\)"):
        at_sizes(choices, [8])
    with pytest.raises(MissingMeasurement, match="1 to 16 were measured, not 32"):
        at_sizes(choices, [32])


def test_the_next_measurement_is_where_most_is_at_stake() -> None:
    sure = choice({0: 100.0, 1: 120.0, 2: 90.0}, 1)
    unsure = choice({0: 100.0, 1: 120.0, 2: 119.0}, 4, spread=0.03)
    first = doubts([sure, unsure])[0]
    assert (first.batch_size, first.draft_tokens, first.rival) == (4, 1, 2)
    assert "batch size 4: chain 1 or chain 2" in next_measurement([sure, unsure])
    edge = choice({0: 100.0, 1: 110.0, 2: 120.0}, 1)
    assert "the largest K that was measured, 2, is best" in next_measurement([edge])


def test_tables_without_off_are_refused() -> None:
    fit = fit_steps(table_of({(1, 1): (10.0, 10.1), (4, 2): (10.0, 10.2)}))
    rng = np.random.default_rng(0)
    with pytest.raises(MissingMeasurement, match="needs off and a K at one batch size"):
        options_by_size(fit, from_rates((0.5, 0.4)), rng)


def test_counts_are_resampled_by_load_and_paired_over_k() -> None:
    rng = np.random.default_rng(3)
    runs = []
    for number in range(1, 11):
        hard = rng.normal(0, 0.1)
        for tokens, rate in ((1, 0.6), (2, 0.5)):
            kept = int(1000 * tokens * (rate + hard))
            runs.append(
                AcceptedRun(
                    draft_tokens=tokens, batch_size=1, round=number, steps=1000, accepted=kept
                )
            )
    accepted = ServerAcceptance(served=SERVED, dataset="d", derived="x", runs=tuple(runs))
    found = from_server(accepted, np.random.default_rng(0))
    apart = np.log(found.draws[2]) - np.log(found.draws[1])
    assert apart.std() < 0.6 * np.log(found.draws[2]).std()
    assert found.values[1] == pytest.approx(1 + sum(r.accepted for r in runs[::2]) / 10_000)


def test_typed_rates() -> None:
    assert parse_rates("0.8,0.6,0.4") == (0.8, 0.6, 0.4)
    assert from_rates((0.8, 0.6)).values == {0: 1.0, 1: 1.8, 2: pytest.approx(2.4)}
    for text in ("0.8,x", "0.5,0.6", "1.2", "nan", "-0.1", ",".join(["0.5"] * 65)):
        with pytest.raises(ConfigError, match="--rates takes"):
            parse_rates(text)
    with pytest.raises(MissingMeasurement, match="no K of the server table"):
        TokensPerStep({0: 1.0, 4: 2.0}, {}, "typed").require([0, 1, 2])


def test_the_drawn_servers_are_not_one_case() -> None:
    best = set()
    for seed in range(12):
        server = SyntheticServer(seed)
        best |= {
            max(DRAFT_TOKENS, key=lambda count: server.tokens_per_s(size, count))
            for size in BATCH_SIZES
        }
    assert len(best) >= 4
