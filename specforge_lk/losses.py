"""The losses of the plug-in, per position, on one set of overlap terms.

A loss works in two steps. ``terms`` turns the logits of one draft position (a head, in SpecForge)
into vectors with one value per token position and can be called chunk by chunk; ``combine`` turns
the concatenated vectors into the loss per token position. The trainer's reducer averages the loss,
and for the metrics every vector whose name does not begin with "_", over the supervised positions.

Positions with coverage exactly 0 have no acceptance to gain: their loss is 0 and so is its
gradient; the metric ``no_coverage`` counts them. p~ is the target distribution renormalized on the
draft vocabulary, p is not; see `overlap_terms`. Sources: LK-losses paper, arXiv 2602.23881.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from specforge_lk.overlap import overlap_terms

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


class DraftLoss(Protocol):
    """What SpecForge's loss registry builds from a loss's options."""

    def terms(self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Terms:
        """Return per-position terms, each [...], of draft logits [..., V_d] and mask [...]."""
        ...

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        """Return the per-position "loss" and further metrics, each [...].

        ``mean`` averages a per-position vector over the supervised positions, detached: one mean
        for each draft position.
        """
        ...


# ---------------------------------------------------------------------------- options


def _not_bool(value: Any) -> Any:
    # pydantic would read true as 1.0; numeric strings are welcome, they come from command lines.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]


class NoOptions(BaseModel):
    """Options of a loss that has none."""

    # The docstring of an option is its description in `specforge-lk losses`.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class KLOptions(NoOptions):
    """Options of ``kl``."""

    kl_term: Literal["renormalized", "restricted"] = "renormalized"
    """The form: "renormalized" is KL(p~ || q), the paper's. "restricted" is
    sum_D p log(p / q) = c (KL(p~ || q) + log c), c the coverage, with gradient c (q - p~):
    positions that the draft vocabulary barely covers pull little."""


class LambdaOptions(KLOptions):
    """Options of ``lk_lambda``."""

    eta: Annotated[Number, Field(gt=0)] = 3.0
    """Rate, above 0, at which the weight of KL falls with the acceptance rate; the defaults are
    the paper's."""
    lambda_scope: Literal["head", "token", "fixed"] = "head"
    """What acceptance rate sets lambda: "head", the mean over the supervised positions of a draft
    position (the paper's); "token", each position's own; "fixed", none."""
    lambda_fixed: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Lambda of scope "fixed", from 0 to 1; 0.5 unless given."""

    @model_validator(mode="after")
    def _fixed_needs_scope(self) -> Self:
        if self.lambda_fixed is not None and self.lambda_scope != "fixed":
            raise ValueError(
                f"lambda_fixed={self.lambda_fixed} has no effect with lambda_scope="
                f"{self.lambda_scope!r}: set lambda_scope='fixed' or leave lambda_fixed out"
            )
        return self


# ----------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class _OverlapLoss:
    """Common part of the losses: the overlap terms under the names they have as metrics."""

    options: NoOptions
    _reverse_kl: ClassVar[bool] = False

    def terms(self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Terms:
        """Return the overlap terms, each [...]."""
        overlap = overlap_terms(
            draft_logits,
            target.logits,
            target.log_normalizer,
            mask=mask,
            log_coverage=target.log_coverage,
            tokens=target.labels,
            reverse_kl=self._reverse_kl,
        )
        coverage = overlap.log_coverage.exp()
        terms = {
            "kl": overlap.kl,
            "alpha": overlap.alpha,
            "_log_alpha": overlap.log_alpha,
            "coverage": coverage,
            "no_coverage": (overlap.log_coverage == -torch.inf).to(coverage.dtype),
        }
        if overlap.reverse_kl is not None:
            terms["reverse_kl"] = overlap.reverse_kl
        if target.labels is not None and overlap.log_q is not None and overlap.log_p is not None:
            # The chance that a chain gets past the recorded token x, min(1, q(x) / p(x)), and 0
            # where the draft vocabulary lacks x, without coverage too.
            past = (overlap.log_q - overlap.log_p).clamp_max(0).exp()
            terms["past"] = torch.where(target.labels < 0, 0.0, past)
        return terms


@dataclass(frozen=True)
class KL(_OverlapLoss):
    """KL divergence KL(p~ || q), p~ the target renormalized on the draft vocabulary."""

    options: KLOptions

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": _KL_TERMS[self.options.kl_term](terms)}


class TV(_OverlapLoss):
    """Total variation, 1 - alpha; target mass outside the draft vocabulary counts."""

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": _total_variation(terms)}


class LKAlpha(_OverlapLoss):
    """Negative log acceptance rate, -log alpha.

    With a point-mass target this is the negative log-likelihood.
    """

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": -terms["_log_alpha"]}


@dataclass(frozen=True)
class LKLambda(_OverlapLoss):
    """Blend of KL and TV, lambda KL + (1 - lambda) (1 - alpha), lambda = exp(-eta sg[alpha])."""

    options: LambdaOptions

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        weight = _LAMBDAS[self.options.lambda_scope](self.options, terms["alpha"].detach(), mean)
        kl = _KL_TERMS[self.options.kl_term](terms)
        loss = weight * kl + (1 - weight) * _total_variation(terms)
        return {"loss": loss, "lambda": weight}


class ReverseKL(_OverlapLoss):
    """Reverse KL divergence KL(q || p) on the draft vocabulary, p not renormalized."""

    _reverse_kl = True

    def combine(self, terms: Terms, mean: Mean) -> Terms:
        return {"loss": terms["reverse_kl"]}


def _total_variation(terms: Terms) -> torch.Tensor:
    return 1 - terms["alpha"] - terms["no_coverage"]


def _restricted_kl(terms: Terms) -> torch.Tensor:
    coverage = terms["coverage"]
    # xlogy(c, c) = c log c, and 0 at c = 0.
    return coverage * terms["kl"] + torch.xlogy(coverage, coverage)


_KL_TERMS: Final[Mapping[str, Callable[[Terms], torch.Tensor]]] = MappingProxyType(
    {"renormalized": lambda terms: terms["kl"], "restricted": _restricted_kl}
)


def _head_lambda(options: LambdaOptions, alpha: torch.Tensor, mean: Mean) -> torch.Tensor:
    # An unsupervised draft position has mean NaN; use 0 so that the loss stays finite.
    mean_alpha = mean(alpha).nan_to_num(nan=0.0)
    return torch.exp(-options.eta * mean_alpha).to(alpha.dtype).expand_as(alpha)


def _token_lambda(options: LambdaOptions, alpha: torch.Tensor, mean: Mean) -> torch.Tensor:
    return torch.exp(-options.eta * alpha)


def _fixed_lambda(options: LambdaOptions, alpha: torch.Tensor, mean: Mean) -> torch.Tensor:
    return torch.full_like(alpha, 0.5 if options.lambda_fixed is None else options.lambda_fixed)


_LAMBDAS: Final[Mapping[str, Callable[[LambdaOptions, torch.Tensor, Mean], torch.Tensor]]] = (
    MappingProxyType({"head": _head_lambda, "token": _token_lambda, "fixed": _fixed_lambda})
)


# -------------------------------------------------------------------------- registration


@dataclass(frozen=True)
class LossRecord:
    """A loss as SpecForge's ``LossRegistration`` has it, without importing SpecForge.

    Attributes:
        name: what ``training.loss`` names.
        options: model of ``training.loss_options``, with a description of every option.
        build: makes the loss from its options; the first line of its docstring says what it is.
        algorithm_defaults: defaults that differ, by algorithm and option.
    """

    name: str
    options: type[BaseModel]
    build: Callable[[Any], DraftLoss]
    algorithm_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


LOSSES: Final = (
    LossRecord("kl", KLOptions, KL),
    LossRecord("tv", NoOptions, TV),
    LossRecord("lk_alpha", NoOptions, LKAlpha),
    LossRecord("lk_lambda", LambdaOptions, LKLambda, {"medusa": {"eta": 10.0}}),
    LossRecord("reverse_kl", NoOptions, ReverseKL),
)
