"""What every implementation of the overlap operation takes and returns."""

from dataclasses import dataclass
from typing import Final, Protocol

import torch

# Stands for a logit of -inf. exp() of it is 0 like that of -inf, but differences of two such
# logits, and their products with a probability of 0, are not nan. It fits float32 and bfloat16.
LOGIT_FLOOR: Final = -1e30


@dataclass(frozen=True, slots=True)
class OverlapTerms:
    """Per-position terms of the overlap of draft and target, each [...]; see `overlap_terms`.

    Attributes:
        kl: KL(p~ || q) in nats, p~ the target renormalised on the draft vocabulary.
        alpha: acceptance rate, sum of min(p, q) over the draft vocabulary.
        log_alpha: log of ``alpha``, finite where ``alpha`` underflows.
        log_coverage: log of the coverage, the target's mass on the draft vocabulary; no gradient.
        reverse_kl: KL(q || p) in nats against the target that is NOT renormalised, if asked for.
    """

    kl: torch.Tensor
    alpha: torch.Tensor
    log_alpha: torch.Tensor
    log_coverage: torch.Tensor
    reverse_kl: torch.Tensor | None = None


class Implementation(Protocol):
    """One way to compute the terms, on inputs that ``overlap_terms`` has checked."""

    def __call__(
        self,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        log_normalizer: torch.Tensor,
        log_coverage: torch.Tensor,
        live: torch.Tensor,
        reverse_kl: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return kl, alpha, log_alpha and, if asked for, reverse_kl, each [...].

        Args:
            draft_logits: [..., V_d], any floating dtype; the only input with a gradient.
            target_logits: [..., V_d], any floating dtype.
            log_normalizer: [...], in the dtype to compute in.
            log_coverage: [...], same dtype.
            live: [...] bool. Elsewhere terms and gradients are 0 and nothing is read.
            reverse_kl: whether to compute the fourth term.
        """
        ...
