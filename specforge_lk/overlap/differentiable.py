"""Two passes over the logits made differentiable: what all closed-form implementations share."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from specforge_lk.overlap.contract import (
    LOGIT_FLOOR,
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
        ctx.settings, ctx.statistics, ctx.kernels = rows.settings, statistics, kernels
        of_tokens = None
        if flat.tokens is not None:
            of_tokens = log_probabilities(draft_logits, target_logits, flat, statistics)
        terms = terms_of(statistics, rows, of_tokens)
        ctx.mark_non_differentiable(*without_gradient(terms))
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        draft_logits, target_logits, *vectors = ctx.saved_tensors
        rows = RowInputs._make((*vectors, *ctx.settings))
        of_terms = row_gradients(ctx.statistics, rows, gradients)
        grad = ctx.kernels.backward(
            draft_logits,
            target_logits,
            covered(rows, ctx.statistics),
            ctx.statistics,
            of_terms,
        )
        return grad, None, None, *[None] * len(RowInputs._fields)


def log_probabilities(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rows: RowInputs,
    statistics: RowStatistics,
) -> torch.Tensor:
    """Return log q and log p of the rows' tokens, [2, N], from one logit of each tensor.

    Args:
        draft_logits: [..., V_d] of any strides.
        target_logits: [..., V_d].
        rows: flat, with tokens.
        statistics: of these rows.
    """
    s, tokens = statistics, rows.tokens
    assert tokens is not None
    at = tokens.clamp_min(0).view(*draft_logits.shape[:-1], 1)
    z, y = (
        logits.gather(-1, at).flatten().to(s.kl.dtype).clamp_min(LOGIT_FLOOR)
        for logits in (draft_logits, target_logits)
    )
    log_q = torch.where(tokens < 0, LOGIT_FLOOR, (z - s.draft_shift) - s.draft_log_sum)
    log_p = torch.where(tokens < 0, 0.0, y - s.log_normalizer)
    return torch.where(covered(rows, s).mask, torch.stack([log_q, log_p]), 0.0)


def terms_of(
    statistics: RowStatistics, rows: RowInputs, of_tokens: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Return the fields of `OverlapTerms` in the shape of ``rows``, [...].

    They are copies, as a caller may write to what it gets.

    Args:
        statistics: of all rows.
        rows: vectors [...].
        of_tokens: what `log_probabilities` returns; None where there are no tokens.
    """
    shape = rows.mask.shape
    log_coverage = rows.log_coverage
    if log_coverage is None:
        log_coverage = statistics.target_log_sum.view(shape)
        if rows.log_normalizer is None:
            # Of a full vocabulary it is what rounding left: 0, if there is a target at all.
            log_coverage = torch.where(log_coverage == -torch.inf, log_coverage, log_coverage * 0)
    return (
        statistics.kl.view(shape).clone(),
        statistics.alpha.view(shape).clone(),
        statistics.log_alpha.view(shape).clone(),
        log_coverage.clone(),
        statistics.draft_argmax.view(shape).clone(),
        statistics.reverse_kl.view(shape).clone() if rows.reverse_kl else None,
        *((None, None) if of_tokens is None else (log.reshape(shape).clone() for log in of_tokens)),
    )


def without_gradient(terms: tuple[torch.Tensor | None, ...]) -> Iterator[torch.Tensor]:
    """Yield those of `terms_of`'s that have none."""
    _, _, _, log_coverage, draft_argmax, _, _, log_p = terms
    return (term for term in (log_coverage, draft_argmax, log_p) if term is not None)


def covered(rows: RowInputs, statistics: RowStatistics) -> RowInputs:
    """Return flat ``rows`` with a mask that leaves out rows without coverage: no gradient there."""
    return rows._replace(mask=rows.mask & (statistics.target_log_sum != -torch.inf))


def row_gradients(
    statistics: RowStatistics, rows: RowInputs, gradients: Sequence[torch.Tensor | None]
) -> RowGradients:
    """Return gradients with respect to the fields of `OverlapTerms` as the kernels take them.

    ``rows`` are flat.
    """
    kl, alpha, log_alpha, _, _, reverse_kl, log_q, _ = (
        None if g is None else g.to(statistics.kl.dtype).reshape(-1).contiguous() for g in gradients
    )
    if alpha is not None:
        # alpha = exp(log_alpha): one gradient, with respect to log_alpha, serves both.
        alpha = alpha * statistics.alpha
        log_alpha = alpha if log_alpha is None else log_alpha + alpha
    if log_q is not None and rows.tokens is not None:
        log_q = torch.where(rows.tokens < 0, 0.0, log_q)
    return RowGradients(kl, log_alpha, reverse_kl, log_q)


def refuse_second_derivative() -> None:
    """Raise where autograd would differentiate a closed-form gradient once more."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "this implementation can be differentiated once only (no create_graph=True): "
            "use overlap_terms(..., impl='reference') for second derivatives"
        )
