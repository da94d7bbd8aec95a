"""The losses of one draft position, on one set of overlap terms.

A loss works in two steps. ``terms`` turns the logits of one draft position (a head, in SpecForge)
into vectors with one value per token position and can be called chunk by chunk; ``combine`` turns
the concatenated vectors into the loss per token position. The trainer's reducer averages the loss,
and for the metrics every vector whose name does not begin with "_", over the supervised positions.

Positions with coverage exactly 0 have no acceptance to gain: their loss is 0 and so is its
gradient; the metric ``no_coverage`` counts them. p~ is the target distribution renormalized on the
draft vocabulary, p is not; see `overlap_terms`. Sources: LK-losses paper, arXiv 2602.23881.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from specforge_lk.losses.chain_weights import CHAIN_WEIGHTS
from specforge_lk.losses.contract import Mean, Target, Terms
from specforge_lk.losses.options import CommonOptions, KLOptions, LambdaOptions
from specforge_lk.losses.terms import (
    KL_TERMS,
    OverlapLoss,
    Scheduled,
    blend,
    supervised_only,
    total_variation,
)
from specforge_lk.overlap import OverlapTerms


@dataclass(frozen=True)
class PositionLoss(OverlapLoss, ABC):
    """A loss that is each draft position's own, with a weight in its chain.

    With ``chain_weight`` it is a `ChainLoss`: it also has the method ``combine_chain``.
    """

    options: CommonOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.chain_weight != "gamma":
            object.__setattr__(self, "combine_chain", self._combine_chain)

    def _needs_tokens(self) -> bool:
        return self.options.chain_weight != "gamma"

    @abstractmethod
    def combine(self, terms: Terms, mean: Mean) -> Terms:
        """Return the loss of every position, and what it reports, each [...]."""

    def _combine_chain(
        self, heads: Sequence[Mapping[str, torch.Tensor]], means: Sequence[Mean]
    ) -> list[Terms]:
        """Return the losses of `combine`, each with its weight in the chain; see `ChainLoss`."""
        weights = CHAIN_WEIGHTS[self.options.chain_weight].of(
            [supervised_only(terms) for terms in heads]
        )
        weighted = []
        for terms, mean, weight in zip(heads, means, weights, strict=True):
            combined = self.combine(dict(terms), mean)
            loss = weight * combined["loss"]
            weighted.append({**combined, "loss": loss, "chain_weight": weight})
        return weighted

    def _chain_terms(
        self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor, overlap: OverlapTerms
    ) -> Terms:
        if self.options.chain_weight == "gamma":
            return {}
        supervised = {"_supervised": (mask != 0).to(overlap.alpha.dtype)}
        return supervised | CHAIN_WEIGHTS[self.options.chain_weight].terms(
            draft_logits, target, overlap
        )


@dataclass(frozen=True)
class KL(PositionLoss):
    """KL divergence KL(p~ || q), p~ the target renormalized on the draft vocabulary."""

    options: KLOptions

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": KL_TERMS[self.options.kl_term](terms)}


class TV(PositionLoss):
    """Total variation, 1 - alpha; target mass outside the draft vocabulary counts."""

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": total_variation(terms)}


class LKAlpha(PositionLoss):
    """Negative log acceptance rate, -log alpha.

    With a point-mass target this is the negative log-likelihood.
    """

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": -terms["_log_alpha"]}


@dataclass(frozen=True)
class LKLambda(Scheduled, PositionLoss):
    """Blend of KL and TV, lambda KL + (1 - lambda) (1 - alpha), lambda = exp(-eta sg[alpha]).

    That is the paper's lambda. Where alpha cannot become large, for the target samples from many
    tokens or the draft is small, it never lets go of KL: ``lambda_scope`` "schedule" does, along
    the run.
    """

    options: LambdaOptions

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return blend(self.options, terms, mean, total_variation(terms), self._progress)


class ReverseKL(PositionLoss):
    """Reverse KL divergence KL(q || p) on the draft vocabulary, p not renormalized."""

    _reverse_kl = True

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": terms["reverse_kl"]}
