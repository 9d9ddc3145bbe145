"""The multi-token-prediction head beside a model, as config.json describes it.

Keys, weight names and the order of things are those of Nemotron 3 (Megatron-Bridge's
nemotron_h_bridge.py, vLLM's nemotron_h_mtp.py): layers of the model's own kinds under
`mtp.layers.`, the first with the norms and the projection before it, the last with the norm behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from stree_core.families.config_keys import spelled_kinds
from stree_core.families.config_reader import LAYERS, Bound, Keys, Refused, refuse_value
from stree_core.families.model_shape import AttentionShape, Block, Join, ModelShape, Part
from stree_core.families.weight_map import matrix, vector

PREFIX = "mtp."
MTP_FILE = "mtp_config.json"
MTP_CONFIG = "mtp_config"
"""Keys of a head that stand apart from its model's; they go before those."""

COUNT = "num_nextn_predict_layers"
KINDS = "mtp_layers_block_type"

PartsOf = Callable[[Keys, str, str], tuple[Part, ...]]
"""Returns the parts of a layer by the config, its kind and the prefix of its weights."""


def with_mtp(
    model: ModelShape, keys: Keys, parts_of: PartsOf, kinds_of: Callable[[Keys], list[str]]
) -> ModelShape:
    """Return the model with the head that its config names, unchanged where it names none.

    `kinds_of` reads the head's layers. transformers writes them even where there is no head: the
    count alone decides. Raises Refused for a head of another form.
    """
    own = keys.overlaid(MTP_CONFIG, MTP_FILE) if keys.has(MTP_CONFIG) else keys
    count = own.count(Bound(0, LAYERS.most), COUNT, default=0)
    if not count:
        return model
    if count != 1:
        # A block that runs again for every depth counts once, whatever an exporter wrote.
        raise refuse_value(COUNT, count, "1")
    kinds = kinds_of(own)
    prefixes = [f"{PREFIX}layers.{index}." for index in range(len(kinds))]
    blocks = tuple(
        Block(
            vector(prefix + "norm.weight", model.hidden_size),
            parts_of(own, kind, prefix + "mixer."),
        )
        for kind, prefix in zip(kinds, prefixes, strict=True)
    )
    attends = [[isinstance(part.mixer, AttentionShape) for part in b.parts] for b in blocks]
    if not attends or attends[0] != [True] or any(map(any, attends[1:])):
        raise Refused(
            f"an MTP head begins with its one attention layer, this one has {', '.join(kinds)}; "
            "use a checkpoint whose head does"
        )
    width = model.hidden_size
    join = Join(
        vector(prefixes[0] + "enorm.weight", width),
        vector(prefixes[0] + "hnorm.weight", width),
        matrix(prefixes[0] + "eh_proj.weight", width, 2 * width),
    )
    head = dataclasses.replace(
        model,
        blocks=blocks,
        final_norm=vector(prefixes[-1] + "final_layernorm.weight", width),
        join=join,
    )
    return dataclasses.replace(model, mtp=head)


def mtp_kinds(
    keys: Keys,
    spellings: Mapping[str, str],
    lettered: tuple[str, list[str] | None] | None = None,
) -> list[str]:
    """Read the kinds of a head's layers: a list of names, or what a family reads from letters."""
    listed = spelled_kinds(keys, KINDS, spellings)
    if listed:
        return listed
    name, kinds = lettered or (KINDS, None)
    if kinds is None:
        raise keys.missing(name)
    return kinds
