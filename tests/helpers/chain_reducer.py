"""What a loss makes of the terms of a chain, position by position, and what a trainer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from specforge.losses.reduction import reduce_heads

from specforge_lk.losses import ChainLoss


def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the supervised positions, detached."""
    return values.detach()[mask].mean()


def combine(
    loss, heads: Sequence[Mapping[str, torch.Tensor]], masks: Sequence[torch.Tensor]
) -> Sequence[Mapping[str, torch.Tensor]]:
    """What a loss makes of every draft position."""
    means = [partial(mean, mask=mask) for mask in masks]
    if isinstance(loss, ChainLoss):
        return loss.combine_chain(heads, means)
    return [loss.combine(terms, of) for terms, of in zip(heads, means, strict=True)]


def total(loss, heads: Sequence[Mapping[str, torch.Tensor]], masks: Sequence[torch.Tensor]):
    """The sum of the draft positions' means, from SpecForge's reducer."""
    return sum(head.loss for head in reduce_heads(loss, heads, masks))
