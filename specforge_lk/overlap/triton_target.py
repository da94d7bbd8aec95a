"""The target's side of the overlap operation for GPUs in Triton: see `target_terms`.

A program has a position. It reads its logits once for the normalizer and the most likely token, and
then those of the draft vocabulary from the caches, by their index.
"""

import torch
import triton
import triton.language as tl

from specforge_lk.overlap.target_terms import TargetTerms
from specforge_lk.overlap.triton_tiles import (
    FLOOR,
    NEGATIVE_INFINITY,
    alignment,
    columns_of,
    exp,
    exp_online,
    grid_of,
    index_of,
    require_gpu,
    row_of,
    start_of,
    sum_row,
    tile,
    with_dense_rows,
)


def fill(logits: torch.Tensor, kept: torch.Tensor | None, out: TargetTerms) -> None:
    """See `target_terms.TargetKernel`.

    Raises:
        ValueError: tensors on the CPU, where Triton has nothing to compile for.
    """
    require_gpu(logits, "target_terms", "reference")
    logits = with_dense_rows(logits)
    grid, (rows,) = grid_of(logits)
    with torch.cuda.device_of(logits):
        _target_kernel[grid](
            logits,
            *rows,
            kept,
            *out,
            logits.shape[-1],
            0 if kept is None else len(kept),
            ALIGNMENT=alignment(logits.shape[-1], rows),
            **tile(logits, 4096, 16),
        )


@triton.jit(
    do_not_specialize=["outer_stride", "inner_stride"],
    do_not_specialize_on_alignment=[
        *("lookup_ptr", "kept_ptr", "y_ptr", "log_normalizer_ptr", "log_coverage_ptr"),
        "token_ids_ptr",
    ],
)
def _target_kernel(
    logits_ptr: tl.tensor,
    lookup_ptr: tl.tensor | None,
    outer_stride: int,
    inner_stride: int,
    kept_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    log_normalizer_ptr: tl.tensor,
    log_coverage_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    vocabulary: int,
    draft_vocabulary: int,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
) -> None:
    row = row_of()
    logits_ptr = start_of(logits_ptr, lookup_ptr, outer_stride, inner_stride, ALIGNMENT)
    floor = tl.full((), FLOOR, log_normalizer_ptr.dtype.element_ty)
    columns = columns_of(BLOCK, EACH, ALIGNMENT)
    top, total, first = sum_row(logits_ptr, columns, vocabulary, floor, BLOCK, "evict_last")
    log_sum = tl.log(total)
    most_likely = index_of(top, logits_ptr, first + columns, vocabulary, floor)
    tl.store(token_ids_ptr + row, most_likely)
    nothing = top + log_sum < 0.5 * floor  # every logit is -inf; false for nan, which must show
    tl.store(log_normalizer_ptr + row, tl.where(nothing, float("inf"), top + log_sum))
    log_coverage = 0.0 * log_sum

    if kept_ptr is not None:
        y_ptr += row.to(tl.int64) * draft_vocabulary
        m = tl.full((BLOCK // EACH,), NEGATIVE_INFINITY, floor.dtype)
        mass = tl.full((BLOCK // EACH,), 0, floor.dtype)
        # Kept tokens are near each other, not side by side: those of a warp are to share a line of
        # the cache, so neighbors are of different threads. Half a tile: addresses take registers.
        STEP: tl.constexpr = BLOCK // 2
        columns = columns_of(STEP, EACH // 2, 1)
        whole = draft_vocabulary // STEP * STEP
        for start in range(0, whole, STEP):
            token = tl.load(kept_ptr + start + columns)
            y = tl.load(logits_ptr + _valid(token, vocabulary))
            tl.store(y_ptr + start + columns, y)
            m, mass = _add(y.to(floor.dtype), m, mass, floor)
        if whole < draft_vocabulary:
            inside = whole + columns < draft_vocabulary
            token = tl.load(kept_ptr + whole + columns, inside, 0)
            y = tl.load(logits_ptr + _valid(token, vocabulary))
            tl.store(y_ptr + whole + columns, y, inside)
            m, mass = _add(tl.where(inside, y.to(floor.dtype), 2 * floor), m, mass, 2 * floor)
        m, mass = tl.reduce((m, mass), 0, _merge)
        log_coverage = (m - top) + (tl.log(mass) - log_sum)
        log_coverage = tl.where(log_coverage > 0, 0.0, log_coverage)
        nothing |= m <= floor
    tl.store(log_coverage_ptr + row, tl.where(nothing, NEGATIVE_INFINITY, log_coverage))


@triton.jit
def _valid(token: tl.tensor, vocabulary: int) -> tl.tensor:
    """Return the token, or one that may be read: an index of another target must stop nothing."""
    return tl.minimum(tl.maximum(token, 0), vocabulary - 1)


@triton.jit
def _add(
    y: tl.tensor, m: tl.tensor, mass: tl.tensor, floor: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Add a tile to each thread's sum exp(y - m)."""
    y_exp, m, shrink = exp_online(tl.where(y < floor, floor, y), m)
    return m, mass * shrink + tl.sum(y_exp, 1)


@triton.jit
def _merge(
    m: tl.tensor, mass: tl.tensor, other_m: tl.tensor, other_mass: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Join what two threads have of sum exp(y - m)."""
    top = tl.maximum(m, other_m)
    return top, mass * exp(m - top) + other_mass * exp(other_m - top)
