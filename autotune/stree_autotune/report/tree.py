"""Figures of acceptance: the heat map of ranks by depth, and the chosen trees."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from stree_autotune.report.data import MOST_RANKS, Ranks
from stree_autotune.report.figure import Figure, Panel
from stree_autotune.report.svg_chart import WIDTH, add_text, svg_root, to_markup
from stree_autotune.store import percent
from stree_core.profile import PolicyRow
from stree_core.tree import Tree

CELL_HEIGHT = 22
RANK_LEFT, RANK_TOP = 74, 20
NODE_STEP_Y, NODE_MARGIN, LABEL_WIDTH = 34.0, 26.0, 34.0
DEEP_WIDTH = 390.0
TREES_LEAD = (
    "The root is the last emitted token; what hangs from it is drafted, likeliest on top, and "
    "verified in one pass."
)
SHARES_LEAD = (
    " The number at a node is the share of steps in which the target accepts it, walked over the "
    "trace or as it was typed; together they are the accept length."
)


def rank_names(num_children: int) -> tuple[str, ...]:
    """Return the names of the heat map's rows."""
    nth = ["1st", "2nd", "3rd", *(f"{i}th" for i in range(4, MOST_RANKS + 1))]
    return (*(f"{name} choice" for name in nth), f"{MOST_RANKS + 1}th–{num_children}th", "none")


def ranks_figure(ranks: Ranks, num_children: int, whose: str, *, borrowed: bool) -> Figure:
    """Draw where the target's tokens stood among the draft's choices, by depth."""
    names = rank_names(num_children)
    kept = [i for i in range(len(names)) if i != MOST_RANKS or num_children > MOST_RANKS]
    first, none = ranks.shares[0][0], ranks.shares[0][-1]
    description = (
        f"Heat map of {len(ranks.num_steps)} depths. At depth 1 the draft’s first choice is the "
        f"target’s token in {percent(first)} of the steps, none of its recorded choices in "
        f"{percent(none)}."
    )
    height = RANK_TOP + CELL_HEIGHT * len(kept) + 24
    root = svg_root(WIDTH, height, description)
    width = (WIDTH - RANK_LEFT - 2) / len(ranks.num_steps)
    for depth, shares in enumerate(ranks.shares):
        left = RANK_LEFT + depth * width
        add_text(root, left + width / 2, RANK_TOP - 7, str(depth + 1), "tick", "middle")
        for line, index in enumerate(kept):
            _cell(root, left, RANK_TOP + line * CELL_HEIGHT, width, float(shares[index]))
    for line, index in enumerate(kept):
        middle = RANK_TOP + line * CELL_HEIGHT + 15
        add_text(root, RANK_LEFT - 8, middle, names[index], "label", "end")
    add_text(root, RANK_LEFT + (WIDTH - RANK_LEFT) / 2, height - 6, "depth", "name", "middle")
    return Figure(
        key="ranks",
        title="Which of the draft’s choices the target takes",
        lead="Of the steps whose tokens so far were all among the draft’s recorded choices, the "
        f"share in which the next token was this choice, depth by depth. Steps start {whose}. "
        "A column adds up to 100 %.",
        panels=(
            Panel("Acceptance by rank and depth", f"{ranks.num_steps[0]:,} steps", to_markup(root)),
        ),
        headers=("depth", "steps", *(names[i] for i in kept)),
        rows=tuple(
            (str(depth), f"{count:,}", *(f"{100 * shares[i]:.1f} %" for i in kept))
            for depth, (count, shares) in enumerate(
                zip(ranks.num_steps, ranks.shares, strict=True), start=1
            )
        ),
        estimated=borrowed,
        narrow=True,
    )


def _cell(root: ElementTree.Element, left: float, top: float, width: float, share: float) -> None:
    place = {
        "x": f"{left + 1:.1f}",
        "y": f"{top + 1:.1f}",
        "width": f"{width - 2:.1f}",
        "height": f"{CELL_HEIGHT - 2}",
        "rx": "2",
        "class": "heat",
        # the square root keeps small shares apart
        "fill-opacity": f"{0.04 + 0.96 * share**0.5:.2f}",
    }
    ElementTree.SubElement(root, "rect", place)
    style = "heat-text heat-dark" if share > 0.3 else "heat-text"
    text = f"{100 * share:.0f}" if share >= 0.0095 else ("<1" if share else "·")
    add_text(root, left + width / 2, top + 15, text, style, "middle")


def trees_figure(
    rows: Sequence[PolicyRow],
    shares: dict[Tree, tuple[float, ...]],
    rival: tuple[int, Tree] | None,
    *,
    borrowed: bool,
) -> Figure | None:
    """Draw every tree of a policy once; `rival` is a batch size and a tree that was not chosen.

    `shares` may lack trees, whose nodes then stand without their shares. None when there is no tree
    to draw.
    """
    drawn = _used_trees(rows)
    if not drawn and rival is not None:
        drawn = {rival[1]: f"not chosen; the fastest that was tried at batch size {rival[0]}"}
    if not drawn:
        return None
    return Figure(
        key="trees",
        title="The draft tokens of a step",
        lead=TREES_LEAD + (SHARES_LEAD if shares.keys() & drawn else ""),
        panels=tuple(_tree_panel(tree, words, shares.get(tree)) for tree, words in drawn.items()),
        headers=("used at", "path of choices", "depth", "share of steps"),
        rows=tuple(
            (
                words,
                " ".join(str(rank + 1) for rank in path),
                str(len(path)),
                f"{100 * shares[tree][node]:.1f} %" if tree in shares else "not known",
            )
            for tree, words in drawn.items()
            for node, path in enumerate(tree.paths, start=1)
        ),
        estimated=borrowed,
        narrow=True,
    )


def _used_trees(rows: Sequence[PolicyRow]) -> dict[Tree, str]:
    """Return the trees of a policy and the batch sizes of each, in words."""
    sizes: dict[Tree, list[str]] = {}
    for row in rows:
        if row.verdict != "off":
            sizes.setdefault(row.tree.build(), []).append(str(row.batch_size))
    return {tree: "batch size " + ", ".join(names) for tree, names in sizes.items()}


def _tree_panel(tree: Tree, words: str, shares: tuple[float, ...] | None) -> Panel:
    places = _layout(tree)
    step_x = max(40.0, min(54.0, DEEP_WIDTH / tree.depth))
    width = 2 * NODE_MARGIN + step_x * tree.depth + LABEL_WIDTH
    height = 2 * NODE_MARGIN + NODE_STEP_Y * max(y for _, y in places) - 4
    name = tree.full_label
    spoken = "."
    if shares is not None:
        likeliest = ", ".join(percent(shares[level[0]]) for level in tree.levels[1:])
        spoken = f"; the likeliest node of each depth is accepted in {likeliest} of the steps."
    root = svg_root(width, height, f"{name[0].upper()}{name[1:]}, {words}{spoken}")
    at = [(NODE_MARGIN + step_x * x, NODE_MARGIN + NODE_STEP_Y * y) for x, y in places]
    for node, parent in enumerate(tree.parents[1:], start=1):
        (x0, y0), (x1, y1) = at[parent], at[node]
        bend = (x0 + x1) / 2
        path = f"M{x0:.1f} {y0:.1f}C{bend:.1f} {y0:.1f} {bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        thickness = 1.0 if shares is None else 1 + 5 * shares[node]
        attributes = {"d": path, "class": "branch", "stroke-width": f"{thickness:.1f}"}
        ElementTree.SubElement(root, "path", attributes)
    _circle(root, at[0], 8.0, "node root", "root", 1.0)
    add_text(root, at[0][0], at[0][1] - 13, "root", "tick", "middle")
    for node, ranks in enumerate(tree.paths, start=1):
        share = 0.5 if shares is None else shares[node]
        radius = 5 + 5 * share
        title = "choice " + " ".join(str(rank + 1) for rank in ranks)
        _circle(root, at[node], radius, "node", title, 0.25 + 0.75 * share)
        if shares is None:
            continue
        (x, y), label = at[node], percent(share)
        if tree.children[node]:
            add_text(root, x, y - radius - 4, label, "label", "middle")
        else:
            add_text(root, x + radius + 5, y + 4, label, "label", "start")
    return Panel(name.capitalize(), words, to_markup(root))


def _circle(
    root: ElementTree.Element,
    at: tuple[float, float],
    radius: float,
    style: str,
    title: str,
    opacity: float,
) -> None:
    place = {"cx": f"{at[0]:.1f}", "cy": f"{at[1]:.1f}", "r": f"{radius:.1f}"}
    # edges must not show through a node that is not opaque
    ElementTree.SubElement(root, "circle", {**place, "class": "node-ground"})
    place |= {"class": style, "fill-opacity": f"{opacity:.2f}"}
    circle = ElementTree.SubElement(root, "circle", place)
    ElementTree.SubElement(circle, "title").text = title


def _layout(tree: Tree) -> list[tuple[float, float]]:
    """Return (depth, line) per node: a leaf has a line of its own, a parent its first child's."""
    lines = [0.0] * tree.num_tokens
    free = 0

    def place(node: int) -> None:
        nonlocal free
        children = tree.children[node]
        if not children:
            lines[node] = float(free)
            free += 1
        for child in children:
            place(child)
        if children:
            lines[node] = lines[children[0]]

    place(0)
    return [(float(depth), line) for depth, line in zip(tree.depths, lines, strict=True)]
