"""The tables of README and docs, each made from results files or from what ships.

A page marks where one stands; `make docs` writes what lies between the marks anew:

    <!-- generated: NAME -->
    <!-- end -->

A number in a sentence is marked in the same way, with the row and the column that it is of:

    <!-- value: FILE model=mamba2-2.7b batch=1 tokens=1 ms -->1.70<!-- end -->

Tables end with a line that says where they come from. It says so first when a source changed since,
or when it is not known of which code the numbers are.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from prediction_table import BY_BATCH, by_batch
from report import Row, read, table
from sources import MEASUREMENTS, RESULTS
from stale import CUT_SHORT, NO_FINGERPRINT, OTHER_OPTIONS, Verdict, judge

from stree_autotune.trace.file import load_trace
from stree_core.profile import load_profile

PROFILES = RESULTS.parents[1] / "profiles"

OLDER = "*Measured on older code.*"
UNKNOWN = "*Measured on code that is not known, to be measured again.*"
OTHERWISE = "*Measured on this code, with other options than those of the set.*"
INCOMPLETE = "*Measured on this code; the run was cut short, so that rows are missing.*"
OF_OLDER_TIMES = "*Predicted from times of older code.*"
OVER_CHAIN = re.compile(r"gains ([\d.]+ % \[[^]]+\]) over chain")
END = "<!-- end -->"
MARKED = re.compile(
    r"(?P<begin><!-- (?P<kind>generated|value): (?P<what>[^>]+?) -->)(?P<text>.*?)" + END, re.DOTALL
)
Maker = Callable[[list[Row]], str]


def filled(page: str) -> str:
    """Return a page with everything between marks written anew."""
    return MARKED.sub(lambda found: found["begin"] + _text(found) + END, page)


def _text(found: re.Match[str]) -> str:
    if found["kind"] == "value":
        return value(found["what"])
    if found["what"] not in TABLES:
        raise ValueError(f"no table is called {found['what']}; known are {', '.join(TABLES)}")
    name = found["what"]
    origin = "" if name in OF_PROFILES else f"\n{_origin(name)}\n"
    return f"\n{TABLES[name]()}{origin}"


def value(what: str) -> str:
    """Return one number of a results file, to three digits: FILE KEY=VALUE ... COLUMN."""
    file, *keys, column = what.split()
    wanted = dict(key.split("=", 1) for key in keys)
    rows = [
        row
        for row in read(RESULTS / f"{file}.json")["rows"]
        if all(str(row.get(key)) == want for key, want in wanted.items())
    ]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {file} fit {what}; name one")
    return number(rows[0][column])


def number(measured: float | None) -> str:
    """Return a number to three digits, or to the whole, with thousands set apart."""
    if measured is None:
        return "-"
    is_whole = isinstance(measured, int) or abs(measured) >= 100
    return f"{measured:,.0f}" if is_whole else f"{measured:#.3g}"


def speed(tokens_per_s: float) -> str:
    """Return tokens per second."""
    return f"{tokens_per_s:,.0f}"


def _origin(name: str) -> str:
    """Return the lines below a table: how old it is, then GPU, date, revision and command."""
    (file,) = (each.file("h200") for each in MEASUREMENTS if each.name == name)
    path = RESULTS / file
    document, verdict = read(path), judge(path)
    revision = document.get("revision", "unknown")[:8]
    facts = [document.get("gpu", "a CPU"), document["date"][:10], f"revision {revision}"]
    facts += [f"{name} {document['versions'][name]}" for name in ("torch", "triton")]
    facts += [f"spread at most {spread:.1%}"] if (spread := _spread(document["rows"])) else []
    command = " ".join(shlex.split(document["command"])[:2])
    age = [_age(verdict)] if verdict.is_stale else []
    return "\n".join([*age, f"{', '.join(facts)}:", f"`{command}`, `{path.name}`."])


def _age(verdict: Verdict) -> str:
    known = {NO_FINGERPRINT: UNKNOWN, OTHER_OPTIONS: OTHERWISE, CUT_SHORT: INCOMPLETE}
    return known.get(verdict.reason, OLDER)


def _spread(rows: Sequence[Row]) -> float:
    """Return the largest standard deviation over median of what is ours."""
    names = ("spread", "ours_spread", "live_spread")
    return max((row.get(name) or 0.0 for row in rows for name in names), default=0.0)


def pivot(rows: Sequence[Row], down: Sequence[str], across: str, cell: Callable[[Row], str]) -> str:
    """Return a table with a row for each value of `down`, and a column for each of `across`."""
    columns = list(dict.fromkeys(str(row[across]) for row in rows))
    found = []
    for key, group in itertools.groupby(rows, lambda row: [row[name] for name in down]):
        cells = {str(row[across]): cell(row) for row in group}
        found.append(
            dict(zip(down, key, strict=True)) | {name: cells.get(name, "-") for name in columns}
        )
    return aligned(found, [*down, *columns])


def aligned(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a table whose columns of numbers stand right, though they are texts."""
    lines = table(rows, columns).splitlines()
    is_number = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    lines[1] = "|" + "|".join(" ---: " if right else " --- " for right in is_number) + "|"
    return "\n".join(lines) + "\n"


def _is_number(cell: Any) -> bool:
    return not isinstance(cell, str) or re.fullmatch(r"[-+]?[\d,.]* ?[x%]?", cell) is not None


def _rows(file: str) -> list[Row]:
    rows: list[Row] = read(RESULTS / f"{file}.json")["rows"]
    return rows


def live() -> str:
    """Every tree and chain of full-size pairs' profiles, live, beside the best chain and off."""
    rows = [
        {
            "profile": row["profile"].partition("--")[2],
            "batch": row["batch"],
            "row": f"{row['verdict']} of {row['nodes']}",
            "tokens/s": speed(row["tokens_per_s"]),
            "best chain": f"{speed(row['chain_tokens_per_s'])} ({row['chain']})",
            "off": speed(row["off_tokens_per_s"]),
            "over best chain": f"{row['over_chain']:.2f}x",
            "over off": f"{row['over_off']:.2f}x{by_part(row['parts_over_off'])}",
            "predicted": f"{row['predicted_over_off']:.2f}x",
        }
        for row in _rows("live-h200")
        if not (PROFILES / "models" / row["profile"].split("--")[1]).exists()
    ]
    return aligned(rows, list(rows[0]))


def by_part(rates: Sequence[float]) -> str:
    """Return what each part of the prompts gained, where there are several."""
    return f" ({', '.join(f'{rate:.2f}' for rate in rates)})" if len(rates) > 1 else ""


def kernels() -> str:
    """The scan of one mamba2-2.7b layer beside the peers that were there, µs."""
    columns = {
        "ours": "ours_us",
        "ours storing": "ours_storing_us",
        "FlashInfer": "flashinfer_us",
        "FlashInfer storing": "flashinfer_storing_us",
        "SGLang": "sglang_us",
        "one token": "one_token_us",
    }
    measured = [
        row
        for row in _rows("kernels-h200")
        if row["shape"] == "mamba2-2.7b" and row["tokens"] in (1, 8, 16, 64)
    ]
    there = [name for name, key in columns.items() if any(row.get(key) for row in measured)]
    rows = [
        {name: row[name] for name in ("batch", "tokens")}
        | {name: number(row.get(columns[name])) for name in there}
        | {"best other / ours": _best_other(row)}
        for row in measured
    ]
    return aligned(rows, list(rows[0]))


def _best_other(row: Row) -> str:
    """Return by how much ours is faster than the fastest kernel that verifies as many tokens."""
    keys = ["sglang_us", "flashinfer_us", *(["one_token_us"] if row["tokens"] == 1 else [])]
    others = [row[key] for key in keys if row.get(key)]
    return number(min(others) / row["ours_us"]) if others else "-"


def forward() -> str:
    """Whole forward passes, ms; with experts those of routing drawn uniformly."""
    rows = [row for row in _rows("forward-h200") if row.get("routing", "random") == "random"]
    return pivot(rows, ("model", "batch"), "tokens", lambda row: number(row["ms"]))


def shapes() -> str:
    """Every full-size shape that ships, ms of passes by tokens of a slot."""
    rows = [
        {**row, "shape": row["model"], "floor": number(row["weight_floor_ms"])}
        for row in _rows("shapes-h200")
    ]
    return pivot(rows, ("shape", "floor", "batch"), "tokens", lambda row: number(row["ms"]))


def delta() -> str:
    """A gated delta layer beside its peers, µs."""
    peers = {"fla_us": "fla", "sglang_replay_us": "SGLang, replay", "sglang_tree_us": "SGLang"}
    rows = []
    for row in _rows("delta-h200"):
        if row["tokens"] == 32:
            continue
        best = min((row[key], name) for key, name in peers.items() if row[key] is not None)
        rows.append(
            {
                "batch": row["batch"],
                "tokens": row["tokens"],
                "ours": number(row["ours_us"]),
                "best other kernel": f"{number(best[0])} ({best[1]})",
                "SGLang's tree kernel": number(row["sglang_tree_us"]),
                "others / ours": number(best[0] / row["ours_us"]),
            }
        )
    return aligned(rows, list(rows[0]))


def delta_prompts() -> str:
    """The scan of prompts of a gated delta layer beside fla's, µs."""
    rows = [
        {
            "prompts": row["batch"],
            "tokens of each": row["tokens"],
            "ours": number(row["ours_us"]),
            "fla": number(row["fla_us"]),
        }
        for row in _rows("delta-prompts-h200")
    ]
    return aligned(rows, list(rows[0]))


def fp8() -> str:
    """Forward passes with weights in bf16 and in FP8, ms."""
    rows = _rows("fp8-h200")
    return pivot(rows, ("model", "batch", "weights"), "tokens", lambda row: number(row["ms"]))


def draft() -> str:
    """Draft passes by inner nodes of a level, ms."""
    rows = _rows("draft-h200")
    return pivot(rows, ("model", "batch"), "tokens", lambda row: number(row["ms"]))


def prefill() -> str:
    """Prompts, ms, beside mamba_ssm's where it was measured."""
    names = {"prompt_tokens": "prompt", "piece_tokens": "piece", "peer_ms": "mamba_ssm ms"}
    rows = [
        {names.get(key, key): value for key, value in row.items()} for row in _rows("prefill-h200")
    ]
    for row in rows:
        row |= {"ms": number(row["ms"]), "mamba_ssm ms": number(row["mamba_ssm ms"])}
        row["tokens/s"] = number(row["tokens_per_s"])
    return aligned(rows, ["model", "batch", "prompt", "piece", "ms", "tokens/s", "mamba_ssm ms"])


def decode() -> str:
    """Tokens per second of every mode of two pairs."""
    rows = [{**row, "temperature": f"{row['temperature']:g}"} for row in _rows("decode-h200")]
    down = ("pair", "batch", "temperature")
    return pivot(rows, down, "mode", lambda row: speed(row["tokens_per_s"]))


def mtp(file: str = "mtp-h200") -> str:
    """Live tokens per second of a head and of a separate draft, tokens per step in brackets."""

    def cell(row: Row) -> str:
        return f"{speed(row['live_tokens_per_s'])} ({row['live_tokens_per_step']:.2f})"

    return pivot(_rows(file), ("pair", "mode", "batch", "draft"), "tree", cell)


def mtp_shapes() -> str:
    """Return the same of shapes, which accept what a trace says."""
    return mtp("mtp-shapes-h200")


def generation() -> str:
    """One token of mamba_ssm's generation and of ours, ms."""
    rows = _rows("generation-h200")
    return pivot(rows, ("batch",), "engine", lambda row: f"{row['token_ms']:.2f}")


def prediction() -> str:
    """Errors of predicted tokens per second by pair and batch size."""
    return table(by_batch(_rows("prediction-h200")), BY_BATCH)


def regret() -> str:
    """How much slower each pick is than the fastest tree, by second times."""
    picks = ("offline point", "offline verdict", "measured point", "measured verdict")
    found = []
    for row in _rows("regret-h200"):
        for pick in filter(None, row["chosen_by"].split(", ")):
            found.append({**row, "pick": pick})
    found.sort(key=lambda row: (row["pair"], row["batch"], picks.index(row["pick"])))
    return pivot(found, ("pair", "batch"), "pick", lambda row: f"{row['regret']:.1%}")


def lossless() -> str:
    """Tokens that differ from the target's own, of 100,000, and the largest logit margin."""
    rows = []
    for row in _rows("lossless-h200"):
        margin = max(row["margins_at_first_difference"], default=0.0)
        flips = number(row["flips_per_100k_tokens"])
        rows.append({**row, "flips": f"{flips} ({margin:.3f})"})
    return pivot(rows, ("dtype", "batch"), "mode", lambda row: row["flips"])


def verdicts() -> str:
    """What the profiles of full-size pairs say, predicted."""
    rows = []
    for path in sorted((PROFILES / "tuned").glob("h200--*.yaml")):
        profile = load_profile(path)
        if (PROFILES / "models" / profile.target.name).exists():
            continue
        for row in profile.policy:
            told = row.predicted
            interval = told.speedup_interval
            rows.append(
                {
                    "pair": f"{profile.target.name} + {profile.draft.name}",
                    "batch": row.batch_size,
                    "verdict": row.tree.build().full_label.removeprefix("a "),
                    "tokens/s": speed(told.tokens_per_s),
                    "over off": f"{told.speedup:.2f}x [{interval.low:.2f}, {interval.high:.2f}]",
                    "over the best chain": gain[1]
                    if (gain := OVER_CHAIN.search(row.reason))
                    else "-",
                }
            )
    return aligned(rows, list(rows[0])) + _age_of_profiles()


def _age_of_profiles() -> str:
    """Return a line below what profiles predict, where their tables or they are of older code."""
    paths = [RESULTS / name for name in ("tables-h200.json", "profiles.json")]
    is_new = all(path.exists() and judge(path).reason in ("", CUT_SHORT) for path in paths)
    return "" if is_new else f"\n{OF_OLDER_TIMES}\n"


def traces() -> str:
    """How often the demo pair's choices are taken, by the greedy traces that ship."""
    rows = []
    for path in sorted((PROFILES / "traces").glob("demo-target--*--greedy.safetensors")):
        trace = load_trace(path)
        counts = np.bincount(trace.ranks_ND[:, 0], minlength=4) / trace.num_positions
        rows.append(
            {
                "draft": trace.meta.draft.name,
                "dataset": trace.meta.dataset,
                "prompts": trace.num_prompts,
                "first choice": f"{counts[0]:.3f}",
                "second to fourth": f"{counts[1:4].sum():.3f}",
            }
        )
    return aligned(rows, list(rows[0]))


def coverage() -> str:
    """How often intervals of verdicts hold the truth, by population."""
    names = {"pair": "population", "repeats": "rows", "decided": "not off", "wrong": "slower"}
    shares = ("coverage", "optimistic", "pessimistic", "wrong")
    rows = []
    for row in read(RESULTS / "coverage.json")["rows"]:
        if row["batch"] != "all":
            continue
        shown = {names.get(key, key): row[key] for key in ("pair", "repeats", "decided")}
        told = {names.get(key, key): row[key] for key in shares}
        shown |= {name: "-" if share is None else f"{share:.3f}" for name, share in told.items()}
        rows.append(shown | {"regret": f"{100 * row['regret']:.1f} %"})
    return aligned(rows, list(rows[0]))


def search() -> str:
    """Our search over others, in tokens/s on prompts that were not looked at."""
    found = read(RESULTS / "search.json")["summary"]
    rows = [
        {
            "method": method,
            "ours over it, worst": f"{100 * (both['worst'] - 1):+.1f} %",
            "median": f"{100 * (both['median'] - 1):+.1f} %",
        }
        for method, both in found["ours_over"].items()
    ]
    return aligned(rows, list(rows[0]))


def shared_memory() -> str:
    """Times with the carveouts that kernels state over the driver's, and other scans over those."""
    rows = [
        {"pair": row["pair"], "batch": row["batch"], "tree": row["tree"], "carveout": name, "x": x}
        for row in _rows("shared-memory-h200")
        for name, x in (
            ("stated / driver's", row["ratio"]),
            *((f"scan {name} / stated", each) for name, each in row.get("scan_ratios", {}).items()),
        )
    ]
    rows.sort(key=lambda row: (row["pair"], row["batch"], row["carveout"]))
    return pivot(rows, ("pair", "batch", "carveout"), "tree", lambda row: f"{row['x']:.3f}")


def two_speeds() -> str:
    """A step behind each event: median, fastest and slowest block; medians of the engines."""
    rows = [
        row | {"range": f"{row['fastest']:.3f} to {row['slowest']:.3f}",
               "by engine": f"{min(row['engines']):.3f} to {max(row['engines']):.3f}"}
        for row in _rows("two-speeds-h200")
    ]  # fmt: skip
    return aligned(rows, ["tree", "event", "ms", "range", "by engine"])


TABLES: dict[str, Callable[[], str]] = {
    maker.__name__.replace("_", "-"): maker
    for maker in (
        live, kernels, forward, shapes, delta, delta_prompts, fp8, draft, prefill, decode, mtp,
        mtp_shapes, generation, prediction, regret, lossless, coverage, search, shared_memory,
        two_speeds, verdicts, traces,
    )
}  # fmt: skip
"""Each but those of OF_PROFILES is of the results file of its name."""
OF_PROFILES = ("verdicts", "traces")
