"""The definition of the overlap terms in plain torch: slow, with many [..., V_d] tensors held."""

import torch

from specforge_lk.overlap.contract import LOGIT_FLOOR


def reference(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor,
    live: torch.Tensor,
    reverse_kl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `overlap_terms`; gradients are autograd's."""

    # Inputs of skipped rows are replaced before, and their terms after, the computation:
    # multiplying by 0 would leave their nan in values and gradients.
    def cleaned(logits: torch.Tensor) -> torch.Tensor:
        logits = torch.where(live[..., None], logits, 0.0).to(log_normalizer.dtype)
        return logits.clamp_min(LOGIT_FLOOR)

    def zero_where_skipped(term: torch.Tensor) -> torch.Tensor:
        return torch.where(live, term, 0.0)

    y = cleaned(target_logits)
    log_p = y - torch.where(live, log_normalizer, 0.0)[..., None]
    log_p_renormalized = torch.log_softmax(y, dim=-1)
    log_q = torch.log_softmax(cleaned(draft_logits), dim=-1)

    kl = (log_p_renormalized.exp() * (log_p_renormalized - log_q)).sum(-1)
    # Autograd splits the gradient of a minimum evenly at ties: the paper's sign(0) = 0.
    log_overlap = torch.minimum(log_p, log_q)
    alpha = log_overlap.exp().sum(-1)
    log_alpha = log_overlap.logsumexp(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1) if reverse_kl else None
    return (
        zero_where_skipped(kl),
        zero_where_skipped(alpha),
        zero_where_skipped(log_alpha),
        None if reverse is None else zero_where_skipped(reverse),
    )
