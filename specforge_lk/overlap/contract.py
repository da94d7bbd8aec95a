"""What every implementation of the overlap operation takes and returns."""

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

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


class RowStatistics(NamedTuple):
    """What one pass over the logits leaves: one value per row, each [N]; 0 where not live.

    Attributes:
        kl, alpha, log_alpha, reverse_kl: the terms.
        draft_shift, draft_log_sum: log sum_D exp(z), the first near max z and the second what is
            left, so that log q = (z - draft_shift) - draft_log_sum loses no digits where logits
            are large.
        target_log_sum: log sum_D exp(y - log Z), the log coverage of these very logits: p~ =
            exp(y - log Z - target_log_sum) sums to 1 as exactly as the arithmetic allows.
        below: B / alpha, the share of the acceptance rate where q < p (ties count half).
    """

    kl: torch.Tensor
    alpha: torch.Tensor
    log_alpha: torch.Tensor
    reverse_kl: torch.Tensor
    draft_shift: torch.Tensor
    draft_log_sum: torch.Tensor
    target_log_sum: torch.Tensor
    below: torch.Tensor


class RowGradients(NamedTuple):
    """Gradients of the loss with respect to a row's terms, each [N]; None where it has none.

    ``alpha`` and ``log_alpha`` are one: d alpha = alpha d log_alpha.
    """

    kl: torch.Tensor | None
    log_alpha: torch.Tensor | None
    reverse_kl: torch.Tensor | None


class Kernels(Protocol):
    """The two passes over the logits that a closed-form implementation consists of.

    Logits are [..., V_d] of any strides and floating dtype and are never written to; row vectors
    are contiguous [N] in the dtype to compute in. Rows that are not ``live`` are not read.

    Forward and backward must agree bit by bit on w = 1[q < p] + 1/2 1[q = p]. Both compare

        y - z  with  log Z - draft_shift - draft_log_sum

    since y - z is exact where it is small: where draft and target are the same up to a constant,
    all tokens fall on one side of a rounding error together, and the gradient of alpha is 0.
    """

    def forward(
        self,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        log_normalizer: torch.Tensor,
        log_coverage: torch.Tensor | None,
        live: torch.Tensor,
        reverse_kl: bool,
    ) -> RowStatistics:
        """Terms and statistics.

        ``log_coverage`` is what the caller knows of ``target_log_sum``: a shift against
        underflow, no more. A live row without coverage has terms of 0 and a
        ``target_log_sum`` of -inf. ``reverse_kl`` need not be computed unless asked for.
        """
        ...

    def backward(
        self,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        log_normalizer: torch.Tensor,
        live: torch.Tensor,
        statistics: RowStatistics,
        gradients: RowGradients,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient with respect to the draft logits, contiguous [..., V_d] in their dtype.

        With g the row's gradients and r = log(p / q),

            g_kl (q - p~) + g_log_alpha q (w / alpha - below) - g_reverse q (r + reverse_kl)

        and 0 in rows that are not live. Rows without coverage are not live here. It is written
        to ``out`` if given, which may be ``draft_logits`` itself, and to a new tensor otherwise.
        """
        ...
