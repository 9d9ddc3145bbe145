"""The measuring plan: what the script says, and that it runs and resumes, on a fake server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from stree_autotune.server.gather import Names, import_files
from stree_autotune.server.plan import DRAFT_TOKENS, Plan, plan_script
from stree_core.errors import ConfigError

FAKES = {
    "vllm": """#!/bin/sh
echo "$*" >> calls
if [ "$1" = serve ]; then
  touch up
  trap 'rm -f up; exit 0' TERM
  while :; do sleep 0.02; done
fi
name= k= c= round= dir=
while [ $# -gt 0 ]; do
  case "$1" in
    --result-filename) name=$2 ;;
    --result-dir) dir=$2 ;;
    --max-concurrency) c=$2 ;;
    stree_k=*) k=${1#*=} ;;
    stree_round=*) round=${1#*=} ;;
  esac
  shift
done
if [ -e broken ] && [ "$k" = 2 ]; then exit 7; fi
spec=
if [ "$k" != 0 ]; then
  spec="\\"spec_decode_num_drafts\\": 100, \\"spec_decode_draft_tokens\\": $((100 * k)),"
  spec="$spec \\"spec_decode_accepted_tokens\\": 50,"
fi
echo "{$spec \\"model_id\\": \\"t\\", \\"max_concurrency\\": $c, \\"completed\\": 8,
\\"failed\\": 0,
\\"total_input_tokens\\": 80, \\"total_output_tokens\\": 800, \\"mean_tpot_ms\\": 10,
\\"output_throughput\\": $((100 * c)), \\"stree_k\\": \\"$k\\", \\"stree_round\\": \\"$round\\",
\\"stree_draft\\": \\"d\\", \\"server_version\\": \\"0.33.0\\"}" > "$dir/$name"
""",
    "curl": """#!/bin/sh
case "$*" in
  *version*) echo '{"version":"0.33.0"}' ;;
  *health*) test -e up ;;
  *) echo '# TYPE vllm:fake counter' ;;
esac
""",
}


def run(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, **settings, "PATH": path}
    return subprocess.run(
        ["sh", "plan.sh"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a plan of two Ks and a fake vLLM."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    plan = Plan("vllm", "t", "d", "h100", (1, 4), draft_tokens=(0, 2))
    (tmp_path / "plan.sh").write_text(plan_script(plan))
    return tmp_path


def calls(folder: Path, word: str) -> int:
    return sum(line.startswith(word) for line in (folder / "calls").read_text().splitlines())


def test_the_script_runs_and_its_results_are_imported(folder: Path) -> None:
    done = run(folder, ROUNDS="2", KS="0 2")
    assert done.returncode == 0, done.stderr
    assert "8 of 8 runs to do, about" in done.stderr
    assert "8 of 8, 0 minutes to go" in done.stderr
    assert not (folder / "up").exists()
    results = sorted((folder / "stree-plan").glob("*.json"))
    assert len(results) == 8
    found = import_files(results, Names(gpu="h100", dataset="mine"))
    assert found.table is not None
    assert found.table.draft_tokens_at(4) == (0, 2)
    assert found.table.cells[0].rounds == (1, 2)
    assert len(list((folder / "stree-plan").glob("*.prom"))) == 8


def test_a_stopped_script_goes_on_where_it_was(folder: Path) -> None:
    (folder / "broken").touch()
    stopped = run(folder, ROUNDS="1")
    assert stopped.returncode != 0
    assert not (folder / "up").exists()
    kept = sorted(path.name for path in (folder / "stree-plan").glob("*.json"))
    assert kept == ["k0-c1-r1.json", "k0-c4-r1.json"]
    (folder / "broken").unlink()
    before = calls(folder, "serve")
    done = run(folder, ROUNDS="1")
    assert done.returncode == 0
    assert "2 of 4 runs to do" in done.stderr
    # off is not started again
    assert calls(folder, "serve") == before + 1
    assert run(folder, ROUNDS="1").stderr.startswith("0 of 4 runs to do")


def test_a_server_that_does_not_start_is_named(folder: Path) -> None:
    (folder / "bin" / "vllm").write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    done = run(folder, ROUNDS="1")
    assert done.returncode == 1
    assert "the server with K = 0 does not start; see stree-plan/server-k0.log" in done.stderr


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("draft", ["d", "mtp", "ngram", "eagle3:e", "none", "a b; rm -rf /"])
def test_every_script_is_valid_shell(server: str, draft: str) -> None:
    script = plan_script(Plan(server, "org/t", draft, "h100", (1, 8)))
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    sizes = "0" if draft == "none" else " ".join(map(str, DRAFT_TOKENS))
    assert f'KS=${{KS:-"{sizes}"}}' in script
    assert "LARGEST=8" in script


def test_methods_by_server() -> None:
    script = plan_script(Plan("vllm", "t", "eagle3:e", "h100", (1,)))
    assert '{"method": "eagle3", "model": "e", "num_speculative_tokens": ' in script
    assert '{"method": "mtp", "num_sp' in plan_script(Plan("vllm", "t", "mtp", "h100", (1,)))
    assert "--speculative-algorithm NEXTN " in plan_script(Plan("sglang", "t", "mtp", "h", (1,)))
    config = script.split("--speculative-config ")[1].split("\n")[0]
    shown = subprocess.run(
        ["sh", "-c", f"set -- 3; printf %s {config}"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(shown) == {"method": "eagle3", "model": "e", "num_speculative_tokens": 3}


def test_prompts_of_the_user_are_loaded_in_place_of_random_ones() -> None:
    script = plan_script(Plan("vllm", "t", "mtp", "h100", (1,), prompts="my file.jsonl"))
    assert "--dataset-path '\"'\"'my file.jsonl'\"'\"'" in script
    assert "random tokens" not in script


def test_what_a_plan_refuses() -> None:
    with pytest.raises(ConfigError, match="--server is vllm or sglang, got tgi"):
        Plan("tgi", "t", "d", "h100", (1,))
    with pytest.raises(ConfigError, match="pass --target"):
        Plan("vllm", "", "d", "h100", (1,))
    with pytest.raises(ConfigError, match="K is at most 64"):
        Plan("vllm", "t", "d", "h100", (1,), draft_tokens=(0, 65))


@pytest.mark.parametrize(("server", "draft"), [("sglang", "suffix"), ("vllm", "eagle3:")])
def test_drafts_that_a_server_has_not_are_refused(server: str, draft: str) -> None:
    with pytest.raises(ConfigError, match=r"--draft is a model, mtp, ngram.* name another"):
        Plan(server, "t", draft, "h100", (1,))
