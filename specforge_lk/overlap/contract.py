"""What every implementation of the overlap operation takes and returns.

A new term of a position is added to `OverlapTerms`, `RowStatistics` and `RowGradients`, and what it
needs beside the logits to `RowInputs`; then to every implementation. A term that takes single
logits rather than a pass over them is computed in `differentiable.log_probabilities`, once for all
kernels, and has no statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self, TypeVar

import torch

# Stands for a logit of -inf. exp() of it is 0 like that of -inf, but differences of two such
# logits, and their products with a probability of 0, are not nan. It fits float32 and bfloat16.
LOGIT_FLOOR: Final = -1e30


@dataclass(frozen=True, slots=True)
class OverlapTerms:
    """Per-position terms of the overlap of draft and target, each [...]; see `overlap_terms`.

    Attributes:
        kl: KL(p~ || q) in nats, p~ the target renormalized on the draft vocabulary.
        alpha: acceptance rate, sum of min(p, q) over the draft vocabulary.
        log_alpha: log of ``alpha``, finite where ``alpha`` underflows.
        log_coverage: log of the coverage, the target's mass on the draft vocabulary; no gradient.
        draft_argmax: int64 index into the draft vocabulary of the draft's most likely token, the
            first of several; 0 where the other terms are, and always a valid index. No gradient.
        reverse_kl: KL(q || p) in nats against the target that is NOT renormalized, if asked for.
        log_q: log of the draft's probability of the given token, ``LOGIT_FLOOR`` where that is
            outside the draft vocabulary; None unless tokens are given.
        log_p: log of the target's probability of it, 0 where it is outside the draft vocabulary; no
            gradient; None unless tokens are given.
    """

    kl: torch.Tensor
    alpha: torch.Tensor
    log_alpha: torch.Tensor
    log_coverage: torch.Tensor
    draft_argmax: torch.Tensor
    reverse_kl: torch.Tensor | None = None
    log_q: torch.Tensor | None = None
    log_p: torch.Tensor | None = None


class RowInputs(NamedTuple):
    """What travels beside the logits, a row being one position: vectors, then what is asked for.

    `overlap_terms` makes it, with vectors [...]; kernels get contiguous vectors [N].

    Attributes:
        log_normalizer: log Z in nats, in the dtype to compute in. None where the target's logits
            cover its full vocabulary: then log Z is that of these logits, and coverage is 1.
        log_coverage: what the caller knows of the log coverage, in the same dtype: 0 where the
            mask is False. None has it computed.
        mask: bool. Rows where it is False are not read; their terms and gradients are 0.
        tokens: int64 index into the draft vocabulary of the token that ``log_q`` and ``log_p`` are
            of, negative where that is outside it. None where they are not asked for.
        dtype: what to compute in.
        reverse_kl: whether ``reverse_kl`` is asked for.
    """

    log_normalizer: torch.Tensor | None
    log_coverage: torch.Tensor | None
    mask: torch.Tensor
    tokens: torch.Tensor | None
    dtype: torch.dtype
    reverse_kl: bool

    @property
    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """All that is one value per row, which autograd keeps for the backward pass."""
        return self[:4]

    @property
    def settings(self) -> tuple[torch.dtype, bool]:
        """The rest, which is the same for all rows."""
        return self[4:]

    def flat(self) -> "RowInputs":
        """Return the same with every vector contiguous and [N]."""
        return _each(self, lambda vector: vector.reshape(-1).contiguous())


class RowStatistics(NamedTuple):
    """What one pass over the logits leaves: one value per row, each [N]; 0 where the mask is False.

    Attributes:
        kl, alpha, log_alpha, reverse_kl: the terms.
        draft_shift, draft_log_sum: log sum_D exp(z), the first near max z and the second what is
            left, so that log q = (z - draft_shift) - draft_log_sum loses no digits where logits
            are large.
        log_normalizer: log Z, given or computed.
        target_log_sum: log sum_D exp(y - log Z), the log coverage of these very logits: p~ =
            exp(y - log Z - target_log_sum) sums to 1 as exactly as the arithmetic allows.
        below: B / alpha, the share of the acceptance rate where q < p (ties count half).
        draft_argmax: int64, the first index of the highest draft logit; 0 where the mask is False
            and in rows without coverage. Where logits are nan it is any index, below V_d.
    """

    kl: torch.Tensor
    alpha: torch.Tensor
    log_alpha: torch.Tensor
    reverse_kl: torch.Tensor
    draft_shift: torch.Tensor
    draft_log_sum: torch.Tensor
    log_normalizer: torch.Tensor
    target_log_sum: torch.Tensor
    below: torch.Tensor
    draft_argmax: torch.Tensor

    @classmethod
    def zeros(cls, rows: RowInputs) -> Self:
        """Return statistics of 0 for as many rows, in the dtype to compute in."""
        like, count = rows.mask, len(rows.mask)
        # Every vector begins at a multiple of 16 bytes, which a GPU's compiler may rely on.
        size = len(cls._fields) - 1, -(-count // 4) * 4
        values = like.new_zeros(size, dtype=rows.dtype)[:, :count]
        return cls._make((*values, like.new_zeros(count, dtype=torch.int64)))


class RowGradients(NamedTuple):
    """Gradients of the loss with respect to a row's terms, each [N]; None where it has none.

    ``alpha`` and ``log_alpha`` are one: d alpha = alpha d log_alpha. ``log_q`` is 0 where the row's
    token is negative.
    """

    kl: torch.Tensor | None
    log_alpha: torch.Tensor | None
    reverse_kl: torch.Tensor | None
    log_q: torch.Tensor | None


_OfRows = TypeVar("_OfRows", RowInputs, RowStatistics, RowGradients)


def take(of_rows: _OfRows, index: torch.Tensor) -> _OfRows:
    """Return the values of some rows alone: those of a flat ``index``, int64 [n]."""
    return _each(of_rows, lambda vector: vector[index])


def _each(of_rows: _OfRows, change: Callable[[torch.Tensor], torch.Tensor]) -> _OfRows:
    changed = (change(v) if isinstance(v, torch.Tensor) else v for v in of_rows)
    return type(of_rows)._make(changed)


class Kernels(Protocol):
    """The two passes over the logits that a closed-form implementation consists of.

    Logits are [..., V_d] of any strides and floating dtype and are never written to; vectors are
    contiguous [N]. Rows outside the mask are not read.

    Forward and backward must agree bit by bit on w = 1[q < p] + 1/2 1[q = p]. Both compare

        y - z  with  log Z - draft_shift - draft_log_sum

    since y - z is exact where it is small: where draft and target are the same up to a constant,
    all tokens fall on one side of a rounding error together, and the gradient of alpha is 0.
    """

    def forward(
        self, draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
    ) -> RowStatistics:
        """Return terms and statistics.

        A row's log Z is ``rows.log_normalizer``, or that of its target logits where there is none.
        ``rows.log_coverage`` is what the caller knows of ``target_log_sum``: a shift against
        underflow, no more. A row in the mask without coverage has terms of 0 and a
        ``target_log_sum`` of -inf. ``reverse_kl`` need not be computed unless asked for.
        """
        ...

    def backward(
        self,
        draft_logits: torch.Tensor,
        target_logits: torch.Tensor,
        rows: RowInputs,
        statistics: RowStatistics,
        gradients: RowGradients,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the gradient with respect to the draft logits.

        It is contiguous, [..., V_d] in their dtype. With g the row's gradients and r = log(p / q),

            g_kl (q - p~) + g_log_alpha q (w / alpha - below) - g_reverse q (r + reverse_kl)
            + g_log_q (1[token] - q)

        and 0 in rows outside the mask, which leaves out rows without coverage, too. It is written
        to ``out`` if given, which may be ``draft_logits`` itself, and to a new tensor otherwise.
        """
        ...
