"""The definition of the overlap terms in plain torch: slow, with many [..., V_d] tensors held."""

import torch

from specforge_lk.overlap.contract import LOGIT_FLOOR, OverlapTerms, RowInputs
from specforge_lk.overlap.rows import normalized


def reference(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> OverlapTerms:
    """Compute the terms of `overlap_terms`; gradients are autograd's."""
    log_normalizer, log_coverage = normalized(target_logits, rows)
    mask = rows.mask & (log_coverage != -torch.inf)

    # Inputs of skipped rows are replaced before, and their terms after, the computation:
    # multiplying by 0 would leave their nan in values and gradients.
    def cleaned(logits: torch.Tensor) -> torch.Tensor:
        logits = torch.where(mask[..., None], logits, 0.0).to(rows.dtype)
        return logits.clamp_min(LOGIT_FLOOR)

    def zero_where_skipped(term: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, term, 0)

    y = cleaned(target_logits)
    log_p = y - torch.where(mask, log_normalizer, 0.0)[..., None]
    log_p_renormalized = torch.log_softmax(y, dim=-1)
    z = cleaned(draft_logits)
    log_q = torch.log_softmax(z, dim=-1)

    kl = (log_p_renormalized.exp() * (log_p_renormalized - log_q)).sum(-1)
    # Autograd splits the gradient of a minimum evenly at ties: the paper's sign(0) = 0.
    log_overlap = torch.minimum(log_p, log_q)
    alpha = log_overlap.exp().sum(-1)
    log_alpha = log_overlap.logsumexp(-1)
    reverse_kl = None
    if rows.reverse_kl:
        reverse_kl = zero_where_skipped((log_q.exp() * (log_q - log_p)).sum(-1))
    of_tokens: tuple[torch.Tensor, ...] = ()
    if rows.tokens is not None:
        inside, at = rows.tokens >= 0, rows.tokens.clamp_min(0)[..., None]
        of_tokens = tuple(
            zero_where_skipped(torch.where(inside, log.gather(-1, at).squeeze(-1), outside))
            for log, outside in ((log_q, LOGIT_FLOOR), (log_p, 0.0))
        )
    return OverlapTerms(
        zero_where_skipped(kl),
        zero_where_skipped(alpha),
        zero_where_skipped(log_alpha),
        log_coverage,
        zero_where_skipped(z.detach().argmax(-1)),
        reverse_kl,
        *of_tokens,
    )
