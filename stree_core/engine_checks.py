"""What an engine is given, checked at its door."""

from __future__ import annotations

from collections.abc import Sequence

from stree_core.draft import Draft
from stree_core.errors import ConfigError
from stree_core.given import prompt_ids, shown, whole_number
from stree_core.model import Model
from stree_core.tree import Tree


def require_draft(target: Model, draft: Draft | None, trees: Sequence[Tree]) -> None:
    """Raise ConfigError unless the trees need no draft, or have one that shares the tokens."""
    most = max(tree.num_nodes for tree in trees)
    if most == 0:
        return
    if draft is None:
        raise ConfigError(f"a tree of {most} nodes needs a draft model, got none; pass a draft")
    num_tokens, num_known = target.shape.vocab_size, draft.shape.vocab_size
    num_scored = draft.num_scored
    if num_known < num_tokens or num_scored > num_tokens:
        raise ConfigError(
            f"a draft must know and score the target's {num_tokens} tokens, it knows {num_known} "
            f"and scores {num_scored}; load both with load_pair"
        )


def known_prompt(given: object, target: Model) -> tuple[int, ...]:
    """Return a prompt's token ids; raise ConfigError unless the target knows every one."""
    prompt, num_tokens = prompt_ids(given), target.shape.vocab_size
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < num_tokens:
            raise ConfigError(
                f"token ids must be from 0 to {num_tokens - 1}, got {shown(token)} in a prompt; "
                "encode it with the target's own tokenizer"
            )
    return prompt


def require_tree(which: object, num_trees: int) -> int:
    """Return the number of a tree; raise ConfigError when there is none of that number."""
    number = whole_number("the number of a tree", which)
    if not 0 <= number < num_trees:
        raise ConfigError(
            f"an engine's trees are numbered 0 to {num_trees - 1}, got {shown(number)}; choose "
            "one of them"
        )
    return number
