"""The report: what it computes again, what it says and draws, and how a browser sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chromium import chromium, find_chromium
from hypothesis import given
from strategies import trees
from synthetic import brute_walk, latent_trace, small_traces

from stree_autotune.report.data import find_evidence, rank_shares, reach_shares, scan
from stree_autotune.report.live import live_rows
from stree_autotune.report.page import Section, make_section, render
from stree_autotune.report.svg_chart import linear_axis, log_axis, nodes_axis
from stree_autotune.report.verdict import Alternative, Verdicts
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.trace.file import Trace
from stree_autotune.trace.tree_walk import walk
from stree_autotune.trace.typed_rates import rates_source
from stree_core.profile import Measured, MeasuredBlock, Profile, TreeText, load_profile
from stree_core.tree import Tree

MEASURED = "h200--demo-target--demo-draft--demo"
ESTIMATED = "h100--demo-target--demo-draft--gsm8k"
BORROWED = "h200--mamba2-2.7b--mamba2-130m--gsm8k"
ALL_FIGURES = [
    "speed", "trees", "ranks", "runtime", "steps", "prompts", "requests", "live", "history"
]  # fmt: skip
OF_MEASUREMENTS = ("prompts", "requests", "live")
STOPS = (
    "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')]"
    ".filter(element => element.checkVisibility())"
)


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def shipped(name: str) -> Profile:
    """Return a shipped profile; one of them as `validate --write` would leave it."""
    profile = load_profile(shipped_root() / "tuned" / f"{name}.yaml")
    if name != MEASURED:
        return profile
    rows = [
        Measured(batch_size=1, mode=mode, tokens_per_step=2, step_ms=0.2, tokens_per_s=10_000)
        for mode in ("off", "chain 2", "tuned chain", "ragged tree")
    ]
    block = MeasuredBlock(gpu="NVIDIA H200", date="2026-01-01", versions={}, rows=tuple(rows))
    return profile.model_copy(update={"measured": block})


@pytest.fixture(scope="module")
def sections() -> dict[str, Section]:
    names = (MEASURED, ESTIMATED, BORROWED)
    library = Library((shipped_root(),))
    return {name: make_section(shipped(name), f"{name}.yaml", name, library) for name in names}


def elsewhere(profile: Profile, **changes: str) -> Profile:
    """Return a profile whose trace is named otherwise."""
    trace = profile.sources.trace.model_copy(update=changes)
    sources = profile.sources.model_copy(update={"trace": trace})
    return profile.model_copy(update={"sources": sources})


def test_every_figure_is_drawn_described_and_backed_by_numbers(
    sections: dict[str, Section],
) -> None:
    assert [figure.key for figure in sections[MEASURED].figures] == ALL_FIGURES
    others = [key for key in ALL_FIGURES if key not in OF_MEASUREMENTS]
    assert [figure.key for figure in sections[ESTIMATED].figures] == others
    page = Page(render(list(sections.values())))
    figures = [figure for section in sections.values() for figure in section.figures]
    drawn = sum(len(figure.panels) for figure in figures)
    # off has the interval of the best alternative
    bars = sum(len(section.verdicts.rows) for section in sections.values())
    pictures = [svg for svg in page.of("svg") if svg.get("role") == "img"]
    assert len(pictures) == drawn + bars
    assert all(len(svg["aria-label"] or "") > 20 for svg in pictures)
    assert all(svg.get("aria-hidden") for svg in page.of("svg") if svg not in pictures)
    for figure in figures:
        assert figure.rows, figure.key
        assert {len(row) for row in figure.rows} == {len(figure.headers)}, figure.key
    folded = [figure for figure in figures if figure.folded]
    assert {figure.key for figure in folded} == {"history"}
    assert len(page.of("details")) == len(figures) + len(folded) + len(sections)


def test_the_page_asks_for_nothing(sections: dict[str, Section]) -> None:
    text = render(list(sections.values()))
    page = Page(text)
    assert not page.of("script")
    assert not page.of("img")
    addresses = [a for _, tag in page.tags for a in (tag.get("src"), tag.get("href")) if a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\(|@import|https?://", text)


def test_estimates_are_marked_and_measurements_are_not(sections: dict[str, Section]) -> None:
    def cells(name: str) -> list[str]:
        table = render([sections[name]]).split("<tbody>")[1].split("</tbody>")[0]
        return re.findall(r'data-label="(?:step ms|tokens/s)">\s*(.*?)\s*</td>', table, re.DOTALL)

    assert all("≈" in cell for cell in cells(ESTIMATED))
    assert not any("≈" in cell for cell in cells(MEASURED))
    # a borrowed trace says nothing against measured milliseconds, nor against verdict off
    borrowed = dict(zip(range(14), cells(BORROWED), strict=True))
    assert not any("≈" in borrowed[2 * i] for i in range(7))
    off = [row.verdict == "off" for row in shipped(BORROWED).policy]
    assert ["≈" not in borrowed[2 * i + 1] for i in range(7)] == off
    marked = {figure.key for figure in sections[ESTIMATED].figures if figure.estimated}
    assert marked == {"speed", "runtime", "history"}
    assert {f.key for f in sections[BORROWED].figures if f.estimated} == {
        "speed", "trees", "ranks", "history",
    }  # fmt: skip


def test_a_row_that_is_off_names_the_best_alternative(sections: dict[str, Section]) -> None:
    off = [
        line
        for section in sections.values()
        for line in section.verdicts.rows
        if line.row.verdict == "off"
    ]
    assert off
    for line in off:
        other = line.other
        assert other is not None, line.row.reason
        assert other.low <= other.speedup <= other.high
        assert f"{100 * (other.speedup - 1):.1f} % [" in line.row.reason
        assert other.tree in render([s for s in sections.values() if line in s.verdicts.rows])
    row = off[0].row.model_copy(update={"reason": "off: no speculation fits"})
    assert Alternative.of(row) is None


def test_headlines_of_estimates_say_so(sections: dict[str, Section]) -> None:
    for name, section in sections.items():
        heading = render([section]).split("<h1")[1].split("</h1>")[0]
        assert ("estimated" in heading) == (name != MEASURED)


def test_a_certificate_is_told_where_it_says_something() -> None:
    library, profile = Library((Path("nowhere"),)), shipped(MEASURED)

    def told(gap: float | None) -> str:
        rows = tuple(
            row.model_copy(update={"predicted": row.predicted.model_copy(update={"gap": gap})})
            for row in profile.policy
        )
        changed = profile.model_copy(update={"policy": rows})
        return render([make_section(changed, "p.yaml", "p", library)])

    assert "1.2 % at batch size 1" in told(0.0123)
    assert "Certificate" not in told(0.9) + told(None)


def test_the_search_is_the_profile_s_own(sections: dict[str, Section]) -> None:
    profile = shipped(BORROWED)
    evidence = find_evidence(profile, Library((shipped_root(),)))
    assert evidence.trace is not None
    assert evidence.cost is not None
    rows = profile.policy[:3]
    scans = scan(profile.model_copy(update={"policy": rows}), evidence.trace, evidence.cost)
    for found, row in zip(scans, rows, strict=True):
        same = [trial for trial in found.trials if trial.tree == row.tree.build()]
        assert len(same) == 1
        assert same[0].tokens_per_s == pytest.approx(row.predicted.tokens_per_s, rel=1e-5)
        assert [p.trial.tree.num_nodes for p in found.best] == sorted(
            {trial.tree.num_nodes for trial in found.trials}
        )
        for point in found.best:
            rivals = [t for t in found.trials if t.tree.num_nodes == point.trial.tree.num_nodes]
            assert point.trial.tokens_per_s == max(t.tokens_per_s for t in rivals)
            assert point.low <= point.high
        inside = [p.low <= p.trial.tokens_per_s <= p.high for p in found.best]
        assert np.mean(inside) > 0.9


def test_live_rows_are_predicted_where_their_name_tells_the_tree() -> None:
    profile = shipped(MEASURED)
    rows = live_rows(profile, find_evidence(profile, Library((shipped_root(),))))
    by_mode = {row.measured.mode: row for row in rows}
    tuned = by_mode["tuned chain"]
    assert tuned.predicted_tokens_per_s == profile.policy[0].predicted.tokens_per_s
    assert by_mode["off"].predicted_tokens_per_step == 1
    assert by_mode["chain 2"].predicted_tokens_per_s is not None
    assert by_mode["ragged tree"].predicted_tokens_per_s is None
    assert by_mode["ragged tree"].error is None


@given(small_traces(), trees(max_nodes=8, max_depth=4))
def test_shares_of_nodes_are_what_a_plain_loop_counts(trace: Trace, tree: Tree) -> None:
    if tree.max_children > trace.meta.num_children or not trace.num_positions:
        return
    _, starts = brute_walk(trace, tree)
    counted = dict.fromkeys([(), *tree.paths], 0)
    for start in starts:
        end = trace.offsets[np.searchsorted(trace.offsets, start, side="right")]
        for length in range(end - start + 1):
            path = tuple(trace.ranks[start : start + length].tolist())
            if path not in counted:
                break
            counted[path] += 1
    expected = [counted[path] / len(starts) for path in ((), *tree.paths)]
    assert reach_shares(trace, tree) == pytest.approx(expected)


def test_shares_of_ranks_add_up_and_start_where_steps_do() -> None:
    trace = latent_trace(3, num_prompts=40, phi=0.7)
    tree = Tree.chain(3)
    ranks = rank_shares(trace, tree)
    assert np.allclose(ranks.shares.sum(axis=1), 1)
    starts = walk(trace, tree).starts
    assert ranks.num_steps[0] == len(starts)
    assert ranks.shares[0][0] == pytest.approx(float(np.mean(trace.ranks[starts] == 0)))
    # steps start more often where drafting fails than positions do
    assert ranks.shares[0][0] < rank_shares(trace, Tree.chain(0)).shares[0][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "traces/nowhere.safetensors"}, "the search path has none"),
        ({"sha256": "0" * 64}, "the search path has another one"),
        ({"name": "../../outside.safetensors"}, "traces/outside.safetensors"),
    ],
)
def test_what_is_not_at_hand_is_left_out_and_named(changes: dict[str, str], words: str) -> None:
    section = make_section(
        elsewhere(shipped(MEASURED), **changes), "p.yaml", "p", Library((shipped_root(),))
    )
    found = [figure.key for figure in section.figures]
    assert found == ["trees", "runtime", "steps", "prompts", "live"]
    (sentence,) = section.missing
    assert words in sentence
    assert sentence in "".join(Page(render([section])).words)


def test_typed_rates_are_the_shares_of_a_chain(tmp_path: Path) -> None:
    profile = shipped(MEASURED)
    chain, rates = Tree.chain(2), (0.8, 0.6, 0.4)
    rows = tuple(
        row.model_copy(update={"verdict": "chain", "tree": TreeText(paths=chain.paths)})
        for row in profile.policy
    )
    sources = profile.sources.model_copy(update={"trace": rates_source(rates)})
    typed = profile.model_copy(update={"policy": rows, "sources": sources})
    section = make_section(typed, "p.yaml", "p", Library((tmp_path,)))
    (figure,) = [figure for figure in section.figures if figure.key == "trees"]
    assert [row[-1] for row in figure.rows] == ["80.0 %", "60.0 %"]
    assert any("its acceptance was typed" in sentence for sentence in section.missing)


def test_a_profile_alone_still_gives_a_report(tmp_path: Path) -> None:
    section = make_section(shipped(MEASURED), "p.yaml", "p", Library((tmp_path,)))
    assert [figure.key for figure in section.figures] == ["trees", "live"]
    assert len(section.missing) == 2
    assert Verdicts.of(section.profile).headline in render([section])


def test_text_of_a_profile_is_no_markup() -> None:
    trick = '<script>alert("x")</script>&'
    profile = shipped(BORROWED)
    row = profile.policy[0].model_copy(update={"reason": trick})
    profile = profile.model_copy(update={"dataset": trick, "policy": (row, *profile.policy[1:])})
    page = Page(render([make_section(profile, trick, "p", Library((Path("nowhere"),)))]))
    assert not page.of("script")
    assert trick in "".join(page.words)


def test_headlines() -> None:
    profile = shipped(BORROWED)
    chain = next(row for row in shipped(MEASURED).policy if row.verdict == "chain")
    off = next(row for row in shipped(ESTIMATED).policy if row.verdict == "off")
    rows = {row.verdict: row for row in (*profile.policy, chain, off)}

    def headline(**verdicts: tuple[int, ...]) -> str:
        policy = sorted(
            (rows[verdict].model_copy(update={"batch_size": size})
             for verdict, sizes in verdicts.items() for size in sizes),
            key=lambda row: row.batch_size,
        )  # fmt: skip
        return Verdicts.of(profile.model_copy(update={"policy": tuple(policy)})).headline

    assert headline(off=(1, 2), tree=(32, 64)) == (
        "Speculate with a tree at batch sizes 32 and 64, not otherwise."
    )
    assert headline(off=(1, 8), tree=(32,)) == (
        "Speculate with a tree at batch size 32, not otherwise."
    )
    assert headline(off=(1, 2)) == "Do not speculate."
    size = rows["chain"].tree.build().num_nodes
    assert headline(chain=(1,)) == f"Speculate with a chain of {size} draft tokens."


def test_axes() -> None:
    axis = linear_axis("y", [0.0, 73.0])
    assert (axis.high, [text for _, text in axis.ticks]) == (80, ["0", "20", "40", "60", "80"])
    assert linear_axis("x", [65.0], ends_round=False).high == 65
    assert [axis.place(value) for value in (0, 40, 80, 90)] == [0, 0.5, 1, 1]
    log = log_axis("y", [0.3, 30.0])
    assert [value for value, _ in log.ticks] == [0.5, 1, 2, 5, 10, 20]
    assert log.place(3) == pytest.approx(np.log10(3 / 0.27) / np.log10(33 / 0.27))
    assert [value for value, _ in nodes_axis("x", 16).ticks] == [0, 1, 3, 7, 15]


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_a_browser_shows_every_figure(sections: dict[str, Section], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render([sections[MEASURED], sections[ESTIMATED]]))
    hidden = (
        "[...document.querySelectorAll('svg')].filter(svg => {const box = "
        "svg.getBoundingClientRect(); return box.width < 8 || box.height < 8;}).length"
    )
    # on a phone nothing is pushed aside to be seen, but for tables and files that were unfolded
    sideways = (
        "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "e.clientWidth > 0 && getComputedStyle(e).overflowX !== 'visible' && "
        "!e.closest('.scroll, pre')).length"
    )
    with chromium(tmp_path / "browser") as browser:
        for width, dark in ((1200, False), (1200, True), (390, True)):
            browser.open(page, width=width, dark=dark)
            assert browser.complaints() == []
            assert browser.requests() == [page.resolve().as_uri()]
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value(hidden) == 0
            assert width > 390 or browser.value(sideways) == 0
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", ground)[0]) < 64) == dark
        # every link, fold and scrolling region is reached by Tab, in the order of the page
        wanted = browser.value(f"{STOPS}.length")
        assert wanted > len(sections[MEASURED].figures)
        order = []
        for _ in range(wanted):
            browser.press_tab()
            order.append(browser.value(f"{STOPS}.indexOf(document.activeElement)"))
        assert order == list(range(wanted))


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_browser_would_notice(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>")
    with chromium(tmp_path / "browser") as browser:
        browser.open(page, width=1200)
        assert any("no" in complaint for complaint in browser.complaints())
        assert "http://127.0.0.1:9/x.png" in browser.requests()
