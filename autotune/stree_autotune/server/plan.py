"""The measuring plan: a shell script that starts a server at every K and loads it.

It uses the server's own load generator and leaves its results as they are, for `stree-tune import`.
Finished runs are kept: started again, the script goes on where it stopped. A round starts the
server once for each K, so that rounds differ by what a start decides; all Ks get the same seeds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from stree_autotune.server.tables import MAX_DRAFT_TOKENS
from stree_autotune.store import command
from stree_core.errors import ConfigError, nearest

DRAFT_TOKENS = (0, 1, 2, 3, 5, 8)
ROUNDS = 4
REQUESTS_PER_SLOT = 8
START_S = 120
TOKEN_MS = 15
"""Assumed for the time that the script tells beforehand; it corrects itself as it runs."""

NO_DRAFT = "none"
HEADS = {"vllm": {"mtp": "mtp"}, "sglang": {"mtp": "NEXTN"}}
LOOKUPS = {"vllm": ("ngram", "suffix"), "sglang": ("ngram",)}
EAGLE = "eagle3:"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure; `draft` is a model, mtp, ngram, suffix, eagle3:MODEL, or none for off."""

    server: str
    target: str
    draft: str
    gpu: str
    batch_sizes: tuple[int, ...]
    draft_tokens: tuple[int, ...] = DRAFT_TOKENS
    prompts: str = ""
    input_tokens: int = 512
    output_tokens: int = 256

    def __post_init__(self) -> None:
        if self.server not in HEADS:
            raise ConfigError(
                f"--server is vllm or sglang, got {self.server}; {nearest(self.server, HEADS)}"
            )
        if not self.target:
            raise ConfigError("a plan serves a target, none was named; pass --target")
        foreign = {name for names in LOOKUPS.values() for name in names} - {*LOOKUPS[self.server]}
        if self.draft in foreign or self.draft == EAGLE:
            raise ConfigError(
                f"--draft is a model, mtp, {', '.join(LOOKUPS[self.server])}, eagle3:MODEL or none "
                f"on {self.server}, got {self.draft}; name another"
            )
        if max(self.draft_tokens) > MAX_DRAFT_TOKENS:
            raise ConfigError(f"K is at most {MAX_DRAFT_TOKENS}, got {max(self.draft_tokens)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The Ks to start the server with; 0 is off."""
        return (0,) if self.draft == NO_DRAFT else self.draft_tokens

    @property
    def method(self) -> tuple[str, str]:
        """The server's name of the way it drafts, and the model that drafts, if it is one."""
        known = HEADS[self.server]
        if self.draft in known:
            return known[self.draft], ""
        if self.draft in LOOKUPS[self.server]:
            return (self.draft.upper() if self.server == "sglang" else self.draft), ""
        if self.draft.startswith(EAGLE):
            name = "EAGLE3" if self.server == "sglang" else "eagle3"
            return name, self.draft.removeprefix(EAGLE)
        return ("STANDALONE" if self.server == "sglang" else "draft_model"), self.draft

    def minutes(self, rounds: int = ROUNDS) -> float:
        """Return about how long the script takes, before it knows the server."""
        loads = len(self.counts) * len(self.batch_sizes)
        load_s = REQUESTS_PER_SLOT * self.output_tokens * TOKEN_MS / 1000
        return rounds * (len(self.counts) * START_S + loads * load_s) / 60


def plan_script(plan: Plan) -> str:
    """Return the shell script of a plan."""
    make = _vllm if plan.server == "vllm" else _sglang
    serve, load, scrape = make(plan)
    return _SCRIPT.format(
        server=plan.server,
        minutes=round(plan.minutes()),
        target=shlex.quote(plan.target),
        counts=_words(plan.counts),
        sizes=_words(plan.batch_sizes),
        largest=max(plan.batch_sizes),
        rounds=ROUNDS,
        requests=REQUESTS_PER_SLOT,
        output=plan.output_tokens,
        start_s=START_S,
        token_ms=TOKEN_MS,
        port=30000 if plan.server == "sglang" else 8000,
        data=shlex.quote(_data_flags(plan)),
        serve=serve,
        load=load,
        scrape=scrape,
        import_command=command("import"),
        suffix="jsonl" if plan.server == "sglang" else "json",
        note=_data_note(plan),
    )


def _words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _data_flags(plan: Plan) -> str:
    if plan.prompts and plan.server == "vllm":
        return (
            f"--dataset-name custom --dataset-path {shlex.quote(plan.prompts)} "
            f"--custom-output-len {plan.output_tokens}"
        )
    if plan.prompts:
        return (
            f"--dataset-name custom --dataset-path {shlex.quote(plan.prompts)} "
            f"--sharegpt-output-len {plan.output_tokens}"
        )
    flags = (
        f"--dataset-name random --random-input-len {plan.input_tokens} "
        f"--random-output-len {plan.output_tokens}"
    )
    return flags + (" --random-range-ratio 1" if plan.server == "sglang" else " --ignore-eos")


def _data_note(plan: Plan) -> str:
    if plan.prompts:
        return "# Prompts are yours, so the acceptance is that of your traffic."
    return (
        "# Prompts are random tokens: times are right, the acceptance is not that of any text.\n"
        "# Make the plan with --prompts FILE, or tune with a trace or --rates."
    )


def _vllm(plan: Plan) -> tuple[str, str, str]:
    """Return how vLLM is served, loaded and scraped (vllm/benchmarks/serve.py of 0.32)."""
    method, model = plan.method
    config = {"method": method, **({"model": model} if model else {})}
    speculative = json.dumps(config)[:-1] + ', "num_speculative_tokens": '
    serve = f"""\
  if [ "$1" = 0 ]; then
    exec vllm serve "$TARGET" --port "$PORT" $SERVE_FLAGS
  else
    exec vllm serve "$TARGET" --port "$PORT" $SERVE_FLAGS \\
      --speculative-config {shlex.quote(speculative)}"$1}}"
  fi"""
    names = " ".join(
        shlex.quote(f"{key}={value}")
        for key, value in (
            ("stree_target", plan.target),
            ("stree_draft", model or plan.draft),
            ("stree_method", method),
            ("stree_gpu", plan.gpu),
        )
    )
    load = f"""\
  vllm bench serve --backend openai --base-url "$URL" --model "$MODEL" --tokenizer "$TARGET" \\
    $DATA_FLAGS --temperature "$TEMPERATURE" --num-prompts $(($2 * REQUESTS)) \\
    --max-concurrency "$2" --seed $(($3 * 1000 + $2)) --disable-tqdm $BENCH_FLAGS \\
    --save-result --result-dir "$OUT" --result-filename "$4" \\
    --metadata "stree_k=$1" "stree_round=$3" "server_version=$VERSION" \\
    "stree_flags=$SERVE_FLAGS" "stree_weights=$WEIGHTS" {names}"""
    scrape = '  curl -fsS "$URL/metrics" > "$OUT/$1.prom"'
    return serve, load, scrape


def _sglang(plan: Plan) -> tuple[str, str, str]:
    """Return how SGLang is served, loaded and scraped (sglang/benchmark/serving.py of 2026)."""
    method, model = plan.method
    draft = f" --speculative-draft-model-path {shlex.quote(model)}" if model else ""
    serve = f"""\
  export SGLANG_RECORD_STEP_TIME=1
  common="--port $PORT --max-running-requests $LARGEST --decode-log-interval 10 $SERVE_FLAGS"
  if [ "$1" = 0 ]; then
    exec python -m sglang.launch_server --model-path "$TARGET" $common
  else
    exec python -m sglang.launch_server --model-path "$TARGET" $common \\
      --speculative-algorithm {method}{draft} --speculative-num-steps "$1" \\
      --speculative-eagle-topk 1 --speculative-num-draft-tokens $(($1 + 1))
  fi"""
    load = """\
  python -m sglang.bench_serving --backend sglang --base-url "$URL" --model "$TARGET" \\
    $DATA_FLAGS --num-prompts $(($2 * REQUESTS)) --max-concurrency "$2" \\
    --seed $(($3 * 1000 + $2)) --disable-tqdm $BENCH_FLAGS \\
    --extra-request-body "{\\"temperature\\": $TEMPERATURE}" \\
    --tag "stree-round-$3" --output-file "$OUT/$4\""""
    scrape = '  curl -fsS "$URL/server_info" > "$OUT/$1.info.json"'
    return serve, load, scrape


_SCRIPT = """\
#!/bin/sh
# Measures {server} by K and concurrency with its own load generator, for `{import_command}`.
# About {minutes} minutes at {token_ms} ms a token and {start_s} s a start, corrected as it runs.
# Stopped, it goes on where it was when it is started again. Set any of these from the environment:
{note}
set -eu
TARGET=${{TARGET:-{target}}}
MODEL=${{MODEL:-$TARGET}}             # the name that the server gives the target
OUT=${{OUT:-stree-plan}}              # folder of the results
KS=${{KS:-"{counts}"}}                # draft tokens per step, 0 is off
SIZES=${{SIZES:-"{sizes}"}}           # requests at once
ROUNDS=${{ROUNDS:-{rounds}}}
REQUESTS=${{REQUESTS:-{requests}}}    # per place, one after another
PORT=${{PORT:-{port}}}
TEMPERATURE=${{TEMPERATURE:-0}}
SERVE_FLAGS=${{SERVE_FLAGS:-}}        # as you serve: --tensor-parallel-size 2 and so on
BENCH_FLAGS=${{BENCH_FLAGS:-}}
DATA_FLAGS=${{DATA_FLAGS:-{data}}}
LARGEST={largest}
URL=http://127.0.0.1:$PORT
VERSION=unknown
WEIGHTS=
SERVER=
if [ -d "$TARGET" ]; then
  WEIGHTS=$(for file in "$TARGET"/config.json "$TARGET"/*.safetensors; do
    head -c 1048576 "$file"
  done | sha256sum | cut -c 1-12)
fi
mkdir -p "$OUT"

serve() {{
{serve}
}}

load() {{
{load}
}}

scrape() {{
{scrape}
}}

stop() {{
  if [ -n "$SERVER" ]; then
    kill -TERM "$SERVER" 2>/dev/null || true
    wait "$SERVER" 2>/dev/null || true
    SERVER=
  fi
}}
trap stop EXIT
trap 'exit 130' INT TERM

start() {{
  serve "$1" > "$OUT/server-k$1.log" 2>&1 &
  SERVER=$!
  waited=0
  until curl -fsS "$URL/health" > /dev/null 2>&1; do
    if ! kill -0 "$SERVER" 2>/dev/null || [ "$waited" -ge 1800 ]; then
      echo "the server with K = $1 does not start; see $OUT/server-k$1.log" >&2
      exit 1
    fi
    sleep 2
    waited=$((waited + 2))
  done
  VERSION=$(curl -fsS "$URL/version" 2>/dev/null | sed -n 's/.*"version" *: *"\\([^"]*\\)".*/\\1/p')
  VERSION=${{VERSION:-unknown}}
}}

all=0
for k in $KS; do for size in $SIZES; do all=$((all + ROUNDS)); done; done
done_before=0
for k in $KS; do for size in $SIZES; do
  round=1
  while [ "$round" -le "$ROUNDS" ]; do
    if [ -s "$OUT/k$k-c$size-r$round.{suffix}" ]; then done_before=$((done_before + 1)); fi
    round=$((round + 1))
  done
done; done
finished=$done_before
begun=$(date +%s)
starts=0
for k in $KS; do starts=$((starts + ROUNDS)); done
first=$(((starts * {start_s} + (all - finished) * REQUESTS * {output} * {token_ms} / 1000) / 60))
echo "$((all - finished)) of $all runs to do, about $first minutes" >&2

round=1
while [ "$round" -le "$ROUNDS" ]; do
  for k in $KS; do
    left=
    for size in $SIZES; do
      if [ ! -s "$OUT/k$k-c$size-r$round.{suffix}" ]; then left="$left $size"; fi
    done
    if [ -z "$left" ]; then continue; fi
    start "$k"
    load "$k" 1 0 warm-up.{suffix} > /dev/null 2>&1
    rm -f "$OUT/warm-up.{suffix}"
    scrape "k$k-r$round-before"
    for size in $left; do
      name=k$k-c$size-r$round
      rm -f "$OUT/$name.part"
      load "$k" "$size" "$round" "$name.part" > "$OUT/load.log" 2>&1
      mv "$OUT/$name.part" "$OUT/$name.{suffix}"
      finished=$((finished + 1))
      spent=$(($(date +%s) - begun))
      more=$((spent * (all - finished) / (finished - done_before) / 60))
      echo "round $round, K = $k, $size requests: $finished of $all, $more minutes to go" >&2
    done
    scrape "k$k-r$round-after"
    stop
  done
  round=$((round + 1))
done
echo "done; now: {import_command} $OUT/*.{suffix} $OUT/*.prom --dataset NAME" >&2
"""
