"""What every loss is made of: the overlap terms of a draft position, and KL blended with overlap.

p and q are those of a serving rule, see `specforge_lk.losses.rule`. A greedy draft is trained with
its logits perturbed: ``_alpha`` and ``_past`` are of that, ``alpha`` and ``past`` of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final

import torch

from specforge_lk.losses.contract import Mean, Target, Terms
from specforge_lk.losses.greedy import likeliest, perturbed
from specforge_lk.losses.options import LambdaSettings, ServingOptions
from specforge_lk.losses.rule import ServingRule
from specforge_lk.overlap import OverlapTerms, TargetTerms, overlap_terms, target_terms
from specforge_lk.overlap.contract import LOGIT_FLOOR


@dataclass(frozen=True)
class OverlapLoss:
    """Common part of the losses: the overlap terms under the names they have as metrics.

    SpecForge looks for two more methods: ``restrict_target``, and ``shape_target``, which a loss
    for another serving rule than temperature 1 has: logits [..., V] of the target's full
    vocabulary -> those under the rule.
    """

    options: ServingOptions
    rule: ServingRule = field(init=False, repr=False, compare=False)
    _reverse_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rule = ServingRule.of(self.options)
        object.__setattr__(self, "rule", rule)
        if self.options.serving != type(self.options).model_fields["serving"].default:
            object.__setattr__(self, "shape_target", rule.shape_target)

    def terms(self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Terms:
        """Return the overlap terms, each [...].

        Raises:
            ValueError: the loss needs the recorded tokens, and the target comes without.
        """
        tempered = self.rule.tempered(draft_logits)
        drafting = self.rule.drafting(draft_logits, tempered)
        overlap = self._overlap(drafting, target, mask)
        # KL to a truncated draft is infinite: it is taken to the draft before.
        kl = overlap.kl if drafting is tempered else self._overlap(tempered, target, mask).kl
        coverage = overlap.log_coverage.exp()
        terms = {
            "kl": kl,
            "alpha": overlap.alpha,
            "_log_alpha": overlap.log_alpha,
            # The trainer's accuracy then takes no pass over the logits.
            "_draft_argmax": overlap.draft_argmax,
            "coverage": coverage,
            "no_coverage": (overlap.log_coverage == -torch.inf).to(coverage.dtype),
        }
        if overlap.reverse_kl is not None:
            terms["reverse_kl"] = overlap.reverse_kl
        if target.labels is not None and overlap.log_q is not None and overlap.log_p is not None:
            # The chance that a chain gets past the recorded token x, min(1, q(x) / p(x)), and 0
            # where the draft vocabulary lacks x, without coverage too.
            past = (overlap.log_q - overlap.log_p).clamp_max(0).exp()
            # What the draft cuts off it never proposes, whether the target keeps it or not.
            never = (target.labels < 0) | (overlap.log_q < LOGIT_FLOOR / 2)
            terms["past"] = torch.where(never, 0.0, past)
        elif self._needs_tokens():
            raise ValueError(
                f"{type(self).__name__} with {self.options!r} needs the recorded tokens, and this "
                "trainer gives none: TargetDistribution.with_labels has to be called"
            )
        if self.rule.sharpness is not None:
            smooth = perturbed(draft_logits, target, mask, self.rule.sharpness)
            rule = likeliest(draft_logits, target, mask)
            terms |= {"_alpha": smooth.alpha, "_log_alpha": smooth.log_alpha, "alpha": rule.alpha}
            if smooth.past is not None and rule.past is not None:
                terms |= {"_past": smooth.past, "past": rule.past}
        return terms | self._chain_terms(draft_logits, target, mask, overlap)

    def restrict_target(self, logits: torch.Tensor, kept: torch.Tensor | None) -> TargetTerms:
        """Return the target on the draft vocabulary: one pass on a GPU, its logits never widened.

        Args:
            logits: of the full vocabulary, [n, V].
            kept: tokens of the draft vocabulary, [V_d]; None for all.
        """
        return target_terms(logits, kept)

    def _overlap(self, z: torch.Tensor, target: Target, mask: torch.Tensor) -> OverlapTerms:
        return overlap_terms(
            z,
            target.logits,
            target.log_normalizer,
            mask=mask,
            log_coverage=target.log_coverage,
            tokens=target.labels,
            reverse_kl=self._reverse_kl,
        )

    def _needs_tokens(self) -> bool:
        """Return whether recorded tokens are needed, not only reported."""
        return False

    def _chain_terms(
        self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor, overlap: OverlapTerms
    ) -> Terms:
        """Return what a loss that sees the chain needs beside."""
        return {}


def trained(terms: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return ``alpha`` or ``past`` as the loss takes it: with a gradient also of a greedy draft."""
    return terms.get(f"_{name}", terms[name])


def supervised_only(terms: Mapping[str, torch.Tensor]) -> Terms:
    """Return the vectors with 0 where ``_supervised`` is not 1: there they may hold anything.

    What comes later in a chain is supervised at fewer positions. Without this a nan there would
    reach the gradient of those before it.
    """
    supervised = terms["_supervised"] == 1
    return {name: torch.where(supervised, vector, 0.0) for name, vector in terms.items()}


def total_variation(
    terms: Mapping[str, torch.Tensor], reached: torch.Tensor | None = None
) -> torch.Tensor:
    """Return 1 - alpha, or 1 - reached alpha, [...]; 0 without coverage."""
    alpha = trained(terms, "alpha")
    return 1 - (alpha if reached is None else reached * alpha) - terms["no_coverage"]


def _restricted_kl(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    coverage = terms["coverage"]
    # xlogy(c, c) = c log c, and 0 at c = 0.
    return coverage * terms["kl"] + torch.xlogy(coverage, coverage)


#: The forms of KL, by ``kl_term``.
KL_TERMS: Final[Mapping[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]] = (
    MappingProxyType({"renormalized": lambda terms: terms["kl"], "restricted": _restricted_kl})
)


class Scheduled:
    """A loss that SpecForge tells where in training it is; see its ``ScheduledLoss``."""

    _progress: float | None = None

    def begin_step(self, progress: float | None) -> None:
        """Remember the share of the run's optimizer steps that are done, None if there is no end.

        It is the run's own, which a resumed run continues: there is nothing to restore.
        """
        object.__setattr__(self, "_progress", progress)


def blend(
    options: LambdaSettings,
    terms: Mapping[str, torch.Tensor],
    mean: Mean,
    variation: torch.Tensor,
    progress: float | None,
) -> Terms:
    """Return lambda KL + (1 - lambda) variation as "loss", and lambda, both [...].

    Lambda is of ``alpha`` as it is reported.

    Raises:
        ValueError: lambda follows a schedule, and the run has no known end.
    """
    weight = _LAMBDAS[options.lambda_scope](options, terms["alpha"].detach(), mean, progress)
    kl = KL_TERMS[options.kl_term](terms)
    return {"loss": weight * kl + (1 - weight) * variation, "lambda": weight}


_Lambda = Callable[[LambdaSettings, torch.Tensor, Mean, float | None], torch.Tensor]


def _head_lambda(
    options: LambdaSettings, alpha: torch.Tensor, mean: Mean, progress: float | None
) -> torch.Tensor:
    # An unsupervised draft position has mean NaN; use 0 so that the loss stays finite.
    mean_alpha = mean(alpha).nan_to_num(nan=0.0)
    return torch.exp(-options.eta * mean_alpha).to(alpha.dtype).expand_as(alpha)


def _token_lambda(
    options: LambdaSettings, alpha: torch.Tensor, mean: Mean, progress: float | None
) -> torch.Tensor:
    return torch.exp(-options.eta * alpha)


def _fixed_lambda(
    options: LambdaSettings, alpha: torch.Tensor, mean: Mean, progress: float | None
) -> torch.Tensor:
    return torch.full_like(alpha, 0.5 if options.lambda_fixed is None else options.lambda_fixed)


def _scheduled_lambda(
    options: LambdaSettings, alpha: torch.Tensor, mean: Mean, progress: float | None
) -> torch.Tensor:
    if progress is None:
        raise ValueError(
            "training.loss_options.lambda_scope='schedule' follows the share of the run that is "
            "done, and this run has no known end: set training.max_steps or training.total_steps"
        )
    until = 0.5 if options.lambda_until is None else options.lambda_until
    return torch.full_like(alpha, max(0.0, 1 - progress / until))


_LAMBDAS: Final[Mapping[str, _Lambda]] = MappingProxyType(
    {
        "head": _head_lambda,
        "token": _token_lambda,
        "fixed": _fixed_lambda,
        "schedule": _scheduled_lambda,
    }
)
