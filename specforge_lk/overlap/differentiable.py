"""Two passes over the logits made differentiable: what all closed-form implementations share."""

from collections.abc import Sequence
from typing import Any

import torch

from specforge_lk.overlap.contract import Kernels, OverlapTerms, RowGradients, RowStatistics


def differentiable(
    kernels: Kernels,
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor | None,
    live: torch.Tensor,
    reverse_kl: bool,
) -> OverlapTerms:
    """The terms, each [...], differentiable once with respect to ``draft_logits``.

    Between the passes only row vectors and the inputs are kept.

    Args:
        kernels: the two passes.
        draft_logits: [..., V_d], any floating dtype.
        target_logits: [..., V_d], any floating dtype.
        log_normalizer: [...], in the dtype to compute in.
        log_coverage: [...], same dtype, or None to have it computed.
        live: [...] bool. Elsewhere terms and gradients are 0 and no logits are read.
        reverse_kl: whether to compute it.
    """
    return OverlapTerms(
        *_Overlap.apply(
            draft_logits, target_logits, log_normalizer, log_coverage, live, reverse_kl, kernels
        )
    )


class _Overlap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        log_normalizer: torch.Tensor,
        log_coverage: torch.Tensor | None,
        live: torch.Tensor,
        reverse_kl: bool,
        kernels: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        log_z = log_normalizer.reshape(-1).contiguous()
        statistics = kernels.forward(
            draft_logits,
            target_logits,
            log_z,
            None if log_coverage is None else log_coverage.reshape(-1).contiguous(),
            live.reshape(-1).contiguous(),
            reverse_kl,
        )
        ctx.save_for_backward(draft_logits, target_logits, log_z, live)
        ctx.statistics, ctx.kernels = statistics, kernels
        terms = terms_of(statistics, log_coverage, log_normalizer.shape, reverse_kl)
        ctx.mark_non_differentiable(terms[3])
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        draft_logits, target_logits, log_z, live = ctx.saved_tensors
        grad = ctx.kernels.backward(
            draft_logits,
            target_logits,
            log_z,
            has_gradient(live, ctx.statistics),
            ctx.statistics,
            row_gradients(ctx.statistics, gradients),
        )
        return grad, None, None, None, None, None, None


def terms_of(
    statistics: RowStatistics,
    log_coverage: torch.Tensor | None,
    shape: torch.Size,
    reverse_kl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The fields of `OverlapTerms`, [...]: copies, as a caller may write to what it gets."""
    if log_coverage is None:
        log_coverage = statistics.target_log_sum.view(shape)
    return (
        statistics.kl.view(shape).clone(),
        statistics.alpha.view(shape).clone(),
        statistics.log_alpha.view(shape).clone(),
        log_coverage.clone(),
        statistics.reverse_kl.view(shape).clone() if reverse_kl else None,
    )


def has_gradient(live: torch.Tensor, statistics: RowStatistics) -> torch.Tensor:
    """The live rows [N] that have coverage."""
    return live.reshape(-1) & (statistics.target_log_sum != -torch.inf)


def row_gradients(
    statistics: RowStatistics, gradients: Sequence[torch.Tensor | None]
) -> RowGradients:
    """Gradients with respect to the fields of `OverlapTerms`, as the kernels take them."""
    kl, alpha, log_alpha, _, reverse_kl = (
        None if g is None else g.to(statistics.kl.dtype).reshape(-1).contiguous() for g in gradients
    )
    if alpha is not None:
        # alpha = exp(log_alpha): one gradient, with respect to log_alpha, serves both.
        alpha = alpha * statistics.alpha
        log_alpha = alpha if log_alpha is None else log_alpha + alpha
    return RowGradients(kl, log_alpha, reverse_kl)


def refuse_second_derivative() -> None:
    """Raise where autograd would differentiate a closed-form gradient once more."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "this implementation can be differentiated once only (no create_graph=True): "
            "use overlap_terms(..., impl='reference') for second derivatives"
        )
