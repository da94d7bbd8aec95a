"""What a loss takes and returns: the two forms that SpecForge's reducer knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

Terms = dict[str, torch.Tensor]
Mean = Callable[[torch.Tensor], torch.Tensor]


class Target(Protocol):
    """The target distribution at one draft position: SpecForge's ``TargetDistribution``.

    Attributes:
        logits: target logits on the draft vocabulary, [..., V_d].
        log_normalizer: log-sum-exp of the logits over the full vocabulary, [...].
        log_coverage: log of the target's mass on the draft vocabulary, [...].
        labels: recorded token that the target is to predict there, as an index into the draft
            vocabulary, -1 where it is outside, [...]; None where it is not known.
    """

    @property
    def logits(self) -> torch.Tensor: ...

    @property
    def log_normalizer(self) -> torch.Tensor: ...

    @property
    def log_coverage(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor | None: ...


@runtime_checkable
class DraftLoss(Protocol):
    """A loss of one draft position, built from its options by SpecForge's loss registry.

    A loss for another serving rule than temperature 1 also has ``shape_target``, which makes the
    logits of the target under that rule from its own, [..., V], on the full vocabulary. One that
    takes the target to the draft vocabulary itself has ``restrict_target``.
    """

    def terms(self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Terms:
        """Return per-position terms, each [...], of draft logits [..., V_d] and mask [...].

        No position's terms depend on another's. With ``training.loss_fused_head`` the logits of a
        few positions at a time are all that there ever is: SpecForge calls this for each chunk,
        and again in the backward pass. ``_draft_argmax``, the index of the largest logit, saves the
        trainer a pass over them; other names that begin with "_" are the loss's own.
        """
        ...

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        """Return the per-position "loss" and further metrics, each [...].

        ``mean`` averages a per-position vector over the supervised positions, detached: one mean
        for each draft position.
        """
        ...


@runtime_checkable
class ChainLoss(Protocol):
    """A loss that sees all draft positions of a chain before any is averaged.

    Vectors are aligned by chain start: position t of every draft position belongs to the chain that
    starts at t. Masks nest: where a draft position is supervised, all before it are.
    """

    def terms(self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Terms:
        """Return per-position terms of one draft position, as `DraftLoss.terms` does."""
        ...

    def combine_chain(
        self, heads: Sequence[Mapping[str, torch.Tensor]], means: Sequence[Mean]
    ) -> Sequence[Terms]:
        """Return, for every draft position in order, what `DraftLoss.combine` returns.

        Every draft position's "loss" is averaged over its own supervised positions. The trainer's
        own weights of draft positions are off: these means are added up, or averaged by drafts that
        propose a block.

        Args:
            heads: the terms of every draft position, in order, each vector [...]. Outside its mask
                a vector may hold anything.
            means: ``mean`` of `DraftLoss.combine` for every draft position.
        """
        ...


Loss = DraftLoss | ChainLoss
