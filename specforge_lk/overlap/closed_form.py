"""The overlap terms with closed-form gradients: any device, no compiler.

Rows are taken in chunks that stay in cache, so main memory sees z and y once forward, and z, y
and the gradient once backward. Between the two only row vectors and the inputs are kept.
"""

from typing import Any

import torch

from specforge_lk.overlap.contract import LOGIT_FLOOR
from specforge_lk.overlap.rows import row_chunks


def closed_form(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor,
    live: torch.Tensor,
    reverse_kl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `overlap_terms`."""
    return _ClosedForm.apply(
        draft_logits, target_logits, log_normalizer, log_coverage, live, reverse_kl
    )


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        log_normalizer: torch.Tensor,
        log_coverage: torch.Tensor,
        live: torch.Tensor,
        reverse_kl: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        log_z, log_c = log_normalizer.flatten(), log_coverage.flatten()
        kl, alpha, log_alpha, reverse, log_sum_q, below = log_z.new_zeros(6, len(log_z))
        for rows, (z, y) in row_chunks(live, log_z.dtype, draft_logits, target_logits):
            z, y = _draft(z, log_z.dtype), _floored(y, log_z.dtype)
            log_sum_q[rows] = z.exp().sum(-1).log()
            log_p, log_q, log_ratio, w = _compare(z, y, log_z[rows], log_sum_q[rows])
            p_renormalized = torch.softmax(y, dim=-1)
            kl[rows] = p_renormalized.mul_(log_ratio).sum(-1) - log_c[rows]

            log_overlap = torch.minimum(log_p, log_q)
            top = log_overlap.amax(-1, keepdim=True)
            overlap = log_overlap.sub_(top).exp_()
            total = overlap.sum(-1)
            log_alpha[rows] = top.squeeze(-1) + total.log()
            alpha[rows] = log_alpha[rows].exp()
            # B / alpha: wherever w > 0 the overlap is q.
            below[rows] = overlap.mul_(w).sum(-1) / total
            if reverse_kl:
                reverse[rows] = -log_q.exp_().mul_(log_ratio).sum(-1)

        ctx.save_for_backward(draft_logits, target_logits, log_z, live)
        ctx.row_vectors = log_sum_q, alpha, log_alpha, below, reverse
        ctx.set_materialize_grads(False)
        shape = log_normalizer.shape
        terms = (kl, alpha, log_alpha) + ((reverse,) if reverse_kl else ())
        # Copies, as a caller may write to what it gets.
        copies = [term.clone().view(shape) for term in terms]
        return copies[0], copies[1], copies[2], copies[3] if reverse_kl else None

    @staticmethod
    def backward(
        ctx: Any,
        grad_kl: torch.Tensor | None,
        grad_alpha: torch.Tensor | None,
        grad_log_alpha: torch.Tensor | None,
        grad_reverse: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "closed_form can be differentiated once only (no create_graph=True): "
                "use overlap_terms(..., impl='reference') for second derivatives"
            )
        draft_logits, target_logits, log_z, live = ctx.saved_tensors
        log_sum_q, alpha, log_alpha, below, reverse = ctx.row_vectors
        grad_kl, grad_alpha, grad_log_alpha, grad_reverse = (
            g if g is None else g.flatten()
            for g in (grad_kl, grad_alpha, grad_log_alpha, grad_reverse)
        )
        # alpha = exp(log_alpha): one gradient, with respect to log_alpha, serves both.
        grad_overlap = grad_log_alpha
        if grad_alpha is not None:
            grad_overlap = grad_alpha * alpha + (0 if grad_overlap is None else grad_overlap)

        grad = torch.zeros(draft_logits.shape, dtype=draft_logits.dtype, device=live.device)
        flat = grad.view(-1, grad.shape[-1])
        for rows, (z, y) in row_chunks(live, log_z.dtype, draft_logits, target_logits):
            z, y = _draft(z, log_z.dtype), _floored(y, log_z.dtype)
            _, log_q, log_ratio, w = _compare(z, y, log_z[rows], log_sum_q[rows])
            q = log_q.exp()
            chunk = torch.zeros_like(q)
            if grad_kl is not None:
                g = grad_kl[rows, None]
                chunk.addcmul_(q, g).addcmul_(torch.softmax(y, dim=-1), g, value=-1)
            if grad_overlap is not None:
                g = grad_overlap[rows, None]
                # q / alpha in the log domain: both may underflow. It is at most 1 wherever w > 0.
                share = log_q.sub_(log_alpha[rows, None]).clamp_max_(0).exp_().mul_(w)
                chunk.addcmul_(share, g).addcmul_(q, g * below[rows, None], value=-1)
            if grad_reverse is not None:
                g = grad_reverse[rows, None]
                chunk.addcmul_(log_ratio.add_(reverse[rows, None]).mul_(q), g, value=-1)
            flat[rows] = chunk.to(flat.dtype)
        return grad, None, None, None, None, None


def _floored(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return logits.to(dtype).clamp_min(LOGIT_FLOOR)


def _draft(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Only differences of draft logits matter; with their maximum at 0 they lose no digits.
    logits = _floored(logits, dtype)
    return logits.sub_(logits.amax(-1, keepdim=True))


def _compare(
    z: torch.Tensor, y: torch.Tensor, log_z: torch.Tensor, log_sum_q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, log q, log(p / q) and w = 1[q < p] + 1/2 1[q = p], each [n, V].

    Forward and backward must agree bit by bit on w, so both compute it here.
    """
    log_p, log_q = y - log_z[:, None], z - log_sum_q[:, None]
    log_ratio = log_p - log_q
    return log_p, log_q, log_ratio, log_ratio.sign().add_(1).mul_(0.5)
