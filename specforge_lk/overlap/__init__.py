"""The overlap operation: acceptance rate and divergences of a draft from its target, per position.

``overlap_terms`` is the one contract; its implementations live side by side:

- ``reference``: the definition in plain torch, differentiated by autograd. Every other
  implementation is tested against it in float64.
- ``closed_form``: closed-form gradients in torch operations, rows in cache-sized chunks; runs on
  every device.
- ``cpu``: the same fused, in C++, compiled on first use (two seconds, once per machine).

``auto`` is ``cpu`` on CPUs with a C++ compiler, ``closed_form`` elsewhere. Inductor would fuse as
well, needs the same compiler and ten times as long for it, and reads each row more often.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import torch

from specforge_lk.overlap import closed_form, fused_cpu
from specforge_lk.overlap.contract import Implementation, OverlapTerms
from specforge_lk.overlap.differentiable import differentiable
from specforge_lk.overlap.reference import reference
from specforge_lk.overlap.rows import log_coverage_of

__all__ = ["IMPLEMENTATIONS", "OverlapTerms", "overlap_terms"]


def _definition(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor | None,
    live: torch.Tensor,
    reverse_kl: bool,
) -> OverlapTerms:
    if log_coverage is None:
        log_coverage = log_coverage_of(target_logits, log_normalizer, live)
        live = live & (log_coverage != -torch.inf)
    kl, alpha, log_alpha, reverse = reference(
        draft_logits, target_logits, log_normalizer, log_coverage, live, reverse_kl
    )
    return OverlapTerms(kl, alpha, log_alpha, log_coverage, reverse)


IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {
        "reference": _definition,
        "closed_form": partial(differentiable, closed_form),
        "cpu": partial(differentiable, fused_cpu),
    }
)


def overlap_terms(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    log_coverage: torch.Tensor | None = None,
    impl: str = "auto",
    reverse_kl: bool = False,
) -> OverlapTerms:
    """Compare the draft distribution with the target's, position by position.

    With z the draft logits, y the target logits on the draft vocabulary D and log Z the target's
    log-normaliser over its FULL vocabulary:

    - q = softmax(z), the draft;
    - p = exp(y - log Z), the target on D, never renormalised: its sum c is the coverage;
    - p~ = softmax(y) = p / c, the target renormalised on D.

    ``kl`` is KL(p~ || q), ``alpha`` the acceptance rate sum_D min(p, q), ``log_alpha`` its
    logarithm, computed as log sum_D exp(min(log p, log q)) so that it stays finite where
    ``alpha`` underflows, and ``reverse_kl`` is KL(q || p). Gradients flow to ``draft_logits``
    only (LK-losses paper, arXiv 2602.23881, appendix A); with w = 1[q < p] + 1/2 1[q = p] and
    B = sum_D q w they are

        kl: q - p~      alpha: q (w - B)      log_alpha: q (w - B) / alpha

    A position whose ``weight`` is 0 is skipped: its terms and gradients are 0, whatever its
    logits hold, nan included. So are the terms of a position with coverage exactly 0 (log Z =
    +inf, as in padding, or every target logit -inf), except that its ``log_coverage`` is -inf:
    such a position has no acceptance to gain.

    Logits of -inf (masked tokens) are legal; they count as -1e30, which gives p = 0 or q = 0
    and keeps every term and gradient free of nan. Other non-finite logits are not looked for,
    for that would stall a GPU: they give non-finite terms.

    Args:
        draft_logits: z, [..., V_d], any floating dtype. Computation is in float32, or in float64
            where a logits tensor is float64; the gradient has the dtype of z.
        target_logits: y, [..., V_d].
        log_normalizer: log Z in nats, [...].
        weight: [...], bool or number. Only whether it is 0 matters: nothing is multiplied by it.
        log_coverage: log c, [...]; computed from y and log Z where not given. A caller that
            compares several drafts with one target computes it once.
        impl: an implementation's name, or "auto" for the fastest that can run.
        reverse_kl: also compute ``reverse_kl``.

    Returns:
        ``OverlapTerms``, all [...] in the dtype of the computation. Only "reference" can be
            differentiated twice.

    Raises:
        ValueError: unknown ``impl``, or shapes that do not fit together.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl {impl!r} is unknown; choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    _check_shapes(draft_logits, target_logits, log_normalizer, weight, log_coverage)
    dtype = torch.promote_types(
        torch.promote_types(draft_logits.dtype, target_logits.dtype), torch.float32
    )
    target_logits = target_logits.detach()
    log_normalizer = log_normalizer.detach().to(dtype)
    live = torch.ones_like(log_normalizer, dtype=torch.bool) if weight is None else weight != 0
    if log_coverage is not None:
        log_coverage = torch.where(live, log_coverage.detach().to(dtype), 0.0)
        live = live & (log_coverage != -torch.inf)
    implementation = _fastest(draft_logits.device) if impl == "auto" else impl
    return IMPLEMENTATIONS[implementation](
        draft_logits, target_logits, log_normalizer, log_coverage, live, reverse_kl
    )


def _fastest(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" and fused_cpu.available() else "closed_form"


def _check_shapes(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    weight: torch.Tensor | None,
    log_coverage: torch.Tensor | None,
) -> None:
    if draft_logits.dim() == 0 or target_logits.shape != draft_logits.shape:
        raise ValueError(
            f"target_logits {list(target_logits.shape)} and draft_logits "
            f"{list(draft_logits.shape)} must have the same shape [..., V_d]: take the target's "
            "logits at the draft vocabulary"
        )
    rows = {"log_normalizer": log_normalizer, "weight": weight, "log_coverage": log_coverage}
    for name, value in rows.items():
        if value is not None and value.shape != draft_logits.shape[:-1]:
            raise ValueError(
                f"{name} {list(value.shape)} must have one value per position, "
                f"{list(draft_logits.shape[:-1])}, for logits {list(draft_logits.shape)}"
            )
