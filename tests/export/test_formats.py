"""Every format: against its server's rules, against its golden file, read back where possible."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import export_rules as rules
import pytest
import torch
import yaml
from export_golden import GOLDEN, golden_deployment, golden_text
from hypothesis import given, settings
from synthetic import growth_orders
from synthetic_data import make_profile, policy_row
from synthetic_profile import NAME, RAGGED, write_profile

from stree_autotune.export.compatibility import limit_notes, markdown_table, model_notes
from stree_autotune.export.deployment import Deployment, chains
from stree_autotune.export.formats import FORMATS
from stree_autotune.export.trees import export_choices, export_sequoia
from stree_autotune.store.library import Library
from stree_autotune.trace.typed_rates import rates_source
from stree_core.errors import MissingMeasurement, NoFeasibleTree
from stree_core.profile import Sampling
from stree_core.tree import DEFAULT_TREE, Tree

CHAIN, OFF = Tree.chain(3), Tree.chain(0)
STAR = Tree.from_paths([[0], [1], [2], [3]])
MIXED = {1: CHAIN, 4: Tree.chain(1), 16: OFF}
SIZES = (1, 2, 3, 4, 5, 16, 17, 100)


Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    """Make deployments of a profile with the given rows, whose sources are at hand."""
    root = tmp_path_factory.mktemp("data")
    base, library = write_profile(root), Library((root,))

    def make(rows: dict[int, Tree], batch_size: int = 0) -> Deployment:
        policy = tuple(policy_row(size, tree) for size, tree in rows.items())
        profile = base.model_copy(update={"policy": policy})
        return Deployment(profile, library, "org/target", "org/draft", batch_size)

    return make


def exported(deployment: Deployment, name: str) -> str:
    return FORMATS[name].export(deployment).content.decode()


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].is_text])
def test_golden_files(tmp_path: Path, name: str) -> None:
    """`python tests/export_golden.py` writes them anew."""
    assert golden_text(golden_deployment(tmp_path), name) == (GOLDEN / f"{name}.txt").read_text()


def test_vllm_uses_the_profile_s_chain_at_every_batch_size(deploy: Deploy) -> None:
    deployment = deploy(MIXED)
    config = json.loads(exported(deployment, "vllm"))
    rules.check_vllm(config)
    assert config["model"] == "org/draft"
    for size in SIZES:
        expected = deployment.profile.row_for(size).tree.build().num_nodes
        assert rules.vllm_at(config, size) == expected
    uniform = json.loads(exported(deploy({1: CHAIN, 8: CHAIN}), "vllm"))
    assert "num_speculative_tokens_per_batch_size" not in uniform
    assert rules.vllm_at(uniform, 64) == 3


def test_vllm_synthetic_rates_are_those_of_the_walk(deploy: Deploy) -> None:
    deployment = deploy(MIXED)
    config = json.loads(exported(deployment, "vllm-synthetic"))
    rules.check_vllm(config)
    # the trace's ranks are independent, so the rates are close to powers of rank 0's share
    share = float((deployment.trace.ranks == 0).mean())
    rates = config["synthetic_acceptance_rates"]
    assert rates == pytest.approx([share, share**2, share**3], rel=0.05)


def test_sglang_adapts_with_the_profile_s_chains(deploy: Deploy) -> None:
    deployment = deploy(MIXED)
    config = json.loads(exported(deployment, "sglang-adaptive"))
    rules.check_sglang_adaptive(config)
    for size in SIZES:
        expected = deployment.profile.row_for(size).tree.build().num_nodes
        assert rules.sglang_adaptive_at(config, size) == expected


def run_script(text: str, folder: Path, *arguments: str) -> list[str]:
    """Run a launch script with a python that only says what it was given."""
    fake = folder / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    fake.chmod(0o755)
    script = folder / "launch.sh"
    script.write_text(text)
    out = subprocess.run(
        ["/bin/sh", script, *arguments],
        cwd=folder,
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return out.split("\0")[:-1]


@pytest.mark.parametrize(
    ("tree", "expected"), [(CHAIN, ("3", "1", "4")), (STAR, ("1", "4", "5"))], ids=["chain", "star"]
)
def test_sglang_flags_take_chains_and_stars_as_they_are(
    deploy: Deploy, tmp_path: Path, tree: Tree, expected: tuple[str, str, str]
) -> None:
    deployment = replace(deploy({1: tree}), target="/models/a b'c")
    result = FORMATS["sglang"].export(deployment)
    assert result.notes == ()
    argv = run_script(result.content.decode(), tmp_path, "--tp-size", "2")
    assert argv[:2] == ["-m", "sglang.launch_server"]
    flags = rules.check_sglang_flags(argv[2:])
    assert flags["--model-path"] == "/models/a b'c"
    assert flags["--speculative-draft-model-path"] == "org/draft"
    names = ("num-steps", "eagle-topk", "num-draft-tokens")
    assert tuple(flags[f"--speculative-{name}"] for name in names) == expected
    assert flags["--tp-size"] == "2"


def test_names_from_a_profile_stay_words(deploy: Deploy, tmp_path: Path) -> None:
    """A shared profile is no trusted one: its names go into a script and into YAML."""
    deployment = deploy(MIXED)
    evil = deployment.profile.model_copy(update={"dataset": "x\ntouch pwned\u2028speculative: 1"})
    name = "$(touch pwned)\n`touch pwned`; touch pwned"
    deployment = replace(deployment, profile=evil, target=name, draft=name, batch_size=1)
    script = exported(deployment, "sglang")
    flags = rules.check_sglang_flags(run_script(script, tmp_path)[2:])
    assert flags["--model-path"] == flags["--speculative-draft-model-path"] == name
    assert list(tmp_path.rglob("*pwned*")) == []
    content = yaml.safe_load(exported(deployment, "tensorrt-llm"))
    rules.check_tensorrt_llm(content)
    assert content["speculative_config"]["speculative_model"] == name
    assert json.loads(exported(deployment, "vllm"))["model"] == name


def test_sglang_takes_the_best_of_what_it_can_say(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy({1: RAGGED, 4: CHAIN, 16: OFF})
    result = FORMATS["sglang"].export(deployment)
    flags = rules.check_sglang_flags(run_script(result.content.decode(), tmp_path)[2:])
    steps = int(flags["--speculative-num-steps"])
    top_k = int(flags["--speculative-eagle-topk"])
    chosen = Tree.chain(steps) if top_k == 1 else Tree.from_paths([[i] for i in range(top_k)])

    def mean_rate(tree: Tree) -> float:
        return math.prod(deployment.tokens_per_s(size, tree) for size in (1, 4, 16))

    others = [Tree.chain(n) for n in range(9)]
    others += [Tree.from_paths([[i] for i in range(n)]) for n in range(2, 17)]
    assert mean_rate(chosen) == pytest.approx(max(map(mean_rate, others)))
    assert any("batch size 1: " in note for note in result.notes)


def test_tensorrt_llm_schedule_means_the_profile(deploy: Deploy) -> None:
    deployment = deploy(MIXED)
    text = exported(deployment, "tensorrt-llm")
    content = yaml.safe_load(text)
    rules.check_tensorrt_llm(content)
    for size in (1, 2, 3, 4, 5, 16):
        expected = deployment.profile.row_for(size).tree.build().num_nodes
        assert rules.tensorrt_llm_at(content, size) == expected
    assert text.startswith("# toy-target + toy-draft on h200")
    assert "# the keys of draft_len_schedule" in text


def valid_schedules(deployment: Deployment) -> list[tuple[int, int, int]]:
    """All that start with their longest chain and leave 1 and 3 where these fit below it."""
    last = [
        deployment.best([Tree.chain(n) for n in range(cap + 1)], deployment.rows[2:]).num_nodes
        for cap in (1, 2)
    ]
    grown = [(first, 1, 3) for first in range(3, 9)]
    return [(0, 0, 0), (1, 1, last[0]), (2, 1, last[1]), *grown]


def mean_rate_of(deployment: Deployment) -> Callable[[tuple[int, int, int]], float]:
    def mean_rate(lengths: tuple[int, int, int]) -> float:
        pairs = zip((1, 4, 16), lengths, strict=True)
        return math.prod(deployment.tokens_per_s(size, Tree.chain(n)) for size, n in pairs)

    return mean_rate


def test_tensorrt_llm_schedule_is_valid_when_the_profile_grows(deploy: Deploy) -> None:
    """The smallest batch size must have the longest chain, so the profile cannot be said."""
    deployment = deploy({1: OFF, 4: Tree.chain(1), 16: CHAIN})
    result = FORMATS["tensorrt-llm"].export(deployment)
    content = yaml.safe_load(result.content)
    rules.check_tensorrt_llm(content)
    lengths = tuple(rules.tensorrt_llm_at(content, size) for size in (1, 4, 16))
    assert lengths == max(valid_schedules(deployment), key=mean_rate_of(deployment))
    assert any(note.startswith("batch size 1: chain ") for note in result.notes)


@settings(max_examples=40, deadline=None)
@given(order=growth_orders(max_nodes=20))
def test_trees_are_read_back(order: list[tuple[int, ...]]) -> None:
    tree = Tree.from_paths(order)
    if tree.num_nodes == 0:
        return
    deployment = Deployment(make_profile(policy_row(1, tree)), Library(()), "target", "draft")
    choices = json.loads(export_choices(deployment).content)
    rules.check_choices(choices)
    assert Tree.from_paths(choices) == tree
    growmap = torch.load(io.BytesIO(export_sequoia(deployment).content), weights_only=True)
    rules.check_growmap(growmap)
    parents = [-1] * growmap["size"]
    for node, children in enumerate(growmap["Successors"]):
        for child in children:
            parents[child] = node
    assert Tree(tuple(parents)) == tree


def test_sampled_drafts_are_asked_for_or_missed(deploy: Deploy) -> None:
    deployment = deploy(MIXED)
    sampling = Sampling(rule="mss", temperature=1.0)
    sampled = replace(
        deployment, profile=deployment.profile.model_copy(update={"sampling": sampling})
    )
    config = json.loads(exported(sampled, "vllm"))
    rules.check_vllm(config)
    assert config["draft_sample_method"] == "probabilistic"
    assert "draft_sample_method" not in json.loads(exported(deployment, "vllm"))
    for name, server in (
        ("sglang", "SGLang"),
        ("sglang-adaptive", "SGLang"),
        ("tensorrt-llm", "TensorRT-LLM"),
    ):
        (note,) = sampled.rule_note(server)
        assert note in FORMATS[name].export(sampled).notes
        assert note not in FORMATS[name].export(deployment).notes


def test_one_tree_is_that_of_the_batch_size(deploy: Deploy) -> None:
    rows = {1: RAGGED, 4: DEFAULT_TREE}
    for size, tree in ((0, RAGGED), (1, RAGGED), (2, DEFAULT_TREE), (99, DEFAULT_TREE)):
        choices = json.loads(exported(deploy(rows, size), "choices"))
        assert Tree.from_paths(choices) == tree


def test_choices_are_at_most_ten_wide(deploy: Deploy) -> None:
    wide = Tree.from_paths([[rank] for rank in range(12)] + [[0, 0]])
    result = export_choices(deploy({1: wide}))
    rules.check_choices(json.loads(result.content))
    assert "room for 10 children" in result.notes[0]


def test_speculation_profile(deploy: Deploy) -> None:
    deployment = deploy({1: OFF})
    profile = json.loads(exported(deployment, "speculation-profile"))
    rules.check_speculation_profile(profile)
    steps = sum(profile["acceptance_length_histogram"].values())
    assert profile["mean_accept_length"] == pytest.approx(deployment.trace.num_positions / steps)
    assert profile["draft_checkpoint"]["name"] == "toy-draft"


def test_speculation_profile_is_of_this_draft_alone(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, borrowed=True)
    deployment = Deployment(profile, Library((tmp_path,)), "t", "d")
    with pytest.raises(MissingMeasurement, match="acceptance is borrowed"):
        exported(deployment, "speculation-profile")


TYPED = (0.8, 0.6, 0.4)


@pytest.fixture
def typed(deploy: Deploy) -> Deployment:
    """Rows of two lengths, so that one setting for all has to be judged by typed rates."""
    deployment = deploy({1: Tree.chain(1), 4: CHAIN})
    sources = deployment.profile.sources
    sources = sources.model_copy(update={"trace": rates_source(TYPED, "; chains only")})
    return replace(deployment, profile=deployment.profile.model_copy(update={"sources": sources}))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "speculation-profile"])
def test_typed_rates_are_enough_for_a_server(typed: Deployment, name: str) -> None:
    assert FORMATS[name].export(typed).content
    for length in range(4):
        chain = Tree.chain(length)
        assert typed.acceptance.tokens_per_step(chain) == pytest.approx(1 + sum(TYPED[:length]))


def test_what_typed_rates_do_not_say_is_no_candidate(typed: Deployment) -> None:
    assert typed.acceptance.covers(CHAIN)
    assert not typed.acceptance.covers(Tree.chain(4))
    assert not typed.acceptance.covers(STAR)

    def rate(tree: Tree) -> float:
        return typed.mean_log_rate({1: tree, 4: tree})

    chosen = typed.one_setting(lambda tree: True, [*chains(8), STAR])
    assert chosen == max(chains(3), key=rate)


def test_typed_rates_replay_as_they_were_typed(typed: Deployment) -> None:
    config = json.loads(exported(typed, "vllm-synthetic"))
    assert config["synthetic_acceptance_rates"] == list(TYPED)
    longest_at_4 = replace(typed, batch_size=4)
    assert exported(longest_at_4, "aiconfigurator").splitlines()[-1] == (
        "--nextn 3 --nextn-accepted 1.8"
    )
    assert exported(longest_at_4, "dynamo").splitlines()[-1] == (
        "--ais-nextn 3 --ais-nextn-accept-rates 0.8,0.75,0.666667"
    )


def test_a_speculation_profile_is_not_made_of_typed_rates(typed: Deployment) -> None:
    with pytest.raises(MissingMeasurement, match=r"is typed; record .*--dataset mine"):
        exported(typed, "speculation-profile")


def test_simulators_get_one_short_chain(deploy: Deploy) -> None:
    for name in ("aiconfigurator", "dynamo"):
        length, numbers = rules.check_nextn(exported(deploy({1: CHAIN}), name))
        assert length == 3
        long_length, _ = rules.check_nextn(exported(deploy({1: Tree.chain(8)}), name))
        assert long_length <= 5
        if name == "dynamo":
            accepted = numbers[0] * (1 + numbers[1] * (1 + numbers[2]))
        else:
            (accepted,) = numbers
        rate = deploy({1: CHAIN})
        assert accepted == pytest.approx(
            rate.tokens_per_s(1, CHAIN) * rate.cost.step_ms(1, CHAIN) / 1000 - 1, abs=1e-4
        )


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "speculation-profile"])
def test_off_throughout_is_no_result(deploy: Deploy, name: str) -> None:
    with pytest.raises(NoFeasibleTree, match="start the server without speculation"):
        FORMATS[name].export(deploy({1: OFF, 4: OFF}))


def test_exporting_needs_no_torch(tmp_path: Path) -> None:
    write_profile(tmp_path)
    script = (
        "import sys; from stree_autotune.cli.commands import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert not left.code, left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    arguments = ["export", NAME, "--to", "vllm", "--data", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    rules.check_vllm(json.loads(run.stdout))


def test_the_docs_have_the_compatibility_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "serve-it.md"
    assert markdown_table() in page.read_text()


@pytest.mark.parametrize(
    ("server", "target", "draft", "words"),
    [
        ("vllm", "zamba2-7b", "x", "may not start with any speculation"),
        ("vllm", "llama", "state-spaces/mamba2-130m", "crashes at its first proposal"),
        ("vllm", "bamba-9b", "x", "was removed"),
    ],
)
def test_known_traps_are_said(server: str, target: str, draft: str, words: str) -> None:
    assert any(words in note for note in model_notes(server, target, draft))
    assert not list(model_notes(server, "llama-8b", "llama-1b"))


def test_sglang_s_limits_are_said() -> None:
    assert "--max-running-requests 64" in next(limit_notes("sglang", 64))
    assert not any("max-running" in note for note in limit_notes("sglang", 48))
    assert not list(limit_notes("vllm", 64))


@pytest.fixture
def by_head(deploy: Deploy) -> Deployment:
    """A profile whose draft is the target's own head."""
    made = deploy(MIXED)
    draft = made.profile.draft.model_copy(update={"name": "mtp"})
    return replace(made, profile=made.profile.model_copy(update={"draft": draft}))


def test_servers_are_told_of_the_targets_own_head(by_head: Deployment) -> None:
    config = json.loads(exported(by_head, "vllm"))
    assert config["method"] == "mtp"
    assert "model" not in config
    assert config["num_speculative_tokens"] == 3
    script = exported(by_head, "sglang")
    assert "--speculative-algorithm NEXTN" in script
    assert "draft-model-path" not in script
    notes = FORMATS["sglang-adaptive"].export(by_head).notes
    assert not any("STANDALONE" in note for note in notes)
    config = yaml.safe_load(exported(by_head, "tensorrt-llm"))["speculative_config"]
    assert config["decoding_type"] == "MTP"
    assert "speculative_model" not in config
    assert json.loads(exported(by_head, "speculation-profile"))["method"] == "mtp"
