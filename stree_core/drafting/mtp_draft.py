"""The target's own multi-token-prediction head as a draft.

A head's row is a token and a hidden state from before it: the target's, after its final norm, for
the root, and what the head made of the parent for a node further down. Row and token stand one
position apart: the row of the token at position p + 1 lies at p in the head's cache.

Keys and values depend on a row alone, since the head begins with its attention. So the rows of an
accepted path are made true by filing them again with the target's hidden states, which needs no
attention; a step without speculation files its root's row, and the head never falls behind.

Sources: vLLM's v1/spec_decode, SGLang's eagle_worker, Megatron-LM's multi_token_prediction.

Shape letters: T tree tokens, B slots, W rows of a pass, M = W * B, N rows of hidden states, D
hidden size, V vocabulary, R rows of a buffer, L path capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stree_core.drafting.draft import PromptReader, StepEnd, TargetReader
from stree_core.drafting.prefill import Prefill, PromptPart
from stree_core.drafting.tree_plan import DraftLevel, HeadRows, TreePlan
from stree_core.families import AttentionShape, ModelShape
from stree_core.models import (
    AttentionCache,
    AttentionWeights,
    Cache,
    CacheSize,
    Model,
    ModelWeights,
    Pass,
    PromptPass,
    RowBlock,
    like,
)
from stree_kernels.launch.packing import Packing
from stree_kernels.linear.deferred_norm import DeferredNorm, Residual
from stree_kernels.sampling.commit_path_ref import FIRST_TOKEN, LAST_NODE


class MtpDraft:
    """An MTP head, with the embedding and the LM head of its target."""

    falls_behind = False
    feeds_itself = True

    def __init__(self, shape: ModelShape, weights: ModelWeights, target: Model) -> None:
        assert weights.join is not None
        self.shape = shape
        self.num_scored = len(target.weights.lm_head_VD)
        self.layout = HeadRows()
        self.device = target.device
        self._body = Model(shape, weights, target.backend)
        self._target = target
        self._join = weights.join
        mixer, first = shape.blocks[0].parts[0].mixer, weights.blocks[0].parts[0]
        assert isinstance(mixer, AttentionShape)
        assert isinstance(first, AttentionWeights)
        self._attention = (first, mixer)

    def make_cache(self, size: CacheSize, device: torch.device | None = None) -> Cache:
        """Allocate keys, values and features."""
        cache = self._body.make_cache(size, device)
        features = (1 + size.num_rows, size.num_slots, self.shape.hidden_size)
        cache.features_RBD = torch.zeros(
            features, dtype=self._body.dtype, device=device or self.device
        )
        return cache

    def score(self, level: DraftLevel, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> Tensor:
        """Run one level; what the head makes of its rows is kept for their children."""
        assert plan.draft_block is not None
        assert cache.features_RBD is not None
        tokens_WB = tokens_RB[1:][level.inputs].contiguous()
        source_WB = level.source_W1.expand(-1, tokens_WB.shape[1])
        this = Pass(plan.draft_block, cache, level.first, len(tokens_WB), level.first == 0)
        out_WBD = cache.features_RBD[1 + this.first : 1 + this.end]
        return self.run(tokens_WB, cache.features_RBD, source_WB, this, out_WBD)

    def run(
        self, tokens_WB: Tensor, hidden_NBD: Tensor, source_WB: Tensor, this: Pass,
        out_WBD: Tensor,
    ) -> Tensor:  # fmt: skip
        """Run rows of tokens and of the hidden states from before them, `source_WB` of N.

        Writes what the head makes of them; returns logits [W, B, V] of the tokens that follow.
        """
        residual, rows = self._joined(tokens_WB, hidden_NBD, source_WB)
        self._body.run_blocks(residual, rows, this, out_WBD.flatten(0, 1))
        return self._target.logits(out_WBD)

    def pass_by(self, plan: TreePlan, tokens_RB: Tensor, cache: Cache) -> None:
        """File the root's row."""
        assert plan.draft_block is not None
        assert cache.features_RBD is not None
        this = Pass(plan.draft_block, cache, 0, 1, commit=True)
        source_1B = plan.node_T1[:1].expand(-1, tokens_RB.shape[1])
        self.file(tokens_RB[1:2], cache.features_RBD, source_1B, this)

    def take_over(self, plan: TreePlan, end: StepEnd, cache: Cache) -> None:
        """File the path's rows behind the root's, and keep what the next root's row reads."""
        assert cache.features_RBD is not None
        depth = plan.tree.depth
        if depth:
            tokens_LB = end.result_XB[FIRST_TOKEN : FIRST_TOKEN + depth]
            block = RowBlock(depth + 1, plan.target_block.mask_RR, plan.entry_L, {})
            this = Pass(block, cache, 1, depth, commit=False)
            begin_B = cache.committed_B - cache.pending.length_B
            self.file(tokens_LB, end.hidden_TBD, end.path_LB[:depth], this, begin_B)
        last_1B1 = (
            end.result_XB[LAST_NODE, None, :, None] if end.advances else plan.node_T1[:1, None]
        )
        last_1BD = last_1B1.expand(1, *end.hidden_TBD.shape[1:])
        torch.gather(end.hidden_TBD, 0, last_1BD, out=cache.features_RBD[:1])

    def prompt_reader(
        self, target: Model, target_cache: Cache, cache: Cache, *, use_graph: bool
    ) -> PromptReader:
        """Return what reads prompts with the target, the head along with it."""
        assert target is self._target
        return _HeadReader(self, target, target_cache, cache, use_graph=use_graph)

    def file_prompts(
        self, next_M: Tensor, hidden_MD: Tensor, packing: Packing, cache: Cache
    ) -> None:
        """Store keys and values of packed rows: hidden states, and the tokens behind them."""
        (layer, *_) = cache.layers
        assert isinstance(layer, AttentionCache)
        source_M1 = torch.arange(len(next_M), device=self.device)[:, None]
        _, rows = self._joined(next_M[:, None], hidden_MD[:, None], source_M1)
        this = PromptPass(cache, packing, len(next_M))
        this.kv_write(self._body.backend, rows, *self._attention, layer)

    def file(
        self, tokens_WB: Tensor, hidden_NBD: Tensor, source_WB: Tensor, this: Pass,
        begin_B: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Store keys and values of rows: of tokens, and of the hidden states from before them."""
        (layer, *_) = this.cache.layers
        assert isinstance(layer, AttentionCache)
        _, rows = self._joined(tokens_WB, hidden_NBD, source_WB)
        self._body.rope_kv_write(rows, *self._attention, layer, this, begin_B)

    def _joined(
        self, tokens_WB: Tensor, hidden_NBD: Tensor, source_WB: Tensor
    ) -> tuple[Residual, DeferredNorm]:
        """Return the stream that tokens and hidden states start, and its rows."""
        eps, body = self.shape.norm_eps, self._body
        residual = like(body.empty_residual(tokens_WB.numel()), zero=True)
        both_MK = hidden_NBD.new_empty(tokens_WB.numel(), 2 * self.shape.hidden_size)
        body.backend.join_rows(
            body.weights.embed_VD, tokens_WB, hidden_NBD, source_WB, both_MK, eps=eps,
            scale=self.shape.embed_scale,
        )  # fmt: skip
        both = DeferredNorm(both_MK, None, 1, 0.0)
        return residual, body.backend.linear_add(both, self._join, residual, eps=eps)


class _HeadReader(TargetReader):
    """Reads prompts with the target; the head stores a row for every token but the first.

    The row of a prompt's last token is of any token behind it, and no token is committed there.
    """

    def __init__(
        self, head: MtpDraft, target: Model, target_cache: Cache, cache: Cache, *, use_graph: bool
    ) -> None:
        super().__init__(target, target_cache, use_graph=use_graph)
        self._target = Prefill(
            target, target_cache, partial(head.file_prompts, cache=cache), use_graph=use_graph
        )
        self._head_cache = cache

    def begin(self, slot: int) -> None:
        """Make a slot ready for a prompt."""
        super().begin(slot)
        self._head_cache.hold(slot, 0)

    def read(self, parts: Sequence[PromptPart]) -> Tensor:
        """Read parts of prompts; keep the hidden states after them for the next root's rows."""
        hidden_SD = super().read(parts)
        assert self._head_cache.features_RBD is not None
        for part, hidden_D in zip(parts, hidden_SD, strict=True):
            if part.ends:
                self._head_cache.features_RBD[0, part.slot] = hidden_D
        return hidden_SD

    def end(self, slot: int, num_tokens: int) -> None:
        """Make a slot ready for steps."""
        super().end(slot, num_tokens)
        self._head_cache.hold(slot, num_tokens - 1)
