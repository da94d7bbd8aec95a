"""The closed form in torch operations: any device, any dtype, no compiler.

Rows are taken in chunks that stay in cache, so main memory sees z and y once forward, and z, y
and the gradient once backward.
"""

import torch

from specforge_lk.overlap.contract import LOGIT_FLOOR, RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.rows import Index, normalized, row_chunks


def forward(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> RowStatistics:
    """See `contract.Kernels`."""
    log_normalizer, log_coverage = normalized(target_logits, rows)
    s = RowStatistics.zeros(rows)
    s.log_normalizer.copy_(log_normalizer).masked_fill_(~rows.mask, 0)
    s.target_log_sum.copy_(log_coverage).masked_fill_(~rows.mask, 0)
    mask = rows.mask & (log_coverage != -torch.inf)
    for at, (z, y) in row_chunks(mask, rows.dtype, draft_logits, target_logits):
        z, y = _floored(z, rows.dtype), _floored(y, rows.dtype)
        top, argmax = z.max(-1, keepdim=True)
        s.draft_shift[at], s.draft_argmax[at] = top.squeeze(-1), argmax.squeeze(-1)
        s.draft_log_sum[at] = (z - top).exp_().sum(-1).log()
        log_q, log_ratio, w = _compare(z, y, s, at)
        # A coverage that the caller rounded, or took of other roundings of y, is refined here.
        p_renormalized = _renormalized(y, s, at)
        total = p_renormalized.sum(-1)
        s.target_log_sum[at] += total.log()
        s.kl[at] = p_renormalized.mul_(log_ratio).sum(-1) / total - s.target_log_sum[at]

        # min(log p, log q) is log q, or log p where the ratio is below 0.
        log_overlap = torch.add(log_q, log_ratio.clamp_max(0))
        top = log_overlap.amax(-1, keepdim=True)
        overlap = log_overlap.sub_(top).exp_()
        total = overlap.sum(-1)
        s.log_alpha[at] = top.squeeze(-1) + total.log()
        # Wherever w > 0 the overlap is q.
        s.below[at] = overlap.mul_(w).sum(-1) / total
        if rows.reverse_kl:
            s.reverse_kl[at] = -log_q.exp_().mul_(log_ratio).sum(-1)
    s.alpha.copy_(s.log_alpha.exp().masked_fill_(~mask, 0))
    return s


def backward(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rows: RowInputs,
    statistics: RowStatistics,
    gradients: RowGradients,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `contract.Kernels`."""
    s, mask = statistics, rows.mask
    if out is None:
        out = torch.empty(draft_logits.shape, dtype=draft_logits.dtype, device=mask.device)
    flat = out.view(-1, out.shape[-1])
    flat.index_fill_(0, (~mask).nonzero().squeeze(1), 0)
    for at, (z, y) in row_chunks(mask, rows.dtype, draft_logits, target_logits):
        z, y = _floored(z, rows.dtype), _floored(y, rows.dtype)
        log_q, log_ratio, w = _compare(z, y, s, at)
        q = log_q.exp()
        chunk = torch.zeros_like(q)
        if gradients.kl is not None:
            g = gradients.kl[at, None]
            p_renormalized = _renormalized(y, s, at)
            chunk.addcmul_(q, g).addcmul_(p_renormalized, g, value=-1)
        if gradients.log_alpha is not None:
            g = gradients.log_alpha[at, None]
            # q / alpha in the log domain: both may underflow. It is at most 1 wherever w > 0.
            share = log_q.sub_(s.log_alpha[at, None]).clamp_max_(0).exp_().mul_(w)
            chunk.addcmul_(share, g).addcmul_(q, g * s.below[at, None], value=-1)
        if gradients.reverse_kl is not None:
            g = gradients.reverse_kl[at, None]
            chunk.addcmul_(log_ratio.add_(s.reverse_kl[at, None]).mul_(q), g, value=-1)
        if gradients.log_q is not None and rows.tokens is not None:
            g = gradients.log_q[at, None]
            chunk.addcmul_(q, g, value=-1)
            chunk.scatter_add_(1, rows.tokens[at, None].clamp_min(0), g)
        flat[at] = chunk.to(flat.dtype)
    return out


def _floored(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return logits.to(dtype).clamp_min(LOGIT_FLOOR)


def _compare(
    z: torch.Tensor, y: torch.Tensor, s: RowStatistics, at: Index
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log q, log(p / q) and w = 1[q < p] + 1/2 1[q = p], [n, V]; see `contract.Kernels`."""
    top, log_sum = s.draft_shift[at, None], s.draft_log_sum[at, None]
    log_ratio = (y - z).sub_((s.log_normalizer[at, None] - top) - log_sum)
    w = log_ratio.sign().add_(1).mul_(0.5)
    return (z - top).sub_(log_sum), log_ratio, w


def _renormalized(y: torch.Tensor, s: RowStatistics, at: Index) -> torch.Tensor:
    """Return p~, [n, V], as exact as ``target_log_sum`` is."""
    return (y - s.log_normalizer[at, None]).sub_(s.target_log_sum[at, None]).exp_()
