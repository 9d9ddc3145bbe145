"""What a profile says on the screen: a sentence that is true, in 80 columns."""

from __future__ import annotations

import pytest
from synthetic_data import make_profile, policy_row

from stree_autotune.store.library import Library
from stree_autotune.store.show import answer, print_profile
from stree_autotune.store.terminal import digits, result_console
from stree_core.profile import PolicyRow, Profile, load_profile
from stree_core.tree import DEFAULT_TREE, OFF, Tree

WIDTH = 80
CHAIN = Tree.chain(2)


def _row(batch_size: int, tree: Tree, speedup: float = 1.0) -> PolicyRow:
    row = policy_row(batch_size, tree)
    predicted = row.predicted.model_copy(update={"speedup": speedup})
    return row.model_copy(update={"predicted": predicted})


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(1, OFF, 1.0), (8, OFF, 1.0)], "At every batch size leave speculation off."),
        (
            [(1, Tree.chain(1), 1.204)],
            "At every batch size use a chain of 1 token (+20 %).",
        ),
        (
            [(1, OFF, 1.0), (16, OFF, 1.0), (32, DEFAULT_TREE, 1.5), (64, OFF, 1.0)],
            "Up to 16 sequences leave speculation off; for 17 to 32 use a tree of 12 tokens "
            "(+50 %); from 33 sequences leave speculation off.",
        ),
        (
            [
                (1, Tree.chain(2), 1.3),
                (2, DEFAULT_TREE, 1.1),
                (3, OFF, 1.0),
                (4, DEFAULT_TREE, 2.0),
            ],
            "For one sequence use a chain of 2 tokens (+30 %); at 2 use a tree of 12 tokens "
            "(+10 %); at 3 leave speculation off; from 4 sequences use a tree of 12 tokens "
            "(+100 %).",
        ),
        (
            [(4, CHAIN, 1.3), (8, Tree.chain(5), 0.98)],
            "At every batch size use chains of 2 to 5 tokens (-2 to +30 %).",
        ),
    ],
)
def test_the_answer_is_one_sentence(rows: list[tuple[int, Tree, float]], says: str) -> None:
    policy = tuple(_row(*row) for row in rows)
    profile = make_profile().model_copy(update={"policy": policy})
    assert answer(profile) == says


def test_a_sentence_holds_for_as_many_sequences_as_its_row_decodes() -> None:
    trees = {1: OFF, 16: Tree.chain(3), 64: OFF}
    rows = tuple(_row(size, tree) for size, tree in trees.items())
    profile = make_profile().model_copy(update={"policy": rows})
    for active, kind in ((1, "off"), (2, "chain"), (16, "chain"), (17, "off"), (99, "off")):
        assert profile.row_for(active).verdict == kind
    said = answer(profile)
    assert "for one sequence" in said.lower()
    assert "for 2 to 16 use a chain" in said
    assert "from 17 sequences" in said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.089312, "0.0893"), (1.0, "1.00"), (9.996, "10.0"), (99.96, "100"),
        (123.4, "123"), (133155.0, "133,000"), (0.00012345, "0.000123"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize("verbose", [False, True])
def test_shipped_profiles_fit_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    paths = Library.open(()).profile_paths()
    assert paths
    for path in paths:
        print_profile(load_profile(path), result_console(), verbose=verbose)
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line.rstrip()) > WIDTH or "…" in line]
    assert any(line.startswith("-v shows") for line in lines) != verbose


def test_estimated_gains_say_so() -> None:
    """Also in the sentence, which is what gets quoted."""
    estimated = next(
        profile
        for profile in map(load_profile, Library.open(()).profile_paths())
        if profile.estimated and any(row.verdict != "off" for row in profile.policy)
    )
    assert "(about +" in answer(estimated)


def _with_gaps(*gaps: float | None) -> Profile:
    rows = []
    for number, gap in enumerate(gaps):
        row = _row(2**number, CHAIN)
        predicted = row.predicted.model_copy(update={"gap": gap})
        rows.append(row.model_copy(update={"predicted": predicted}))
    return make_profile().model_copy(update={"policy": tuple(rows)})


def test_bounds_that_say_nothing_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_profile(_with_gaps(0.9, None), result_console(), verbose=True)
    assert "within" not in capsys.readouterr().out
    print_profile(_with_gaps(0.9, 0.0123), result_console(), verbose=True)
    out = capsys.readouterr().out
    table = out[out.index("within") :].splitlines()
    assert [line.split()[3:] for line in table[1:3]] == [["-"], ["1.2", "%"]]
