"""Draft position k: g = h + A_k h, then the target's LM head, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from specforge_lk.drafts.model import HeadDraftModel, TargetWeights
from specforge_lk.overlap import Projection


class LinearHeadsConfig(PretrainedConfig):
    """Config of linear heads.

    Args:
        hidden_size: H of the target.
        vocab_size: V of the target.
        draft_vocab_size: V_d; the whole vocabulary where it is not given.
        num_heads: draft positions K.
    """

    model_type = "linear_heads"

    def __init__(
        self,
        hidden_size: int = 4096,
        vocab_size: int = 32000,
        draft_vocab_size: int | None = None,
        num_heads: int = 6,
        **options: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size or vocab_size
        self.num_heads = num_heads
        super().__init__(**options)


class LinearHeadsModel(HeadDraftModel):
    """K matrices [H, H], and the target's LM head on the draft vocabulary."""

    config_class = LinearHeadsConfig

    def __init__(self, config: LinearHeadsConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.matrices = nn.ModuleList(
            nn.Linear(size, size, bias=False) for _ in range(config.num_heads)
        )
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.lm_head.requires_grad_(False)
        self.post_init()

    @property
    def heads(self) -> int:
        """Draft positions K."""
        return len(self.matrices)

    @torch.no_grad()
    def tie_to_target(self, target: TargetWeights) -> None:
        """Copy the target's LM head; the draft vocabulary is known by now."""
        self.lm_head.weight.copy_(target.scaled_head(self.t2d))

    @torch.no_grad()
    def start_from(self, target: TargetWeights) -> None:
        """Start as the target itself: every matrix is 0."""
        for matrix in self.matrices.parameters():
            nn.init.zeros_(matrix)

    def head_projections(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[Projection]:
        """Yield states [B, L, H] and LM head of every draft position; tokens play no part in it."""
        hidden = hidden.to(self.lm_head.weight.dtype)
        for matrix in self.matrices[:heads]:
            yield Projection(hidden + matrix(hidden), self.lm_head.weight)
