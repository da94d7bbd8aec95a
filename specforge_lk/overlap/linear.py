"""The overlap terms of hidden states and a head, without [N, V_d] logits or gradients.

Logits exist for one chunk of positions at a time. The forward pass takes the terms and forgets the
logits; the backward pass computes them again, turns them into their gradient in place and projects
that on hidden states and head. Two phases are needed, as a loss may weigh every position by all of
them (lambda of scope "head" is set by the mean acceptance rate); the price is one more
multiplication with the head, four instead of three, and as many with the target's head again.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F

from specforge_lk.overlap.contract import Kernels, OverlapTerms, RowStatistics
from specforge_lk.overlap.differentiable import (
    has_gradient,
    refuse_second_derivative,
    row_gradients,
    terms_of,
)

# One chunk's logits in bytes. A CPU's matrix product is at full speed with a hundred rows, a GPU's
# needs a thousand.
_CPU_CHUNK_BYTES: Final = 1 << 24
_DEVICE_CHUNK_BYTES: Final = 1 << 26


class Projection(NamedTuple):
    """Logits ``hidden @ weight.T`` that are never held at once.

    Attributes:
        hidden: [..., H].
        weight: [V, H], the head's rows of the (draft) vocabulary.
    """

    hidden: torch.Tensor
    weight: torch.Tensor


def linear_terms(
    kernels: Kernels,
    draft: Projection,
    target: torch.Tensor | Projection,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor | None,
    live: torch.Tensor,
    reverse_kl: bool,
) -> OverlapTerms:
    """As `differentiable`, for draft logits (and where wanted target logits) yet to be projected.

    Rows that are not ``live`` are left out of every matrix product.
    """
    target_hidden, target_weight = target if isinstance(target, Projection) else (target, None)
    return OverlapTerms(
        *_LinearOverlap.apply(
            *draft,
            target_hidden.detach(),
            None if target_weight is None else target_weight.detach(),
            log_normalizer,
            log_coverage,
            live,
            reverse_kl,
            kernels,
        )
    )


class _LinearOverlap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        target: torch.Tensor,
        target_head: torch.Tensor | None,
        log_normalizer: torch.Tensor,
        log_coverage: torch.Tensor | None,
        live: torch.Tensor,
        reverse_kl: bool,
        kernels: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        shape, live, log_z = log_normalizer.shape, live.reshape(-1), log_normalizer.reshape(-1)
        log_c = None if log_coverage is None else log_coverage.reshape(-1)
        statistics = RowStatistics(*log_z.new_zeros(8, len(log_z)))
        for rows, h, y in _chunks(live, hidden, head, target, target_head):
            of_chunk = kernels.forward(
                F.linear(h, head),
                y,
                log_z[rows],
                None if log_c is None else log_c[rows],
                live[rows],
                reverse_kl,
            )
            del y
            for whole, part in zip(statistics, of_chunk, strict=True):
                whole[rows] = part
        ctx.save_for_backward(hidden, head, target, target_head, log_z, live)
        ctx.statistics, ctx.kernels = statistics, kernels
        terms = terms_of(statistics, log_coverage, shape, reverse_kl)
        ctx.mark_non_differentiable(terms[3])
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # The forward pass has cast its operands: the same products again, whoever asks.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _LinearOverlap._backward(ctx, *gradients)

    @staticmethod
    def _backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        hidden, head, target, target_head, log_z, live = ctx.saved_tensors
        statistics = ctx.statistics
        of_terms = row_gradients(statistics, gradients)
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            # Many chunks are added up: in the precision of the terms, whatever the head has.
            grad_head = torch.zeros_like(head, dtype=log_z.dtype)
        for rows, h, y in _chunks(
            has_gradient(live, statistics), hidden, head, target, target_head
        ):
            z = F.linear(h, head)
            grad = ctx.kernels.backward(
                z,
                y,
                log_z[rows],
                live[rows],
                RowStatistics(*(s[rows] for s in statistics)),
                type(of_terms)(*(None if g is None else g[rows] for g in of_terms)),
                out=z,
            )
            if grad_hidden is not None:
                grad_hidden.view(-1, hidden.shape[-1])[rows] = grad @ head
            if grad_head is not None:
                grad_head.addmm_(grad.t().to(log_z.dtype), h.to(log_z.dtype))
            del z, y, grad
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, *[None] * 7


def _chunks(
    live: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    target: torch.Tensor,
    target_head: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield indices of live rows [n], their draft hidden states [n, H] and target logits [n, V]."""
    budget = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    size = max(1, budget // (head.shape[0] * head.element_size()))
    hidden, target = _take_rows(hidden), _take_rows(target)
    for rows in live.nonzero().squeeze(1).split(size):
        # No name here keeps a chunk's tensors while the next one's are made.
        if target_head is None:
            yield rows, hidden(rows), target(rows)
        else:
            yield rows, hidden(rows), F.linear(target(rows), target_head)


def _take_rows(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of [..., X] by their flat index; a window of a padded tensor is not copied whole."""
    shape = tensor.shape[:-1]
    return lambda rows: tensor[torch.unravel_index(rows, shape)]
