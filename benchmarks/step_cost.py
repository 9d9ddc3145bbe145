"""Print how far the runtime tables' predictions can be trusted, and a check against others' times.

    python benchmarks/step_cost.py [TABLE ...]

Leaves sizes, batch sizes, whole steps and shapes out in turn (accuracy), for the shipped tables or
the given files; then says how wide the band of an estimate is on every GPU with a spec, and
predicts the step times that STree published for an RTX 3090. Needs no GPU.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from accuracy import Accuracy, accuracy, forward_accuracy, pair_accuracy, roofline_accuracy
from published import published_table
from report import RESULTS, read

from stree_autotune.cost.estimate import TWO_SIDED, fit_shapes, transfer_spreads
from stree_autotune.cost.layout import find_layouts
from stree_autotune.cost.shape_table import MeasuredGpu
from stree_autotune.cost.work import all_samples
from stree_autotune.store.library import Library, shipped_root
from stree_autotune.store.runtime_table import load_runtime_table


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the errors of predictions")
    parser.add_argument("tables", nargs="*", type=Path)
    paths = parser.parse_args().tables or sorted((shipped_root() / "runtime").glob("*.yaml"))
    tables = [load_runtime_table(path) for path in paths]
    for table in tables:
        title = f"{table.gpu}: {table.target.name} + {table.draft.name}"
        print(f"**{title}**\n\n{as_markdown(accuracy(table))}")
    library = Library.open()
    for gpu in sorted({table.gpu for table in tables}):
        spec = library.gpu_spec(gpu)
        mine = tuple(table for table in tables if table.gpu == gpu)
        if spec is not None:
            layouts = find_layouts(library, mine)
            print(f"**{gpu}: roofline**\n\n{as_markdown(roofline_accuracy(mine, spec, layouts))}")
            whole = MeasuredGpu(spec, mine, (), layouts)
            rows, inside = pair_accuracy(whole, library)
            if rows:
                print(f"**{gpu}: shapes alone**\n\n{as_markdown(rows)}")
                print(f"{inside:.1%} of these steps lie inside the band of an estimate.\n")
            for path in (RESULTS / f"{name}-{gpu}.json" for name in ("shapes", "forward")):
                if path.exists():
                    rows, inside = forward_accuracy(read(path)["rows"], whole, library)
                    print(f"**{path.name}**\n\n{as_markdown(rows)}")
                    print(f"{inside:.1%} of these passes lie inside the band of an estimate.\n")
            print(as_bands(whole, library))
            print(published_table(mine, spec, library))


def as_bands(measured: MeasuredGpu, library: Library) -> str:
    """Return the 95 % bands of an estimated time: of the measured pairs, and of shapes alone."""
    first, spec = measured.tables[0], measured.spec
    roofline = fit_shapes(all_samples(measured.tables, measured.layouts), spec, first)
    alone = math.hypot(roofline.within, roofline.between)
    lines = ["| GPU | a measured pair carried over | shapes alone |", "| --- | ---: | ---: |"]
    for name in sorted(library.gpu_names()):
        wanted = library.gpu_spec(name)
        if wanted is None:
            continue
        spreads = math.hypot(*transfer_spreads(roofline, wanted))
        bands = [TWO_SIDED * spreads, TWO_SIDED * math.hypot(spreads, alone)]
        carried, shapes = (f"x{math.exp(band):.2f}" for band in bands)
        lines.append(f"| {name} | {'measured' if name == spec.name else carried} | {shapes} |")
    return f"**bands of estimates from {spec.name}**\n\n" + "\n".join(lines) + "\n"


def as_markdown(rows: list[Accuracy]) -> str:
    lines = [
        "| left out | term | points | median | 90 % | worst |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.left_out} | {row.term} | {row.count} | {row.median:.1%} | "
        f"{row.ninth_decile:.1%} | {row.worst:.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
