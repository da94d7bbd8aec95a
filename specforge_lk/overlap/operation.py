"""The contract of the overlap operation, and the choice among its implementations."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F

from specforge_lk.overlap import closed_form, fused_cpu
from specforge_lk.overlap.contract import Kernels, OverlapTerms, RowInputs
from specforge_lk.overlap.differentiable import differentiable
from specforge_lk.overlap.linear import Projection, linear_terms
from specforge_lk.overlap.reference import reference


def _triton() -> Kernels:
    from specforge_lk.overlap import triton_kernels

    return triton_kernels


_KERNELS: Final[Mapping[str, Callable[[], Kernels]]] = MappingProxyType(
    {"closed_form": lambda: closed_form, "cpu": lambda: fused_cpu, "triton": _triton}
)

#: Names that ``impl`` may have besides "auto".
IMPLEMENTATIONS: Final = ("reference", *_KERNELS)


def overlap_terms(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor | None,
    *,
    mask: torch.Tensor | None = None,
    log_coverage: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    impl: str = "auto",
    reverse_kl: bool = False,
) -> OverlapTerms:
    """Compare the draft distribution with the target's, position by position.

    With z the draft logits, y the target logits on the draft vocabulary D and log Z the target's
    log normalizer over its FULL vocabulary:

    - q = softmax(z), the draft distribution;
    - p = exp(y - log Z), the target distribution on D, never renormalized: its sum c is the
      coverage;
    - p~ = softmax(y) = p / c, the target distribution renormalized on D.

    ``kl`` is KL(p~ || q), ``alpha`` the acceptance rate sum_D min(p, q), ``log_alpha`` its
    logarithm, computed as log sum_D exp(min(log p, log q)) so that it stays finite where
    ``alpha`` underflows, and ``reverse_kl`` is KL(q || p). With a token x given at every position,
    ``log_q`` is log q(x) and ``log_p`` is log p(x). ``draft_argmax`` is the token that the draft
    would propose greedily, so that its accuracy takes no pass of its own. Gradients flow to
    ``draft_logits`` only (LK-losses paper, arXiv 2602.23881, appendix A); with
    w = 1[q < p] + 1/2 1[q = p] and B = sum_D q w they are

        kl: q - p~      alpha: q (w - B)      log_alpha: q (w - B) / alpha      log_q: 1[x] - q

    A token outside the draft vocabulary is never drafted: its ``log_q`` is that of a logit of -inf,
    -1e30, without gradient. What p has there is not known from y: its ``log_p`` is 0. So
    min(1, exp(log_q - log_p)), the chance that a chain gets past the token x that the target
    generated, is 0 there, as it must be. A mean of ``log_q`` should leave such positions out.

    A position whose ``mask`` is 0 is skipped: its terms and gradients are 0, whatever its
    logits hold, nan included. So are the terms of a position with coverage exactly 0 (log Z =
    +inf, as in padding, or every target logit -inf), except that its ``log_coverage`` is -inf:
    such a position has no acceptance to gain.

    Logits of -inf (excluded tokens) are legal; they count as -1e30, which gives p = 0 or q = 0
    and keeps every term and gradient free of nan. ("reference" gives such a logit no gradient
    of its own, as autograd does where it clamps; the others give it q - p~.) Other non-finite
    logits are not looked for, for that would stall a GPU: they give non-finite terms.

    Args:
        draft_logits: z, [..., V_d], any floating dtype. Computation is in float32, or in float64
            where a logits tensor is float64; the gradient has the dtype of z.
        target_logits: y, [..., V_d].
        log_normalizer: log Z in nats, [...]. None where the draft vocabulary is the target's full
            one: then log Z is that of y, computed in the same pass, and the coverage is 1.
        mask: which positions count, [...], bool or 0 and 1; all of them where not given.
        log_coverage: log c, [...]; computed from y and log Z where not given. "reference" and
            "closed_form" save that computation, the others have it in their pass over y.
        tokens: x as an index into the draft vocabulary, below V_d, [...] of an integer dtype;
            negative where it is outside. ``log_q`` and ``log_p`` are None without it.
        impl: an implementation's name, or "auto" for the fastest that can run.
        reverse_kl: also compute ``reverse_kl``.

    Returns:
        ``OverlapTerms``, all [...] in the dtype of the computation. Only "reference" can be
            differentiated twice.

    Raises:
        ValueError: unknown ``impl``, shapes that do not fit together, tokens that are not
            integers, or a log coverage without a log normalizer.
    """
    impl = _chosen(impl, draft_logits.device)
    _check_shapes(
        "draft_logits and target_logits",
        (draft_logits.shape, target_logits.shape),
        draft_logits.shape[:-1],
        log_normalizer=log_normalizer,
        mask=mask,
        log_coverage=log_coverage,
        tokens=tokens,
    )
    dtype = _computed_in(draft_logits.dtype, target_logits.dtype)
    rows = _rows(dtype, draft_logits, log_normalizer, log_coverage, mask, tokens, reverse_kl)
    target_logits = target_logits.detach()
    if impl == "reference":
        return reference(draft_logits, target_logits, rows)
    return differentiable(_KERNELS[impl](), draft_logits, target_logits, rows)


def linear_overlap(
    draft_hidden: torch.Tensor,
    draft_head: torch.Tensor,
    target: torch.Tensor | Projection,
    log_normalizer: torch.Tensor | None,
    *,
    mask: torch.Tensor | None = None,
    log_coverage: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    impl: str = "auto",
    reverse_kl: bool = False,
) -> OverlapTerms:
    """Compute `overlap_terms` of ``draft_hidden @ draft_head.T``, which is never held as a whole.

    Logits and their gradient exist for a chunk of positions at a time: beyond inputs and returned
    gradients it takes some 16 MiB per logits tensor (64 MiB on GPUs) and, where the LM head has
    less than float32, its gradient in float32. Positions outside the mask take part in no product.
    The backward pass computes the logits again: that is one more product with each LM head.

    Under autocast the products are in autocast's dtype, as `torch.nn.functional.linear` has it.

    Args:
        draft_hidden: [..., H].
        draft_head: weight of the draft's LM head, [V_d, H].
        target: target logits on the draft vocabulary, [..., V_d], or the ``Projection`` of hidden
            states [..., H_t] and the LM head's rows of the draft vocabulary, [V_d, H_t], that
            makes them chunk by chunk. No gradient flows to either.
        log_normalizer, mask, log_coverage, tokens, impl, reverse_kl: as for `overlap_terms`.
            "reference" holds all logits.

    Returns:
        ``OverlapTerms``, all [...], differentiable once with respect to ``draft_hidden`` and
            ``draft_head``.

    Raises:
        ValueError: as for `overlap_terms`.
    """
    impl = _chosen(impl, draft_hidden.device)
    draft = _autocast(Projection(draft_hidden, draft_head))
    if isinstance(target, Projection):
        target = _autocast(target)
        target_shape = (*target.hidden.shape[:-1], target.weight.shape[0])
        target_dtype = target.hidden.dtype
    else:
        target_shape, target_dtype = target.shape, target.dtype
    if draft_hidden.dim() < 2:
        raise ValueError(
            f"draft_hidden {list(draft_hidden.shape)} must have at least one dimension of "
            "positions, [..., H]: add one of size 1"
        )
    _check_shapes(
        "draft_hidden @ draft_head.T and target",
        ((*draft_hidden.shape[:-1], draft_head.shape[0]), target_shape),
        draft_hidden.shape[:-1],
        log_normalizer=log_normalizer,
        mask=mask,
        log_coverage=log_coverage,
        tokens=tokens,
    )
    dtype = _computed_in(draft.hidden.dtype, target_dtype)
    rows = _rows(dtype, draft_hidden, log_normalizer, log_coverage, mask, tokens, reverse_kl)
    if impl == "reference":
        target_logits = F.linear(*target) if isinstance(target, Projection) else target
        return reference(F.linear(*draft), target_logits.detach(), rows)
    return linear_terms(_KERNELS[impl](), draft, target, rows)


def _chosen(impl: str, device: torch.device) -> str:
    if impl == "auto":
        if device.type == "cuda" and find_spec("triton") is not None:
            return "triton"
        return "cpu" if device.type == "cpu" and fused_cpu.available() else "closed_form"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl {impl!r} is unknown; choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    return impl


def _check_shapes(
    names: str,
    logits: tuple[tuple[int, ...], tuple[int, ...]],
    positions: tuple[int, ...],
    **rows: torch.Tensor | None,
) -> None:
    if logits[0] and not logits[0][-1]:
        raise ValueError(
            f"{names} must have at least one token, but the draft vocabulary is empty, "
            f"{list(logits[0])}: check the draft's t2d"
        )
    if not logits[0] or logits[0] != tuple(logits[1]):
        raise ValueError(
            f"{names} must have the same shape [..., V_d], not {list(logits[0])} and "
            f"{list(logits[1])}: take the target's logits at the draft vocabulary"
        )
    for name, value in rows.items():
        if value is not None and value.shape != positions:
            raise ValueError(
                f"{name} {list(value.shape)} must have one value per position, "
                f"{list(positions)}, for logits {list(logits[0])}"
            )


def _computed_in(*logits: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in logits else torch.float32


def _rows(
    dtype: torch.dtype,
    logits: torch.Tensor,
    log_normalizer: torch.Tensor | None,
    log_coverage: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens: torch.Tensor | None,
    reverse_kl: bool,
) -> RowInputs:
    """Return what travels beside the logits, in ``dtype``; rows without coverage are masked."""
    if log_normalizer is not None:
        log_normalizer = log_normalizer.detach().to(dtype)
    elif log_coverage is not None:
        raise ValueError(
            "log_coverage without log_normalizer: a full vocabulary has coverage 1, leave it out"
        )
    if mask is None:
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    mask = mask != 0
    if log_coverage is not None:
        log_coverage = torch.where(mask, log_coverage.detach().to(dtype), 0.0)
        mask = mask & (log_coverage != -torch.inf)
    if tokens is not None:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(
                f"tokens must be integers, indices into the draft vocabulary, not {tokens.dtype}"
            )
        tokens = tokens.long()
    return RowInputs(log_normalizer, log_coverage, mask, tokens, dtype, reverse_kl)


def _autocast(projection: Projection) -> Projection:
    """Return the operands as autocast has them, which does not reach the recomputation."""
    device = projection.hidden.device.type
    if not torch.is_autocast_enabled(device):
        return projection
    return Projection(*(t.to(torch.get_autocast_dtype(device)) for t in projection))
