"""vLLM's log of iterations, as a second opinion on step times.

With `--enable-logging-iteration-details` the server logs how many requests and tokens an iteration
had and how long the engine took (v1/metrics/loggers.py of 0.32). Only iterations without prefill
are decoding steps. The log leaves out what happens between two iterations, so a run's step time is
at least as long; where it is much longer, the time goes elsewhere than into the models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from stree_autotune.server.files import Document
from stree_autotune.server.runs import BenchRun
from stree_autotune.server.tables import median

FEWEST = 20
OUTSIDE = 1.25
AGREES = 1.08
_LINE = re.compile(
    r"Iteration\(\d{1,12}\): 0 context requests, 0 context tokens, (\d{1,6}) generation requests, "
    r"(\d{1,7}) generation tokens, iteration elapsed time: (\d{1,9}\.\d+) ms"
)


def iteration_ms(documents: Iterable[Document]) -> dict[tuple[int, int], float]:
    """Return the median time of decoding iterations, by batch size and K."""
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for document in documents:
        for match in _LINE.finditer(document.text):
            requests, tokens = int(match[1]), int(match[2])
            if requests and tokens % requests == 0:
                times[requests, tokens // requests - 1].append(float(match[3]))
    return {key: median(values) for key, values in times.items() if len(values) >= FEWEST}


def iteration_findings(
    runs: Sequence[BenchRun], logged_ms: dict[tuple[int, int], float]
) -> list[str]:
    """Say where runs and the log of iterations have step times that do not fit each other."""
    notes = []
    for key, logged in sorted(logged_ms.items()):
        members = [run.usual_ms or run.step_ms for run in runs if run.key == key]
        if not members:
            continue
        usual, (size, tokens) = median(members), key
        if logged > AGREES * usual:
            what = "which is longer than a step can be; the log is of another run"
        elif usual > OUTSIDE * logged:
            what = "the rest is spent between iterations: scheduling, sampling, the API server"
        else:
            continue
        notes.append(
            f"batch size {size}, K = {tokens}: a step takes {usual:.3g} ms and the log of "
            f"iterations says {logged:.3g} ms, {what}"
        )
    return notes
