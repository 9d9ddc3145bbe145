"""The profile: round trips, refuses what does not fit, and never overwrites what is not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from strategies import trees
from synthetic_data import make_profile, policy_row

from stree_core.errors import ConfigError
from stree_core.files import dump_yaml, validate
from stree_core.profile import Profile, load_profile, policy_of, require_writable, save_profile
from stree_core.strict_yaml import parse_yaml
from stree_core.tree import DEFAULT_TREE, Tree


@given(
    shapes=st.lists(trees(max_nodes=8), min_size=1, max_size=3),
    speedup=st.floats(0.1, 10),
    note=st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=40),
)
@settings(max_examples=25, deadline=None)
def test_yaml_round_trip(shapes: list[Tree], speedup: float, note: str) -> None:
    rows = [policy_row(2**i, tree) for i, tree in enumerate(shapes)]
    predicted = rows[0].predicted.model_copy(update={"speedup": speedup})
    first = rows[0].model_copy(update={"predicted": predicted, "reason": note})
    profile = make_profile(first, *rows[1:])
    text = dump_yaml(profile)
    loaded = validate(parse_yaml(text, "text"), Profile, "text")
    assert loaded == profile
    assert dump_yaml(loaded) == text
    assert [row.tree.build() for row in loaded.policy] == shapes


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    save_profile(make_profile(), path)
    assert load_profile(path) == make_profile()
    assert [p.name for p in tmp_path.iterdir()] == ["profile.yaml"]


def test_row_in_use() -> None:
    sizes = [policy_row(size, Tree.chain(1)) for size in (1, 4, 16)]
    profile = make_profile(*sizes)
    used = {n: profile.row_for(n).batch_size for n in (1, 2, 4, 5, 16, 17, 1000)}
    assert used == {1: 1, 2: 4, 4: 4, 5: 16, 16: 16, 17: 16, 1000: 16}


def content(**changes: Any) -> dict[str, Any]:
    return {**make_profile().model_dump(mode="json", exclude_none=True), **changes}


def row_content(**changes: Any) -> dict[str, Any]:
    row = policy_row(1, DEFAULT_TREE).model_dump(mode="json", exclude_none=True)
    return content(policy=[{**row, **changes}])


def made(**changes: Any) -> dict[str, Any]:
    return content(provenance={**content()["provenance"], **changes})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (content(datset="x"), "unknown key datset; did you mean dataset?"),
        (content(schema_version=2), "schema_version"),
        (content(kind="stree-runtime"), "kind"),
        (content(policy=[]), "policy"),
        (content(policy=content()["policy"][::-1]), "ascending batch sizes, got \\[8, 1\\]"),
        (content(sampling={"temperature": -1.0}), "sampling.temperature"),
        (content(sampling={"temperature": 1.0}), "rule greedy has temperature 0"),
        (content(sampling={"rule": "mss"}), "naive and mss a temperature above 0"),
        (content(sampling={"top_p": 0.5}), "rule greedy has temperature 0 and top_p 1"),
        (content(target={"name": "x", "config_sha256": "short"}), "target.config_sha256"),
        (row_content(batch_size=0), "policy.0.batch_size"),
        (row_content(verdict="chain"), "verdict chain must match its paths, which are tree"),
        (row_content(verdict="off"), "verdict off must match"),
        (row_content(tree={"paths": [[0], [2]]}), "siblings have ranks without gaps"),
        (row_content(tree={"paths": [[0, 0]]}), "a path needs its parent"),
        (row_content(tree={"paths": [[0], [0]]}), "every path stands once"),
        (row_content(tree={"paths": [[-1]]}), "policy.0.tree.paths.0.0"),
        (row_content(tree={"paths": [[0] * 300]}), "policy.0.tree.paths.0"),
        (row_content(tree={"paths": [[i] for i in range(256)]}), "at most 255"),
        (row_content(tree={"parents": [-1, 1]}), "unknown key policy.0.tree.parents"),
        (row_content(tree={"paths": "0"}), "policy.0.tree.paths"),
        (row_content(predicted={"tokens_per_step": float("inf")}), "policy.0.predicted"),
        (row_content(batch_size=10**9), "policy.0.batch_size"),
        (content(context=10**12), "context"),
        (made(seed=-1), "provenance.seed"),
        (made(seed=2**63), "provenance.seed"),
        (made(versions={str(i): "1" for i in range(65)}), "provenance.versions"),
        (content(dataset="\x1b[2Jspoof"), r"dataset: text has no control characters, got '\\x1b"),
        (
            content(gpu={"name": "h\u202e200", "status": "measured"}),
            "gpu.name: text has no control",
        ),
        (row_content(reason="a\x9bb"), "policy.0.reason: text has no control"),
        (made(date="\x07"), "provenance.date: text has no control"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(changed, Profile, "profile")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_infinite_predictions_are_refused() -> None:
    predicted = policy_row(1, DEFAULT_TREE).predicted.model_dump(exclude_none=True)
    for key in ("tokens_per_step", "step_ms", "tokens_per_s", "speedup"):
        changed = row_content(predicted={**predicted, key: float("inf")})
        with pytest.raises(ConfigError, match=f"policy.0.predicted.{key}"):
            validate(changed, Profile, "profile")


def test_a_million_nodes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("policy:\n- tree:\n    paths: [" + "[0]," * 1_000_000 + "[0]]\n")
    with pytest.raises(ConfigError, match="at most"):
        load_profile(path)
    with pytest.raises(ConfigError, match=r"policy\.0\.tree\.paths: .* at most 255"):
        validate(row_content(tree={"paths": [[0]] * 1_000_000}), Profile, "profile")


def test_default_output_is_replaced_only_when_it_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "stree-profile.yaml"
    require_writable(path, force=False, is_default=True)
    require_writable(path, force=False, is_default=False)
    save_profile(make_profile(), path)
    require_writable(path, force=False, is_default=True)
    with pytest.raises(ConfigError, match="--force"):
        require_writable(path, force=False, is_default=False)
    path.write_text("notes: mine\n")
    with pytest.raises(ConfigError, match="not a stree profile; pass --force"):
        require_writable(path, force=False, is_default=True)
    require_writable(path, force=True, is_default=False)
    assert path.read_text() == "notes: mine\n"


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    path = tmp_path / "stree-profile.yaml"
    path.mkdir()
    with pytest.raises(ConfigError, match="it is a folder; name a file in it"):
        require_writable(path, force=True, is_default=True)


def test_a_policy_takes_the_row_of_a_profile_and_each_tree_once() -> None:
    profile = make_profile()
    policy = policy_of(profile)
    assert len(set(policy.trees)) == len(policy.trees)
    for num_active in (1, 2, 3, 5, 8, 64, 1000):
        expected = profile.row_for(num_active).tree.build()
        assert policy.trees[policy.choose(num_active)] == expected


def test_a_kept_password_is_not_read() -> None:
    command = "stree-tune --storage 'mysql://db/x?password=hunter2' --data=/home/me/x\x1b[2J"
    read = validate(made(command=command), Profile, "profile").provenance.command
    assert read == "stree-tune --storage mysql://db/x '--data=x\\x1b[2J'"


def test_extreme_predictions_are_refused() -> None:
    extremes = {"tokens_per_step": 1e300, "step_ms": 1e-300, "tokens_per_s": 1e300}
    predicted = policy_row(1, DEFAULT_TREE).predicted.model_dump(exclude_none=True)
    for key, value in extremes.items():
        with pytest.raises(ConfigError, match=f"policy.0.predicted.{key}"):
            validate(row_content(predicted={**predicted, key: value}), Profile, "profile")
