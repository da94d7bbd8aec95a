"""The overlap terms of hidden states and an LM head, without [N, V_d] logits or gradients.

Logits exist for one chunk of positions at a time. The forward pass computes the terms and discards
the logits; the backward pass computes them again, turns them into their gradient in place and
projects that on hidden states and LM head. Two phases are needed, as a loss may weigh every
position by all of them (lambda of scope "head" is set by the mean acceptance rate); the price is
one more multiplication with the LM head, four instead of three, and as many with the target's
LM head again.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F

from specforge_lk.overlap.contract import Kernels, OverlapTerms, RowInputs, RowStatistics, take
from specforge_lk.overlap.differentiable import (
    covered,
    log_probabilities,
    refuse_second_derivative,
    row_gradients,
    terms_of,
    without_gradient,
)

# One chunk's logits in bytes. A CPU's matrix product is at full speed with a hundred rows, a GPU's
# needs a thousand: every chunk also reads and writes the whole gradient of the LM head.
_CPU_CHUNK_BYTES: Final = 1 << 24
_DEVICE_CHUNK_BYTES: Final = 1 << 26
_DEVICE_CHUNK_ROWS: Final = 1024
# A GPU multiplies tiles of so many rows, and pads what does not fill one.
_DEVICE_TILE_ROWS: Final = 128

_HALF: Final = (torch.bfloat16, torch.float16)


class Projection(NamedTuple):
    """Logits ``hidden @ weight.T`` that are never held at once.

    Attributes:
        hidden: [..., H].
        weight: [V, H], the LM head's rows of the (draft) vocabulary.
    """

    hidden: torch.Tensor
    weight: torch.Tensor


def linear_terms(
    kernels: Kernels, draft: Projection, target: torch.Tensor | Projection, rows: RowInputs
) -> OverlapTerms:
    """Return what `differentiable` does, for draft logits that are still to be projected.

    Target logits may be, too. Rows outside the mask are left out of every matrix product.
    """
    target_hidden, target_weight = target if isinstance(target, Projection) else (target, None)
    return OverlapTerms(
        *_LinearOverlap.apply(
            *draft,
            target_hidden.detach(),
            None if target_weight is None else target_weight.detach(),
            kernels,
            *rows,
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
        kernels: Kernels,
        *fields: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        rows = RowInputs(*fields)
        flat = rows.flat()
        statistics = RowStatistics.zeros(flat)
        of_tokens = None
        if flat.tokens is not None:
            of_tokens = flat.mask.new_zeros(2, len(flat.mask), dtype=flat.dtype)
        # The only wait for a device: its rows are the backward pass's, too.
        supervised = flat.mask.nonzero().squeeze(1)
        for index, h, y in _chunks(supervised, hidden, head, target, target_head):
            z, chunk = F.linear(h, head), take(flat, index)
            of_chunk = kernels.forward(z, y, chunk)
            if of_tokens is not None:
                of_tokens[:, index] = log_probabilities(z, y, chunk, of_chunk)
            del z, y
            for whole, part in zip(statistics, of_chunk, strict=True):
                whole[index] = part
        ctx.save_for_backward(hidden, head, target, target_head, supervised, *flat.vectors)
        ctx.settings, ctx.statistics, ctx.kernels = rows.settings, statistics, kernels
        terms = terms_of(statistics, rows, of_tokens)
        ctx.mark_non_differentiable(*without_gradient(terms))
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        hidden, head, target, target_head, supervised, *vectors = ctx.saved_tensors
        rows = covered(RowInputs._make((*vectors, *ctx.settings)), ctx.statistics)
        of_terms = row_gradients(ctx.statistics, rows, gradients)
        grad_hidden = grad_head = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            # Many chunks are added up: in the precision of the terms, whatever the LM head has.
            grad_head = torch.zeros_like(head, dtype=rows.dtype)
        # Operands were cast in forward; without autocast the recomputed logits are identical.
        with torch.autocast(hidden.device.type, enabled=False):
            for index, h, y in _chunks(supervised, hidden, head, target, target_head):
                z = F.linear(h, head)
                of_chunk = take(rows, index), take(ctx.statistics, index), take(of_terms, index)
                grad = ctx.kernels.backward(z, y, *of_chunk, out=z)
                if grad_hidden is not None:
                    grad_hidden.view(-1, hidden.shape[-1])[index] = grad @ head
                if grad_head is not None:
                    _add_product(grad_head, grad.t(), h)
                del z, y, grad
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, None, None, None, *[None] * len(RowInputs._fields)


def _chunks(
    supervised: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    target: torch.Tensor,
    target_head: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield some of the rows ``supervised`` at a time, [n], with what they are made of.

    These are draft hidden states, [n, H], and target logits, [n, V].
    """
    size = _chunk_rows(head)
    draft_rows, target_rows = _rows_of(hidden), _rows_of(target)
    for index in supervised.split(size):
        # Bind no locals: a chunk must be freed before the next one is computed.
        if target_head is None:
            yield index, draft_rows(index), target_rows(index)
        else:
            yield index, draft_rows(index), F.linear(target_rows(index), target_head)


def _chunk_rows(head: torch.Tensor) -> int:
    """Return how many rows' logits are held at a time."""
    row = head.shape[0] * head.element_size()
    if head.device.type == "cpu":
        return max(1, _CPU_CHUNK_BYTES // row)
    rows = max(_DEVICE_CHUNK_ROWS, _DEVICE_CHUNK_BYTES // row)
    return rows - rows % _DEVICE_TILE_ROWS


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to ``total``, the sum being in the dtype of ``total``."""
    # ROCm's tensors are `is_cuda`, too, without this product.
    on_cuda = total.is_cuda and torch.version.cuda is not None
    if on_cuda and total.dtype == torch.float32 and left.dtype in _HALF:
        # Tensor cores multiply half precision exactly and add in float32; a copy of the operands
        # in float32 would leave them idle.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _rows_of(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Take rows of [..., X] by their flat index, with no copy of a window of a padded tensor."""
    shape = tensor.shape[:-1]
    return lambda index: tensor[torch.unravel_index(index, shape)]
