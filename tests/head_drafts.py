"""Inputs of drafts that read the target's last hidden state, and what training makes of them."""

from __future__ import annotations

import torch
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE

from specforge_lk.drafts.model import HeadDraftModel

BATCH, LENGTH, HEADS = 2, 15, 3


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, L], features [B, L, H] and chain starts [B, L]."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), generator=generator)
    features = torch.randn(BATCH, LENGTH, HIDDEN_SIZE, generator=generator)
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, 2 : LENGTH - HEADS - 1] = True
    starts[1, [5, 8]] = True
    return tokens, features, starts


@torch.no_grad()
def trained_logits(
    model: HeadDraftModel, tokens: torch.Tensor, features: torch.Tensor
) -> list[torch.Tensor]:
    """Logits [B, L, V_d] of every head, by the training forward."""
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    return list(model.head_logits(features, following, torch.ones_like(tokens), HEADS))
