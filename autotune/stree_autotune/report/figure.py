"""A figure of the report: panels drawn as SVG, what they say in words, and the numbers behind."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from stree_autotune.store import digits, percent
from stree_core.profile import PolicyRow, Profile

MOST_PANELS = 9


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing under its own heading."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels with a lead, a legend of (style, words), and a table of the same numbers.

    estimated: True when what is drawn is not measured for this very pair and GPU. narrow: True when
    it may stand beside another. folded: True when it is shown on demand alone.
    """

    key: str
    title: str
    lead: str
    panels: tuple[Panel, ...]
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[tuple[str, str], ...] = ()
    estimated: bool = False
    narrow: bool = False
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Marks:
    """Which of a profile's numbers are estimates."""

    times: bool
    tokens: bool

    @classmethod
    def of(cls, profile: Profile) -> Marks:
        """Read the status of both sources."""
        sources = profile.sources
        return cls(sources.runtime.status == "estimated", sources.trace.status == "estimated")

    @property
    def speed(self) -> bool:
        """True when tokens per second are estimates: they come from both sources."""
        return self.times or self.tokens

    @property
    def spoken(self) -> str:
        """What the description of a drawing of speeds starts with."""
        return "Estimated. " if self.speed else ""


def panel_rows(rows: tuple[PolicyRow, ...]) -> tuple[PolicyRow, ...]:
    """Return the rows that get a panel of their own: all, or as many as fit, evenly spread."""
    if len(rows) <= MOST_PANELS:
        return rows
    last = len(rows) - 1
    chosen = {round(i * last / (MOST_PANELS - 1)) for i in range(MOST_PANELS)}
    return tuple(rows[i] for i in sorted(chosen))


def about(text: str, *, estimated: bool) -> str:
    """Return a number's text, marked when it is an estimate."""
    return f"≈ {text}" if estimated else text


def template(name: str) -> Template:
    """Return the template of a page; what it is not given is an error."""
    environment = Environment(
        loader=PackageLoader("stree_autotune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digits": digits, "percent": percent}
    return environment.get_template(name)
