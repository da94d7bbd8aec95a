"""The overlap operation for GPUs in Triton: one program to a row, the vocabulary in tiles.

Forward reads z to normalize q (and y, if it is to be normalized, too), then z and y once together;
the normalizer of p~ and the log-domain shifts of the overlap grow along with that second loop. So
``log_coverage``, whether given or not, saves no read and is not used: a pass over y to compute it
beforehand would cost as much as the one over z. Backward reads z and y and writes the gradient.
Nothing waits for the host.

What is to be bound by memory must not be held up by anything else:

- no thread waits for another inside a loop (`triton_tiles`);
- every tile but a row's last is read without a mask;
- exponentials are powers of 2, and what is not asked for is not compiled: two powers per token for
  KL, two for KL and the acceptance rate together;
- tiles are fixed. An autotuner's choice, and with it the last bits, would depend on a race.

tests/overlap/test_triton_compile.py counts what the compiler makes of that.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from specforge_lk.overlap.contract import RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.triton_tiles import (
    FLOOR,
    NEGATIVE_INFINITY,
    alignment,
    columns_of,
    exp,
    exp_online,
    grid_of,
    index_of,
    read,
    require_gpu,
    row_of,
    start_of,
    sum_row,
    tile,
    with_dense_rows,
)

# What differs from call to call but not from model to model is not compiled for: the number of
# positions, how they are strided, and where a vector of them begins.
_ANY: Final = [f"{name}_{of}" for name in "zy" for of in ("outer_stride", "inner_stride")]
_ANYWHERE: Final = [
    *("z_lookup_ptr", "y_lookup_ptr", "log_normalizer_ptr", "mask_ptr", "tokens_ptr"),
    *("kl_ptr", "log_alpha_ptr", "reverse_kl_ptr", "log_q_ptr"),
]


def forward(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> RowStatistics:
    """See `contract.Kernels`.

    Raises:
        ValueError: tensors on the CPU, where Triton has nothing to compile for.
    """
    require_gpu(draft_logits, "overlap_terms", "closed_form")
    z, y = with_dense_rows(draft_logits), with_dense_rows(target_logits)
    grid, (z_rows, y_rows) = grid_of(z, y)
    statistics = RowStatistics.zeros(rows)
    with torch.cuda.device_of(z):
        _forward_kernel[grid](
            z,
            *z_rows,
            y,
            *y_rows,
            rows.log_normalizer,
            rows.mask,
            statistics,
            z.shape[-1],
            ALIGNMENT=alignment(z.shape[-1], z_rows, y_rows),
            REVERSE_KL=rows.reverse_kl,
            **tile(z, *((2048, 8) if z.element_size() == 2 else (4096, 16))),
        )
    return statistics


def backward(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rows: RowInputs,
    statistics: RowStatistics,
    gradients: RowGradients,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `contract.Kernels`."""
    require_gpu(draft_logits, "overlap_terms", "closed_form")
    z, y = with_dense_rows(draft_logits), with_dense_rows(target_logits)
    grid, (z_rows, y_rows) = grid_of(z, y)
    if out is None:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    with torch.cuda.device_of(z):
        _backward_kernel[grid](
            z,
            *z_rows,
            y,
            *y_rows,
            out,
            rows.mask,
            rows.tokens,
            statistics,
            *gradients,
            z.shape[-1],
            ALIGNMENT=alignment(z.shape[-1], z_rows, y_rows),
            **tile(z, 4096, 16),
        )
    return out


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def _forward_kernel(
    z_ptr: tl.tensor,
    z_lookup_ptr: tl.tensor | None,
    z_outer_stride: int,
    z_inner_stride: int,
    y_ptr: tl.tensor,
    y_lookup_ptr: tl.tensor | None,
    y_outer_stride: int,
    y_inner_stride: int,
    log_normalizer_ptr: tl.tensor | None,
    mask_ptr: tl.tensor,
    s: RowStatistics,
    vocabulary: int,
    ALIGNMENT: tl.constexpr,
    REVERSE_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
) -> None:
    row = row_of()
    if not tl.load(mask_ptr + row):
        return
    z_ptr = start_of(z_ptr, z_lookup_ptr, z_outer_stride, z_inner_stride, ALIGNMENT)
    y_ptr = start_of(y_ptr, y_lookup_ptr, y_outer_stride, y_inner_stride, ALIGNMENT)
    dtype: tl.constexpr = s.kl.dtype.element_ty  # type: ignore[attr-defined]  # a pointer here
    floor = tl.full((), FLOOR, dtype)
    columns = columns_of(BLOCK, EACH, ALIGNMENT)
    whole = vocabulary // BLOCK * BLOCK
    lowest = tl.full((BLOCK // EACH,), NEGATIVE_INFINITY, dtype)
    nothing = tl.full((BLOCK // EACH,), 0, dtype)

    # The caches should keep what is read here: the next loop reads it again.
    draft_shift, total, first = sum_row(z_ptr, columns, vocabulary, floor, BLOCK, "evict_last")
    draft_log_sum = tl.log(total)
    if log_normalizer_ptr is None:
        y_max, total, _ = sum_row(y_ptr, columns, vocabulary, floor, BLOCK, "evict_last")
        log_z = y_max + tl.log(total)
    else:
        log_z = tl.load(log_normalizer_ptr + row)

    target_max, overlap_max = lowest, lowest
    coverage, kl, overlap, below, reverse_kl = nothing, nothing, nothing, nothing, nothing
    for start in range(0, whole, BLOCK):
        z = read(z_ptr, start + columns, vocabulary, floor, False, "evict_first")
        y = read(y_ptr, start + columns, vocabulary, floor, False, "evict_first")
        log_q, log_ratio = _compare(z, y, log_z, draft_shift, draft_log_sum)
        target_max, coverage, kl = _add_target(y, log_ratio, target_max, coverage, kl)
        overlap_max, overlap, below = _add_overlap(log_q, log_ratio, overlap_max, overlap, below)
        if REVERSE_KL:
            reverse_kl -= tl.sum(exp(log_q) * log_ratio, 1)
    if whole < vocabulary:
        z = read(z_ptr, whole + columns, vocabulary, floor, True, "evict_first")
        y = read(y_ptr, whole + columns, vocabulary, floor, True, "evict_first")
        log_q, log_ratio = _compare(z, y, log_z, draft_shift, draft_log_sum)
        target_max, coverage, kl = _add_target(y, log_ratio, target_max, coverage, kl)
        overlap_max, overlap, below = _add_overlap(log_q, log_ratio, overlap_max, overlap, below)
        if REVERSE_KL:
            reverse_kl -= tl.sum(exp(log_q) * log_ratio, 1)
    target_max, coverage, kl = tl.reduce((target_max, coverage, kl), 0, _merge)
    overlap_max, overlap, below = tl.reduce((overlap_max, overlap, below), 0, _merge)
    # Without a single target logit above the floor, the maximum is as good as -inf.
    target_max = tl.where(target_max > floor, target_max, NEGATIVE_INFINITY)
    target_log_sum = (target_max - log_z) + tl.log(coverage)
    covered = target_log_sum != NEGATIVE_INFINITY  # true for nan, which must show
    log_alpha = overlap_max + tl.log(overlap)

    argmax = index_of(draft_shift, z_ptr, first + columns, vocabulary, floor)

    tl.store(s.kl + row, tl.where(covered, kl / coverage - target_log_sum, 0.0))
    tl.store(s.alpha + row, tl.where(covered, exp(log_alpha), 0.0))
    tl.store(s.log_alpha + row, tl.where(covered, log_alpha, 0.0))
    if REVERSE_KL:
        tl.store(s.reverse_kl + row, tl.where(covered, tl.sum(reverse_kl, 0), 0.0))
    tl.store(s.draft_shift + row, draft_shift)
    tl.store(s.draft_log_sum + row, draft_log_sum)
    tl.store(s.log_normalizer + row, log_z)
    tl.store(s.target_log_sum + row, target_log_sum)
    tl.store(s.below + row, tl.where(covered, below / overlap, 0.0))
    tl.store(s.draft_argmax + row, tl.where(covered, argmax, 0))


@triton.jit
def _compare(
    z: tl.tensor, y: tl.tensor, log_z: tl.tensor, draft_shift: tl.tensor, draft_log_sum: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return log q and log(p / q), of whose sign w = 1[q < p] + 1/2 1[q = p] is made.

    See `contract.Kernels`. There is no product here that the compiler could contract in one kernel
    and not in the other.
    """
    log_ratio = (y - z) - ((log_z - draft_shift) - draft_log_sum)
    return (z - draft_shift) - draft_log_sum, log_ratio


@triton.jit
def _add_target(
    y: tl.tensor, log_ratio: tl.tensor, m: tl.tensor, total: tl.tensor, kl: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile to sum exp(y - m), and to that of exp(y - m) log(p / q)."""
    y_exp, m, shrink = exp_online(y, m)
    return m, total * shrink + tl.sum(y_exp, 1), kl * shrink + tl.sum(y_exp * log_ratio, 1)


@triton.jit
def _add_overlap(
    log_q: tl.tensor, log_ratio: tl.tensor, m: tl.tensor, total: tl.tensor, below: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile to sum exp(log min(p, q) - m), and to that of its products with w.

    In the log domain and with a shift of its own, for the overlap may be far below both p and q.
    """
    log_overlap = log_q + tl.where(log_ratio > 0, 0.0, log_ratio)  # tl.minimum would drop nan
    overlap, m, shrink = exp_online(log_overlap, m)
    w = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio == 0, 0.5, 0.0))
    return m, total * shrink + tl.sum(overlap, 1), below * shrink + tl.sum(overlap * w, 1)


@triton.jit
def _merge(
    m: tl.tensor,
    total: tl.tensor,
    product: tl.tensor,
    other_m: tl.tensor,
    other_total: tl.tensor,
    other_product: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Join what `_add_target`, or `_add_overlap`, keeps of two threads."""
    top = tl.maximum(m, other_m)
    ours, others = exp(m - top), exp(other_m - top)
    return top, total * ours + other_total * others, product * ours + other_product * others


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def _backward_kernel(
    z_ptr: tl.tensor,
    z_lookup_ptr: tl.tensor | None,
    z_outer_stride: int,
    z_inner_stride: int,
    y_ptr: tl.tensor,
    y_lookup_ptr: tl.tensor | None,
    y_outer_stride: int,
    y_inner_stride: int,
    grad_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    tokens_ptr: tl.tensor | None,
    s: RowStatistics,
    kl_ptr: tl.tensor | None,
    log_alpha_ptr: tl.tensor | None,
    reverse_kl_ptr: tl.tensor | None,
    log_q_ptr: tl.tensor | None,
    vocabulary: int,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
) -> None:
    """Write the gradient of a row; see `contract.Kernels.backward` for its formula.

    Collecting what q is multiplied with, it is

        q (A - g_reverse (r + reverse_kl)) + g_log_alpha (q / alpha) w - g_kl p~ + g_log_q 1[token]

    with A = g_kl - g_log_alpha below - g_log_q. Where w > 0, q is part of the overlap, so that
    q / alpha is at most 1; elsewhere it may be anything, but is not needed. So one power per token
    is enough for both: u = q / alpha where w > 0, whose factor is alpha A + g_log_alpha w, and
    u = q elsewhere, whose factor is A. No alpha is too small for that: log u takes its logarithm,
    and where alpha A underflows it is nothing beside g_log_alpha w.
    """
    row = row_of()
    grad_ptr += tl.multiple_of(row.to(tl.int64) * vocabulary, ALIGNMENT)
    columns = columns_of(BLOCK, EACH, ALIGNMENT)
    whole = vocabulary // BLOCK * BLOCK
    if not tl.load(mask_ptr + row):
        zeros = tl.full(columns.shape, 0, grad_ptr.dtype.element_ty)
        for start in range(0, whole, BLOCK):
            tl.store(grad_ptr + start + columns, zeros)
        if whole < vocabulary:
            tl.store(grad_ptr + whole + columns, zeros, whole + columns < vocabulary)
        return
    z_ptr = start_of(z_ptr, z_lookup_ptr, z_outer_stride, z_inner_stride, ALIGNMENT)
    y_ptr = start_of(y_ptr, y_lookup_ptr, y_outer_stride, y_inner_stride, ALIGNMENT)
    log_z = tl.load(s.log_normalizer + row)
    floor = tl.full((), FLOOR, log_z.dtype)

    draft_shift, draft_log_sum = tl.load(s.draft_shift + row), tl.load(s.draft_log_sum + row)
    a = tl.full((), 0, log_z.dtype)
    g_kl, g_reverse, g_log_q, token = None, None, None, None
    log_alpha, alpha, below, tied = None, None, None, None
    if kl_ptr is not None:
        g_kl = tl.load(kl_ptr + row)
        a += g_kl
    if reverse_kl_ptr is not None:
        g_reverse = tl.load(reverse_kl_ptr + row)
        a -= g_reverse * tl.load(s.reverse_kl + row)
    if log_q_ptr is not None:
        g_log_q = tl.load(log_q_ptr + row)
        token = tl.load(tokens_ptr + row)
        a -= g_log_q
    if log_alpha_ptr is not None:
        g_log_alpha = tl.load(log_alpha_ptr + row)
        log_alpha = tl.load(s.log_alpha + row)
        a -= g_log_alpha * tl.load(s.below + row)
        alpha = exp(log_alpha)
        below = alpha * a + g_log_alpha
        tied = alpha * a + 0.5 * g_log_alpha
    of = _OfRow(
        draft_shift,
        draft_log_sum,
        (log_z - draft_shift) - draft_log_sum,
        log_z + tl.load(s.target_log_sum + row),
        *(a, below, tied, log_alpha, alpha, g_kl, g_reverse, g_log_q, token),
    )
    for start in range(0, whole, BLOCK):
        z = read(z_ptr, start + columns, vocabulary, floor, False, "evict_first")
        y = read(y_ptr, start + columns, vocabulary, floor, False, "evict_first")
        tl.store(grad_ptr + start + columns, _gradient(z, y, start + columns, of))
    if whole < vocabulary:
        z = read(z_ptr, whole + columns, vocabulary, floor, True, "evict_first")
        y = read(y_ptr, whole + columns, vocabulary, floor, True, "evict_first")
        grad = _gradient(z, y, whole + columns, of)
        tl.store(grad_ptr + whole + columns, grad, whole + columns < vocabulary)


class _OfRow(NamedTuple):
    """What `_gradient` takes of a row. None is a constant: what needs it is not compiled.

    Attributes:
        draft_shift, draft_log_sum: see `contract.RowStatistics`.
        threshold: what y - z is compared with.
        target_log_normalizer: log of the sum of exp(y).
        a: factor of u = q where q > p.
        below, tied: factors of u = q / alpha where q < p and where q = p; None without a gradient
            of alpha, as are the next two. Then the factor is ``a`` everywhere.
        log_alpha, alpha: see `contract.OverlapTerms`.
        kl, reverse_kl, log_q: gradients of the terms.
        token: the token of ``log_q``.
    """

    draft_shift: tl.tensor
    draft_log_sum: tl.tensor
    threshold: tl.tensor
    target_log_normalizer: tl.tensor
    a: tl.tensor
    below: tl.tensor | None
    tied: tl.tensor | None
    log_alpha: tl.tensor | None
    alpha: tl.tensor | None
    kl: tl.tensor | None
    reverse_kl: tl.tensor | None
    log_q: tl.tensor | None
    token: tl.tensor | None


@triton.jit
def _gradient(z: tl.tensor, y: tl.tensor, columns: tl.tensor, of: _OfRow) -> tl.tensor:
    """Return the gradient of a tile, as `_backward_kernel` writes it down."""
    difference = y - z
    factor = of.a
    log_u = of.draft_log_sum
    # Forward looks at the sign of difference - threshold: the same, for no difference of two unlike
    # floats is 0.
    shared = difference >= of.threshold  # where w > 0
    if of.log_alpha is not None:
        factor = tl.where(difference == of.threshold, of.tied, of.below)
        factor = tl.where(shared, factor, of.a)
        log_u = tl.where(shared, of.draft_log_sum + of.log_alpha, of.draft_log_sum)
    u = exp((z - of.draft_shift) - log_u)
    if of.reverse_kl is not None:
        reverse = of.reverse_kl * (difference - of.threshold)
        if of.log_alpha is not None:
            reverse = tl.where(shared, reverse * of.alpha, reverse)
        factor -= reverse
    grad = u * factor
    if of.kl is not None:
        grad -= of.kl * exp(y - of.target_log_normalizer)
    if of.log_q is not None:
        grad += tl.where(columns == of.token, of.log_q, 0.0)
    return grad
