"""Measure forward passes and whole steps on this machine's device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stree_kernels.lazy import exports

if TYPE_CHECKING:
    from stree_autotune.probe.plan import ProbeConfig as ProbeConfig
    from stree_autotune.probe.report import (
        run_model_probe as run_model_probe,
        run_probe as run_probe,
    )
    from stree_autotune.probe.run import probe as probe
    from stree_autotune.probe.stepper import (
        SteadyEngine as SteadyEngine,
        Stepper as Stepper,
        phases as phases,
        prompt_reader as prompt_reader,
    )
    from stree_autotune.probe.steps import free as free
    from stree_autotune.probe.timing import (
        Effort as Effort,
        Work as Work,
        time_interleaved as time_interleaved,
    )

__getattr__, __dir__ = exports(
    __name__,
    {
        "plan": ["ProbeConfig"],
        "report": ["run_model_probe", "run_probe"],
        "run": ["probe"],
        "stepper": ["SteadyEngine", "Stepper", "phases", "prompt_reader"],
        "steps": ["free"],
        "timing": ["Effort", "Work", "time_interleaved"],
    },
)
