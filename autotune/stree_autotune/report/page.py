"""The report: one HTML page of profiles that needs no network and runs no script."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from stree_autotune.report.data import (
    Evidence,
    Scan,
    find_evidence,
    rank_shares,
    reach_shares,
    scan,
)
from stree_autotune.report.figure import Figure, Marks, panel_rows, template
from stree_autotune.report.live import LiveRow, live_figure, live_rows
from stree_autotune.report.prompts import prompts_figure, requests_figure
from stree_autotune.report.runtime import staircase_figure, steps_figure
from stree_autotune.report.speed import history_figure, speed_figure
from stree_autotune.report.tree import ranks_figure, trees_figure
from stree_autotune.report.verdict import Verdicts
from stree_autotune.store import USEFUL_GAP, Library, command, percent, version_of
from stree_core.errors import StreeError
from stree_core.extras import DISTRIBUTION
from stree_core.files import dump_yaml, open_regular, write_atomically
from stree_core.profile import Profile, load_profile
from stree_core.shown_text import printable
from stree_core.tree import OFF, Tree

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Section:
    """One profile's part of the page."""

    anchor: str
    file_name: str
    profile: Profile
    verdicts: Verdicts
    marks: Marks
    live: tuple[LiveRow, ...]
    figures: tuple[Figure, ...]
    missing: tuple[str, ...]
    deploy: tuple[tuple[str, str], ...]
    certified: str
    yaml: str


GENERATOR = '<meta name="generator" content="stree">'
GENERATOR_WITHIN_BYTES = 1024


def is_report(path: Path) -> bool:
    """True when a file is a page that `write_report` wrote."""
    with open_regular(path) as file:
        return GENERATOR.encode() in file.read(GENERATOR_WITHIN_BYTES)


def write_report(paths: Sequence[Path], library: Library, output: Path) -> tuple[Section, ...]:
    """Write the report of the profiles at `paths`; raise ConfigError for a malformed one."""
    sections = []
    for number, path in enumerate(paths, start=1):
        logger.info("profile %d of %d: %s", number, len(paths), path.name)
        sections.append(
            make_section(load_profile(path), printable(path.name), f"profile-{number}", library)
        )
    write_atomically(output, render(sections).encode())
    return tuple(sections)


def make_section(profile: Profile, file_name: str, anchor: str, library: Library) -> Section:
    """Collect what a page says of one profile; what is not at hand is named, not made up."""
    evidence = find_evidence(profile, library)
    live = live_rows(profile, evidence)
    scans, problem = _scans(profile, evidence)
    return Section(
        anchor=anchor,
        file_name=file_name,
        profile=profile,
        verdicts=Verdicts.of(profile),
        marks=Marks.of(profile),
        live=live,
        figures=_figures(profile, evidence, scans, live),
        missing=evidence.missing + problem,
        deploy=tuple(_deploy(profile, file_name)),
        certified=_certified(profile),
        yaml=dump_yaml(profile).decode(),
    )


def render(sections: Sequence[Section]) -> str:
    """Return the page."""
    words = {
        "sections": sections,
        "version": version_of(DISTRIBUTION),
        "generator": Markup(GENERATOR),
    }
    return template("report.html").render(words)


def _deploy(profile: Profile, file_name: str) -> Iterator[tuple[str, str]]:
    """Yield what one does with the profile next, and the command that does it."""
    if profile.server is not None:
        name = profile.server.name
        yield f"Settings of {name}", command("export", file_name, "--to", name)
        return
    yield "Try it", command("decode", "--profile", file_name, "--prompt", "Tom has 3 apples.")
    yield "Check it on this machine", command("validate", "--profile", file_name, "--write")
    for name in ("vllm", "sglang"):
        yield f"Settings of {name}", command("export", file_name, "--to", name)


def _certified(profile: Profile) -> str:
    """Say how far any static tree may at most be ahead, where the certificate says something."""
    gaps = {row.batch_size: row.predicted.gap for row in profile.policy}
    useful = {size: gap for size, gap in gaps.items() if gap is not None and gap <= USEFUL_GAP}
    return ", ".join(f"{percent(gap)} at batch size {size}" for size, gap in useful.items())


def _scans(profile: Profile, evidence: Evidence) -> tuple[tuple[Scan, ...], tuple[str, ...]]:
    """Return the repeated search of the rows that get panels, and why there is none."""
    if evidence.trace is None or evidence.cost is None:
        return (), ()
    shown = profile.model_copy(update={"policy": panel_rows(profile.policy)})
    try:
        return scan(shown, evidence.trace, evidence.cost), ()
    except StreeError as err:
        return (), (f"The search cannot be repeated: {err}.",)


def _figures(
    profile: Profile, evidence: Evidence, scans: tuple[Scan, ...], live: tuple[LiveRow, ...]
) -> tuple[Figure, ...]:
    """Return every figure that the evidence allows, in the order of the page."""
    marks = Marks.of(profile)
    figures: list[Figure | None] = []
    if scans:
        figures.append(speed_figure(scans, marks))
    figures.append(_trees(profile, evidence, scans, marks))
    if evidence.trace is not None:
        tree, whose = _walked_tree(profile)
        ranks = rank_shares(evidence.trace, tree)
        num_children = evidence.trace.meta.num_children
        figures.append(ranks_figure(ranks, num_children, whose, borrowed=marks.tokens))
    if evidence.table is not None and evidence.cost is not None:
        figures.append(staircase_figure(profile, evidence.table, evidence.cost, marks))
        figures.append(steps_figure(evidence.table))
        if not marks.times:
            figures.append(prompts_figure(evidence.table))
            figures.append(requests_figure(profile, evidence.table, evidence.trace))
    if profile.measured is not None:
        figures.append(live_figure(profile.measured, live))
    if scans:
        figures.append(history_figure(scans, marks))
    return tuple(figure for figure in figures if figure is not None)


def _trees(
    profile: Profile, evidence: Evidence, scans: tuple[Scan, ...], marks: Marks
) -> Figure | None:
    rival = None
    if scans:
        nearest = max(scans, key=lambda s: s.fastest_speculation.tokens_per_s / s.off.tokens_per_s)
        rival = nearest.row.batch_size, nearest.fastest_speculation.tree
    trees = {row.tree.build() for row in profile.policy} | ({rival[1]} if rival else set())
    speculating = [tree for tree in trees if tree.num_nodes]
    shares: dict[Tree, tuple[float, ...]] = {}
    if evidence.trace is not None:
        shares = {tree: reach_shares(evidence.trace, tree) for tree in speculating}
    elif evidence.rates:
        shares = {tree: (1.0, *evidence.rates[: tree.num_nodes]) for tree in speculating}
    return trees_figure(profile.policy, shares, rival, borrowed=marks.tokens)


def _walked_tree(profile: Profile) -> tuple[Tree, str]:
    """Return the tree whose steps the heat map looks at, and in words where they start."""
    for row in profile.policy:
        if row.verdict != "off":
            return row.tree.build(), f"where those of batch size {row.batch_size} start"
    return OFF, "at every position, as they do without speculation"
