"""The squared Hellinger distance as a training loss, written against SpecForge alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from specforge.core.target_distribution import TargetDistribution
from specforge.losses import LossRegistration
from specforge.plugins import Plugin


class HellingerOptions(BaseModel):
    """Options of ``hellinger``.

    Attributes:
        scale: what the distance is multiplied by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Hellinger:
    """1 - sum_x sqrt(p(x) q(x)) over the draft vocabulary, p not renormalized."""

    options: HellingerOptions

    def terms(
        self, draft_logits: torch.Tensor, target: TargetDistribution, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the distance [...] of draft logits [..., V_d]; SpecForge applies the mask."""
        log_p = target.logits - target.log_normalizer[..., None]
        log_q = draft_logits.float().log_softmax(-1)
        return {"hellinger": 1 - ((log_p + log_q) / 2).exp().sum(-1)}

    def combine(
        self, terms: Mapping[str, torch.Tensor], mean: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the loss of every position."""
        return {"loss": self.options.scale * terms["hellinger"]}


def create_plugin() -> Plugin:
    """Return the plug-in; the entry point in pyproject.toml names this function."""
    loss = LossRegistration("hellinger", HellingerOptions, Hellinger)
    return Plugin(name="hellinger", api_version=1, losses=(loss,))
