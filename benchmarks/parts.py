"""What a run that was cut short has measured whole, and the options that measure the rest.

A part is what one name of an option stands for: a model's passes, a profile's rows. Rows of a part
that is not whole are measured again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fingerprint
from report import Row
from sources import Measurement, values, without

from stree_core.profile import load_profile

PASS_OPTIONS = ("--models", "--batches", "--tokens")


@dataclass(frozen=True, slots=True)
class Parts:
    """The option that names parts, the key of the name in a row, and how many rows each part has.

    Parts are in the order in which they are measured.
    """

    flag: str
    key: str
    num_rows: Mapping[str, int]

    def whole(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of parts that have all of theirs."""
        found = Counter(row[self.key] for row in rows)
        return [row for row in rows if found[row[self.key]] == self.num_rows.get(row[self.key])]

    def share_left(self, rows: Sequence[Row]) -> float:
        """Return which share of all rows is not here."""
        return 1 - len(rows) / sum(self.num_rows.values())

    def options_left(self, arguments: Sequence[str], rows: Sequence[Row]) -> list[str]:
        """Return a measurement's options for the parts that have no row here."""
        found = {row[self.key] for row in rows}
        left = [name for name in self.num_rows if name not in found]
        return [*without(arguments, self.flag), self.flag, *left]


def parts_of(measurement: Measurement, gpu: str) -> Parts | None:
    """Return the parts of a measurement; None for one that is measured as a whole."""
    if measurement.script == "live":
        return Parts("--profiles", "profile", rows_of_profiles(gpu))
    if measurement.script == "forward":
        options = {flag: values(measurement.arguments, flag) for flag in PASS_OPTIONS}
        models, batches, tokens = options.values()
        return Parts("--models", "model", dict.fromkeys(models, len(batches) * len(tokens)))
    return None


def rows_of_profiles(gpu: str) -> dict[str, int]:
    """Return how many rows live.py decodes of each profile of a GPU, those without any left out."""
    found = {}
    for path in sorted((fingerprint.ROOT / "profiles" / "tuned").glob(f"{gpu}--*.yaml")):
        speculating = [row for row in load_profile(path).policy if row.verdict != "off"]
        if speculating:
            found[path.stem] = len(speculating)
    return found
