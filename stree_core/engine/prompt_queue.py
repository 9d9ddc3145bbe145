"""Which prompts are being read, and which of their tokens come next: pieces of a token budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from stree_core.drafting import PromptPart
from stree_core.engine.sampling import SamplingParams


@dataclass(slots=True)
class Reading:
    """A slot's prompt: how much of it is read, and whether it has to be read without others."""

    prompt: tuple[int, ...]
    params: SamplingParams
    num_read: int = 0
    alone: bool = False


class PromptQueue:
    """Prompts that are being read, by slot, in the order in which they came."""

    def __init__(self) -> None:
        self._readings: dict[int, Reading] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._readings

    def add(self, slot: int, reading: Reading) -> None:
        """Queue a slot's prompt."""
        self._readings[slot] = reading

    def params(self, slot: int) -> SamplingParams:
        """Return how the request of a slot is sampled."""
        return self._readings[slot].params

    def drop(self, slot: int) -> None:
        """Forget a slot's prompt, if there is one."""
        self._readings.pop(slot, None)

    def clear(self) -> None:
        """Forget all prompts."""
        self._readings.clear()

    def next_parts(self, budget: int, only: int | None = None) -> list[PromptPart]:
        """Return what to read next, at most `budget` tokens; of slot `only` if one is named."""
        parts: list[PromptPart] = []
        for slot, reading in self._readings.items():
            if only not in (None, slot) or (reading.alone and parts):
                continue
            end = min(len(reading.prompt), reading.num_read + budget)
            parts.append(PromptPart(slot, reading.prompt, reading.num_read, end))
            budget -= end - reading.num_read
            if reading.alone or not budget:
                break
        return parts

    def read(self, parts: Sequence[PromptPart]) -> None:
        """Take note that parts are read; forget the prompts that have ended."""
        for part in parts:
            self._readings[part.slot].num_read = part.end
            if part.ends:
                self.drop(part.slot)

    def start_again(self, slots: Collection[int], *, alone: bool) -> None:
        """Read prompts from their first token again: what their slots hold is unknown."""
        for slot in slots:
            self._readings[slot].num_read = 0
            self._readings[slot].alone |= alone


def pieces(parts: Sequence[PromptPart], budget: int) -> list[list[PromptPart]]:
    """Return parts cut into pieces of at most `budget` tokens, in order."""
    found: list[list[PromptPart]] = []
    room = 0
    for part in parts:
        begin = part.begin
        while begin < part.end:
            if not room:
                found.append([])
                room = budget
            end = min(part.end, begin + room)
            found[-1].append(PromptPart(part.slot, part.prompt, begin, end))
            room -= end - begin
            begin = end
    return found
