"""Embed the decoder in a program of yours: requests join and leave while others run.

    python examples/embed.py [PROFILE]

Without PROFILE the demo pair decodes, on whatever device is there. A server would call `submit` as
requests come in, and send each update's text to whom it belongs.
"""

from __future__ import annotations

import sys

import stree_core as stree

PROMPTS = ("def add(a, b):", "What is a tree?", "Count to ten.", "import os")


def main() -> None:
    """Decode four prompts on two slots, and print each text as its request ends."""
    name = sys.argv[1] if len(sys.argv) > 1 else "h200--demo-target--mtp--demo"
    decoder = stree.load(name, num_slots=2)
    pair = decoder.pair
    stop = stree.StopRule(24, pair.target.shape.eos_token_ids)
    with stree.Session(decoder.engine, decode=pair.decode) as session:
        asked = {
            session.submit(stree.Request(tokens, stop)): prompt
            for prompt, tokens in zip(PROMPTS, pair.encode(list(PROMPTS)), strict=True)
        }
        while session.busy:
            for update in session.step():
                generation = update.generation
                if generation is None:
                    continue  # tokens of a request that goes on are in update.tokens
                steps, tokens = generation.num_steps, len(generation.tokens)
                text = pair.decode(generation.tokens)
                print(f"{asked[update.request_id]!r} + {text!r}")
                print(f"  {generation.finish}, {tokens} tokens in {steps} steps")


if __name__ == "__main__":
    main()
