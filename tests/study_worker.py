"""One worker of a shared study, run as a process of its own by test_workers.

    python tests/study_worker.py STORAGE LOG [hang]

It writes a line for every tree that it has evaluated. With `hang` it stops for ever in the middle
of its second round, after a line for every tree that it has claimed; without, it says that it is
ready and begins when there is a file `go` beside its log, so that none has done all before another
has started.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from synthetic import FakeCost, latent_trace

from stree_autotune.live.workers import Evaluated, Worker
from stree_autotune.search.study import (
    Candidates,
    SearchSetting,
    StudyPlace,
    Trial,
    best_picks,
    enqueue,
    open_storage,
    text_of,
)
from stree_autotune.search.tree_space import TreeSpace

BUDGET = 14
PATIENCE_S = 4.0
ROUND = 3
COST = FakeCost()


def main() -> None:
    storage, log, hangs = sys.argv[1], Path(sys.argv[2]), "hang" in sys.argv
    space = TreeSpace.of(latent_trace(0, num_prompts=16, length=40), 12)
    study = StudyPlace(open_storage(storage), "shared", seed=len(log.name)).open(1)
    picks = best_picks(space, Candidates(1, COST, SearchSetting()))
    enqueue(study, space, [cell for _, cell in picks])
    if not hangs:
        log.write_text("ready\n")
        while not log.with_name("go").exists():
            time.sleep(0.01)
    with Worker(study, space, BUDGET, patience_s=PATIENCE_S) as worker:
        rounds = 0
        while True:
            claims = worker.claim(ROUND)
            rounds += bool(claims)
            if hangs and rounds == 2:
                with log.open("a") as file:
                    file.writelines(f"claimed {text_of(claim.tree)}\n" for claim in claims)
                time.sleep(600)
            for claim in claims:
                time.sleep(0.1)
                tokens, step_ms = space.tokens_per_step(claim.tree), COST.step_ms(1, claim.tree)
                trial = Trial.at(1, claim.tree, tokens, step_ms)
                found = Evaluated(claim.tree, tokens, step_ms, 0.0, trial.tokens_per_s)
                worker.tell(claim, found)
                with log.open("a") as file:
                    file.write(f"told {text_of(claim.tree)}\n")
            if not claims and not worker.wait():
                return


main()
