"""Two passes over the logits made differentiable: what all closed-form implementations share."""

from collections.abc import Sequence
from typing import Any

import torch

from specforge_lk.overlap.contract import (
    Kernels,
    OverlapTerms,
    RowGradients,
    RowInputs,
    RowStatistics,
)


def differentiable(
    kernels: Kernels, draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> OverlapTerms:
    """Return the terms, each [...], differentiable once with respect to ``draft_logits``.

    Between the passes only vectors of one value per row and the inputs are kept.

    Args:
        kernels: the two passes.
        draft_logits: [..., V_d], any floating dtype.
        target_logits: [..., V_d], any floating dtype.
        rows: vectors [...].
    """
    return OverlapTerms(*_Overlap.apply(draft_logits, target_logits, kernels, *rows))


class _Overlap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        kernels: Kernels,
        *fields: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        rows = RowInputs(*fields)
        flat = rows.flat()
        statistics = kernels.forward(draft_logits, target_logits, flat)
        ctx.save_for_backward(draft_logits, target_logits, *flat.vectors)
        ctx.reverse_kl, ctx.statistics, ctx.kernels = rows.reverse_kl, statistics, kernels
        terms = terms_of(statistics, rows)
        ctx.mark_non_differentiable(terms[3])
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        draft_logits, target_logits, *vectors = ctx.saved_tensors
        rows = RowInputs._make((*vectors, ctx.reverse_kl))
        grad = ctx.kernels.backward(
            draft_logits,
            target_logits,
            covered(rows, ctx.statistics),
            ctx.statistics,
            row_gradients(ctx.statistics, gradients),
        )
        return grad, None, None, *[None] * len(RowInputs._fields)


def terms_of(
    statistics: RowStatistics, rows: RowInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the fields of `OverlapTerms` in the shape of ``rows``, [...].

    They are copies, as a caller may write to what it gets.
    """
    shape = rows.log_normalizer.shape
    log_coverage = rows.log_coverage
    if log_coverage is None:
        log_coverage = statistics.target_log_sum.view(shape)
    return (
        statistics.kl.view(shape).clone(),
        statistics.alpha.view(shape).clone(),
        statistics.log_alpha.view(shape).clone(),
        log_coverage.clone(),
        statistics.reverse_kl.view(shape).clone() if rows.reverse_kl else None,
    )


def covered(rows: RowInputs, statistics: RowStatistics) -> RowInputs:
    """Return flat ``rows`` with a mask that leaves out rows without coverage: no gradient there."""
    return rows._replace(mask=rows.mask & (statistics.target_log_sum != -torch.inf))


def row_gradients(
    statistics: RowStatistics, gradients: Sequence[torch.Tensor | None]
) -> RowGradients:
    """Return gradients with respect to the fields of `OverlapTerms` as the kernels take them."""
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
