"""Random inputs of drafts that are decoded."""

from __future__ import annotations

import torch
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE

BATCH = 2


def draft_inputs(
    length: int, heads: int, layers: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [B, L], features [B, L, layers · H] and where chains of ``heads`` start [B, L].

    Chains start at every position of the first row, and at two of the second.
    """
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB_SIZE, (BATCH, length), generator=generator)
    features = torch.randn(BATCH, length, layers * HIDDEN_SIZE, generator=generator)
    starts = torch.zeros(BATCH, length, dtype=torch.bool)
    starts[0, 2 : length - heads - 1] = True
    starts[1, [5, 8]] = True
    return tokens, features, starts
