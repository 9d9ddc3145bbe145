"""Decode as the shipped profiles say, beside the best chain and no speculation.

    python benchmarks/live.py [--profiles NAME ...] [--batches B ...] [--write] [--output FILE]
    python benchmarks/live.py --table FILE

Every row of a profile of this GPU that says tree or chain is decoded live, in one run with off and
two chains, all on the same prompts, in turns over parts of them; the best chain is the faster of
the two. They are those that the profile's table and trace predict fastest, the row's own left out.
The demo pair on the demo set decodes by itself, sampled where the profile samples. Of other
profiles the prompts do not ship or the weights are random: their steps compute every pass and
accept what the profile's trace says (traced_pair.py), prompt by prompt. tokens/s is live
(live_speed): all slots at work, prefill left out. A part is a wave of requests or more, of texts
about as long, decoded again until FEWEST_CALLS of each tree were timed; a row that has fewer after
MOST_SECONDS is left out, and the run says so. `--write` puts the rows into the profiles, as their
measured block. With several GPUs pairs are decoded side by side, one a GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fingerprint
import numpy as np
from gpus import Environment, side_by_side, visible_gpus
from prediction import Case, give_back, requests_of
from report import RESULTS, Row, header, print_table, read, save, table
from traced_pair import traced_rules

from stree_autotune.cost.step_cost import StepCost
from stree_autotune.cost.table_cost import load_table
from stree_autotune.live.measure import prompt_for
from stree_autotune.live.speed import (
    FEWEST_CALLS,
    LiveSpeed,
    joined,
    live_speed,
    typical_context,
)
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.open_models import DEMO_DATASET, PairRequest, open_pair, open_prompts
from stree_autotune.store.origin import versions
from stree_autotune.store.step_rule import StepRule
from stree_autotune.trace.file import Trace, load_trace
from stree_autotune.trace.tree_walk import walk
from stree_core.drafting.pair import Pair, Runtime, device_name, short_gpu_name
from stree_core.engine.decode import generate
from stree_core.engine.engine import Engine, EngineConfig, needed_positions
from stree_core.engine.request import Request
from stree_core.engine.rules import SamplingSupport
from stree_core.engine.sampling import SamplingParams
from stree_core.engine.stop import StopRule
from stree_core.models.backend import resolve_device
from stree_core.profile import (
    Measured,
    MeasuredBlock,
    PolicyRow,
    Profile,
    load_profile,
    save_profile,
)
from stree_core.tree import OFF, Tree

PROMPTS, PARTS = 8, 2
MOST_SECONDS = 25.0
"""After so long a row's requests are not decoded once more."""
LONGEST_CHAIN, CHAINS = 12, 2
WARM_UP_TOKENS = 16
SHOWN = (
    "profile", "batch", "verdict", "nodes", "tokens_per_s", "chain", "chain_tokens_per_s",
    "off_tokens_per_s", "over_chain", "over_off", "predicted_over_off",
)  # fmt: skip


Named = tuple[str, Profile]
"""A profile with its name."""


@dataclass(frozen=True, slots=True)
class ProfileCase(Case):
    """A case that is a shipped profile's: its name is the profile's."""

    profile: Profile


def main() -> None:
    options = parse()
    if options.table is not None:
        print_table(options.table, SHOWN, lambda row: True)
        return
    head = header(device=options.device)
    device = resolve_device(options.device)
    chosen = profiles_of(
        options.gpu or short_gpu_name(device_name(device), device), options.profiles
    )
    gpus, pairs = visible_gpus(), {pair_of(profile) for _, profile in chosen}
    rows: list[Row] = []
    if device.type == "cpu" or min(len(gpus), len(pairs)) == 1:
        measured = decoded(options, head, chosen)
    else:
        measured = decoded_side_by_side(options, chosen, gpus)
    for row in measured:
        rows.append(row)
        print(table(rows[-1:], SHOWN).splitlines()[-1], flush=True)
        save(options.output, head, rows)
    print(table(rows, SHOWN), end="")


def decoded(options: argparse.Namespace, head: Row, chosen: Sequence[Named]) -> Iterator[Row]:
    """Decode by the profiles and yield their rows."""
    pair: Pair | None = None
    for name, profile in chosen:
        names = pair_of(profile)
        if pair is None or (pair.target_ref.name, pair.draft_ref.name) != names:
            del pair
            give_back()
            pair = opened(*names, options.device)
        case, rows = case_of(name, profile, pair), []
        for policy in profile.policy:
            asked_for = not options.batches or policy.batch_size in options.batches
            if policy.verdict == "off" or not asked_for:
                continue
            start = time.monotonic()
            row = measure(case, policy, options.prompts)
            row["seconds"] = round(time.monotonic() - start, 1)
            give_back()
            if row["timed_steps"] < FEWEST_CALLS:
                print(f"{name}, batch {policy.batch_size}: only {row['timed_steps']} steps of a "
                      "tree could be timed, the row is left out", file=sys.stderr)  # fmt: skip
                continue
            rows.append(row)
            yield row
        del case
        if options.write and rows:
            path = fingerprint.ROOT / "profiles" / "tuned" / f"{name}.yaml"
            save_profile(with_measured(profile, head, rows), path)


def decoded_side_by_side(
    options: argparse.Namespace, chosen: Sequence[Named], gpus: Sequence[str]
) -> Iterator[Row]:
    """Decode by the profiles of each pair in a process of its own, and yield their rows.

    Where one fails or all are interrupted, the rows that were decoded are kept.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for name, profile in chosen:
        names.setdefault(pair_of(profile), []).append(name)
    with tempfile.TemporaryDirectory() as folder:
        parts = {Path(folder) / f"{number}.json" for number in range(len(names))}
        failures = []

        def run(part: Path, profiles: Sequence[str], environment: Environment) -> Path:
            command = [sys.executable, __file__, "--device", "cuda", "--output", str(part)]
            command += ["--prompts", str(options.prompts), "--profiles", *profiles]
            command += ["--gpu", options.gpu] if options.gpu else []
            command += ["--batches", *map(str, options.batches)] if options.batches else []
            command += ["--write"] if options.write else []
            done = subprocess.run(command, check=False, env={**os.environ, **environment})
            if done.returncode:
                failures.append(f"{', '.join(profiles)} ended with {done.returncode}")
            return part

        in_order = zip(sorted(parts), names.values(), strict=True)
        works = [functools.partial(run, *each) for each in in_order]
        try:
            for done in side_by_side(works, gpus):
                parts.remove(done.result())
                yield from rows_in(done.result())
        except KeyboardInterrupt:
            for part in sorted(parts):
                yield from rows_in(part)
            raise
        if failures:
            raise SystemExit("; ".join(failures))


def rows_in(path: Path) -> list[Row]:
    """Return the rows of a result file that may not be there."""
    rows: list[Row] = read(path)["rows"] if path.exists() else []
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The rows of shipped profiles, live")
    parser.add_argument("--profiles", nargs="+", default=[], help="names; all of this GPU's")
    parser.add_argument("--batches", nargs="+", type=int, default=[], help="all of a profile's")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each row, or two a slot")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu", default="", help="take the profiles of this GPU")
    parser.add_argument("--write", action="store_true", help="put the rows into the profiles")
    parser.add_argument("--output", type=Path, default=RESULTS / "live-h200.json")
    parser.add_argument("--table", type=Path, help="print this result file as Markdown and stop")
    return parser.parse_args()


def profiles_of(gpu: str, wanted: Sequence[str]) -> list[Named]:
    """Return the shipped profiles of a GPU, full-size pairs first, those of one pair together."""
    paths = sorted((shipped_root() / "tuned").glob(f"{gpu}--*.yaml"))
    chosen = [path for path in paths if not wanted or path.stem in wanted]
    found = [(path.stem, load_profile(path)) for path in chosen]
    if not found:
        raise SystemExit(f"no shipped profile of {gpu} has such a name; see stree-tune list")
    found.sort(key=lambda item: (not is_shape(item[1].target.name), item[1].draft.name, item[0]))
    return found


def pair_of(profile: Profile) -> tuple[str, str]:
    """Return the names of a profile's models."""
    return profile.target.name, profile.draft.name


def is_shape(name: str) -> bool:
    """Say whether a model ships as a shape alone, without weights."""
    return not (shipped_root() / "models" / name).is_dir()


def opened(target: str, draft: str, device: str) -> Pair:
    """Return a profile's pair, with random weights where none ship."""
    return open_pair(PairRequest(target, draft, (), Runtime(device), shapes=is_shape(target)))


def case_of(name: str, profile: Profile, pair: Pair) -> ProfileCase:
    """Return what a profile's rows are decoded with."""
    library = Library.open(())
    trace = load_trace(library.find_trace_file(Path(profile.sources.trace.name).stem))
    by_itself = profile.dataset == DEMO_DATASET and not is_shape(profile.target.name)
    prompts = pair.encode(open_prompts(DEMO_DATASET).texts) if by_itself else [prompt_for(0)]
    runtime = load_table(library, shipped_root() / profile.sources.runtime.name)
    rule, context = StepRule.of(profile.sampling), typical_context(prompts, trace)
    cost = StepCost.from_table(runtime, rule, context)
    return ProfileCase(name, pair, trace, by_itself, cost, profile.context, profile)


def measure(case: ProfileCase, policy: PolicyRow, num_prompts: int) -> Row:
    """Decode the same prompts by a row of the profile, by chains and without speculation."""
    batch, tree = policy.batch_size, policy.tree.build()
    # Prompts with a step, again where there are fewer than fill a wave of each part.
    with_steps = np.flatnonzero(np.diff(case.trace.offsets) > 0)
    waves = max(PARTS, num_prompts // batch)
    chosen = in_waves(case.trace, np.resize(with_steps, waves * batch), batch)  # type: ignore[arg-type]
    requests = sampled(case, requests_of(case, chosen))
    trees = [tree, OFF, *chains(case, batch, tree)]
    needed = max(
        needed_positions(len(each.prompt), each.stop.max_new_tokens, trees) for each in requests
    )
    config = EngineConfig(
        batch,
        max(case.profile.context, needed),
        sampling=SamplingSupport.of(case.profile.sampling),
    )
    rules = None
    if not case.accepts_by_itself:
        # One script for all engines: they decode in turns.
        rules = traced_rules(case.pair, case.trace, batch)
    engines = {
        each: Engine(case.pair.target, case.pair.draft, each, config, rules=rules) for each in trees
    }
    for engine in engines.values():
        generate(engine, [each.prompt for each in requests[:batch]], StopRule(WARM_UP_TOKENS))
    # Whole waves in each part, so that slots are at work.
    size = batch * -(-waves // PARTS)
    parts = [requests[at : at + size] for at in range(0, len(requests), size)]
    runs = timed(engines, parts)
    row = row_of(case, policy, {each: [run[each] for run in runs] for each in trees}, chosen)
    return {**row, "timed_steps": fewest_steps(runs)}


def in_waves(trace: Trace, chosen: Sequence[int], batch: int) -> list[int]:
    """Return prompts in waves of texts about as long, every other wave in the first part.

    Where one text of a wave ends long before the others, few steps have all slots at work.
    """
    lengths = np.diff(trace.offsets)
    order = sorted(chosen, key=lambda index: int(lengths[index]))
    waves = [order[at : at + batch] for at in range(0, len(order), batch)]
    return [int(index) for part in range(PARTS) for wave in waves[part::PARTS] for index in wave]


def timed(
    engines: Mapping[Tree, Engine], parts: Sequence[Sequence[Request]]
) -> list[dict[Tree, LiveSpeed]]:
    """Decode each part with each tree in turns until enough steps of all were timed.

    All parts and trees are decoded equally often, so that every prompt counts alike.
    """
    runs: list[dict[Tree, LiveSpeed]] = []
    end = time.monotonic() + MOST_SECONDS
    while not runs or (fewest_steps(runs) < FEWEST_CALLS and time.monotonic() < end):
        again = [{each: live_speed(engines[each], part) for each in engines} for part in parts]
        runs = again if not runs else list(map(both, runs, again))
    return runs


def both(run: dict[Tree, LiveSpeed], again: dict[Tree, LiveSpeed]) -> dict[Tree, LiveSpeed]:
    """Return two runs of a part as one."""
    return {each: joined([run[each], again[each]]) for each in run}


def fewest_steps(runs: Sequence[Mapping[Tree, LiveSpeed]]) -> int:
    """Return how many steps were timed of the tree and part with the fewest."""
    return min(speed.num_calls for run in runs for speed in run.values())


def chains(case: ProfileCase, batch: int, tree: Tree) -> list[Tree]:
    """Return the chains that are predicted fastest, but for the row's own."""
    longest = min(LONGEST_CHAIN, case.trace.meta.max_depth)
    speeds = {}
    for chain in map(Tree.chain, range(1, longest + 1)):
        tokens_per_step = walk(case.trace, chain).tokens_per_step
        speeds[chain] = tokens_per_step / case.cost.step_ms(batch, chain, tokens_per_step)
    speeds.pop(tree, None)
    return sorted(speeds, key=lambda chain: -speeds[chain])[:CHAINS]


def sampled(case: ProfileCase, requests: Sequence[Request]) -> list[Request]:
    """Return the requests with the profile's sampling, where they decode by themselves."""
    if not case.accepts_by_itself:
        return list(requests)
    return [
        Request(each.prompt, each.stop, SamplingParams.of(case.profile.sampling, seed))
        for seed, each in enumerate(requests)
    ]


def row_of(
    case: ProfileCase, policy: PolicyRow, runs: dict[Tree, list[LiveSpeed]], chosen: Sequence[int]
) -> Row:
    """Return a row: the tree beside the faster chain and off."""
    tree = policy.tree.build()
    whole = {each: joined(parts) for each, parts in runs.items()}
    best = max(set(whole) - {tree, OFF}, key=lambda each: whole[each].tokens_per_s)
    rates = [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[tree], runs[OFF], strict=True)]
    own, chain, off = whole[tree], whole[best], whole[OFF]
    predicted = walk(case.trace, tree, np.array(chosen)).tokens_per_step
    return {
        "profile": case.name,
        "batch": policy.batch_size,
        "verdict": policy.verdict,
        "nodes": tree.num_nodes,
        "depth": tree.depth,
        "acceptance": "its own" if case.accepts_by_itself else "of its trace",
        "prompts": len(set(chosen)),
        "tokens_per_s": round(own.tokens_per_s, 1),
        "tokens_per_step": round(own.tokens_per_step, 4),
        "traced_tokens_per_step": round(predicted, 4),
        "step_ms": round(own.step_ms, 4),
        "chain": best.num_nodes,
        "chain_tokens_per_s": round(chain.tokens_per_s, 1),
        "chain_step_ms": round(chain.step_ms, 4),
        "chain_tokens_per_step": round(chain.tokens_per_step, 4),
        "off_tokens_per_s": round(off.tokens_per_s, 1),
        "off_step_ms": round(off.step_ms, 4),
        "over_chain": round(own.tokens_per_s / chain.tokens_per_s, 3),
        "over_off": round(own.tokens_per_s / off.tokens_per_s, 3),
        "predicted_over_off": round(policy.predicted.speedup, 3),
        "parts_over_off": [round(rate, 3) for rate in rates],
    }


def with_measured(profile: Profile, head: Row, rows: Sequence[Row]) -> Profile:
    """Return a profile with its rows, their chains and off as its measured block."""
    measured = []
    for row in rows:
        for mode, prefix in (
            ("off", "off_"),
            (f"best chain ({row['chain']})", "chain_"),
            (f"tuned {row['verdict']}", ""),
        ):
            measured.append(
                Measured(
                    batch_size=row["batch"],
                    mode=mode,
                    tokens_per_step=row.get(f"{prefix}tokens_per_step", 1.0),
                    step_ms=row[f"{prefix}step_ms"],
                    tokens_per_s=row[f"{prefix}tokens_per_s"],
                )
            )
    known = {name: head["versions"][name] for name in versions()}
    block = MeasuredBlock(gpu=head["gpu"], date=head["date"], versions=known, rows=tuple(measured))
    return profile.model_copy(update={"measured": block})


if __name__ == "__main__":
    main()
