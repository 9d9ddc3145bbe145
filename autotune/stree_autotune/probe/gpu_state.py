"""What a GPU says of itself while it is measured: clocks, temperature, power."""

from __future__ import annotations

import subprocess

_FIELDS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
_TIMEOUT_S = 10


def gpu_state(index: int = 0) -> str | None:
    """Return one line by nvidia-smi, None where it is absent or does not know."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader", f"--id={index}"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in run.stdout.strip().split(",")]
    if len(values) != len(_FIELDS.split(",")):
        return None
    sm, memory, celsius, power = values
    return f"SM {sm}, memory {memory}, {celsius} C, {power}"[:90]
