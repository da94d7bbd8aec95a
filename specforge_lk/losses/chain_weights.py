"""Weights of draft positions that depend on the chain before them, in place of the trainer's own.

A draft position matters only where the chain gets there. With k counted from 0, x the recorded
token and all of it detached, the weight of draft position k is

    survival  prod_{i<k} past_i, past = min(1, q(x) / p(x)), or 1[x = argmax q] of a greedy draft:
              the chance that verification gets there along the recorded response;
    dpace     sum_{j>=k} prod_{i<=j} (q_i(x_i) + 1) / 2, D-PACE's (arXiv 2605.18810), smoothed by
              SpecForge's default ``dpace_alpha`` = 1/2. Draft positions that are not supervised
              are no factors and no summands;
    auf       prod_{i<k} 1[x_i = argmax q_i], Spec-AUF's (arXiv 2607.01893): 1 up to and including
              the first draft position whose likeliest token is not the recorded one, 0 after it.

A token outside the draft vocabulary is never proposed: its q is 0, and no chain gets past it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import torch

from specforge_lk.losses.contract import Target, Terms
from specforge_lk.overlap import OverlapTerms

#: SpecForge's default of ``training.dpace_alpha``.
DPACE_ALPHA: Final = 0.5

Heads = Sequence[Mapping[str, torch.Tensor]]


class ChainWeight(NamedTuple):
    """A way to weigh.

    Attributes:
        terms: what it needs of one draft position beside ``past`` and ``_supervised``, each [...].
        of: the weights [...] of all draft positions from their terms, 0 outside the masks.
    """

    terms: Callable[[torch.Tensor, Target, OverlapTerms], Terms]
    of: Callable[[Heads], list[torch.Tensor]]


def _nothing(draft_logits: torch.Tensor, target: Target, overlap: OverlapTerms) -> Terms:
    return {}


@torch.no_grad()
def _hit(draft_logits: torch.Tensor, target: Target, overlap: OverlapTerms) -> Terms:
    assert target.labels is not None
    hit = draft_logits.argmax(-1) == target.labels
    return {"_hit": hit.to(overlap.alpha.dtype)}


@torch.no_grad()
def _label_probability(draft_logits: torch.Tensor, target: Target, overlap: OverlapTerms) -> Terms:
    assert overlap.log_q is not None and target.labels is not None
    # A position without coverage was skipped and has log_q 0: its token counts as out of reach.
    known = (target.labels >= 0) & (overlap.log_coverage != -torch.inf)
    return {"_label_probability": torch.where(known, overlap.log_q.exp(), 0.0)}


@torch.no_grad()
def _product_before(heads: Heads, *, of: str) -> list[torch.Tensor]:
    weight = torch.ones_like(heads[0][of])
    weights = []
    for terms in heads:
        weights.append(weight)
        weight = weight * terms[of]
    return weights


@torch.no_grad()
def _dpace(heads: Heads) -> list[torch.Tensor]:
    prefix = torch.ones_like(heads[0]["_label_probability"])
    prefixes = []
    for terms in heads:
        smooth = (1 - DPACE_ALPHA) * terms["_label_probability"] + DPACE_ALPHA
        prefix = prefix * torch.where(terms["_supervised"] == 1, smooth, 1.0)
        prefixes.append(prefix * terms["_supervised"])
    return list(torch.stack(prefixes).flip(0).cumsum(0).flip(0))


#: The ways, by ``chain_weight``. Without one ("gamma") the trainer's own weights stay.
CHAIN_WEIGHTS: Final[Mapping[str, ChainWeight]] = MappingProxyType(
    {
        "survival": ChainWeight(_nothing, partial(_product_before, of="past")),
        "dpace": ChainWeight(_label_probability, _dpace),
        "auf": ChainWeight(_hit, partial(_product_before, of="_hit")),
    }
)
