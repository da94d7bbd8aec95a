"""The overlap operation for GPUs in Triton: one program to a row, the vocabulary in tiles.

Both passes are bound by memory, so what counts is how often a logit is read. Forward reads z to
normalize q, then z and y once together; the normalizer of p~ and the log-domain shifts of the
overlap grow along with that second loop. So ``log_coverage``, whether given or not, saves no read
and is not used: a pass over y to compute it beforehand would cost as much as the one over z.
Backward reads z and y and writes the gradient. Nothing waits for the host.

Sums are kept per lane and folded together once, after the loop; the running maxima are scalars,
since one per lane would double the number of exponentials.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl

from specforge_lk.overlap.contract import LOGIT_FLOOR, RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.rows import row_offsets

_FLOOR: Final = tl.constexpr(LOGIT_FLOOR)
_NEGATIVE_INFINITY: Final = tl.constexpr(float("-inf"))

_INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
# What the autotuner chooses from: 4 or 8 logits of each tensor to a thread. Forward keeps five
# sums for every one of them; with 16 it spills registers on some GPUs
# (tests/overlap/test_triton_compile.py; float64, which is for tests, may spill).
# The interpreter has no clock to tune by.
_TILES: Final = (
    (triton.Config({"BLOCK": 4096}),)
    if _INTERPRETED
    else (
        triton.Config({"BLOCK": 1024}, num_warps=4),
        triton.Config({"BLOCK": 1024}, num_warps=8),
        triton.Config({"BLOCK": 2048}, num_warps=8),
        triton.Config({"BLOCK": 2048}, num_warps=16),
        triton.Config({"BLOCK": 4096}, num_warps=16),
    )
)


def forward(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> RowStatistics:
    """See `contract.Kernels`.

    Raises:
        ValueError: tensors on the CPU, where Triton has nothing to compile for.
    """
    _require_gpu(draft_logits)
    z, y = _with_dense_rows(draft_logits), _with_dense_rows(target_logits)
    statistics = RowStatistics.zeros(rows)
    with torch.cuda.device_of(z):
        _forward_kernel[(len(rows.mask),)](
            z,
            y,
            row_offsets(z),
            row_offsets(y),
            rows.log_normalizer,
            rows.mask,
            statistics,
            z.shape[-1],
            ALIGNMENT=_alignment(z, y),
            REVERSE_KL=rows.reverse_kl,
        )
    counted = rows.mask & (statistics.target_log_sum != -torch.inf)
    argmax = torch.where(counted, draft_logits.argmax(-1).flatten(), 0)
    return statistics._replace(draft_argmax=argmax)


def backward(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rows: RowInputs,
    statistics: RowStatistics,
    gradients: RowGradients,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `contract.Kernels`."""
    _require_gpu(draft_logits)
    z, y = _with_dense_rows(draft_logits), _with_dense_rows(target_logits)
    if out is None:
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    with torch.cuda.device_of(z):
        _backward_kernel[(len(rows.mask),)](
            z,
            y,
            out,
            row_offsets(z),
            row_offsets(y),
            rows.log_normalizer,
            rows.mask,
            rows.tokens,
            statistics,
            gradients,
            z.shape[-1],
            ALIGNMENT=_alignment(z, y),
        )
    return out


def _require_gpu(logits: torch.Tensor) -> None:
    if logits.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "impl='triton' needs tensors on a GPU; on a CPU use overlap_terms(..., "
            "impl='closed_form'), or impl='auto' for the fastest that can run"
        )


def _with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _alignment(*logits: torch.Tensor) -> int:
    """Return the power of two up to 16 that divides every row's offset.

    Offsets are loaded from memory, so the compiler cannot know it by itself, and without it reads
    logits one by one.
    """
    return math.gcd(16, *(stride for t in logits for stride in t.stride()[:-1]))


@triton.autotune(_TILES, key=["vocabulary"])
@triton.jit
def _forward_kernel(
    z_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_offsets_ptr: tl.tensor,
    y_offsets_ptr: tl.tensor,
    log_normalizer_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    s: RowStatistics,
    vocabulary: int,
    ALIGNMENT: tl.constexpr,
    REVERSE_KL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if not tl.load(mask_ptr + row):
        return
    z_ptr += tl.multiple_of(tl.load(z_offsets_ptr + row), ALIGNMENT)
    y_ptr += tl.multiple_of(tl.load(y_offsets_ptr + row), ALIGNMENT)
    log_z = tl.load(log_normalizer_ptr + row)
    floor = tl.full((), _FLOOR, log_z.dtype)
    nothing = tl.full((BLOCK,), 0, log_z.dtype)

    draft_shift = tl.full((), _NEGATIVE_INFINITY, log_z.dtype)
    total = nothing
    for start in range(0, vocabulary, BLOCK):
        z = _read(z_ptr, start + tl.arange(0, BLOCK), vocabulary, floor)
        z_exp, draft_shift, shrink = _exp_online(z, draft_shift)
        total = total * shrink + z_exp
    draft_log_sum = tl.log(tl.sum(total, 0))

    target_max = tl.full((), _NEGATIVE_INFINITY, log_z.dtype)
    overlap_max = target_max
    total = nothing
    kl = nothing
    overlap = nothing
    below = nothing
    reverse_kl = nothing
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _read(z_ptr, columns, vocabulary, floor)
        y = _read(y_ptr, columns, vocabulary, floor)
        log_q, log_ratio, w = _compare(z, y, log_z, draft_shift, draft_log_sum)

        y_exp, target_max, shrink = _exp_online(y, target_max)
        total = total * shrink + y_exp
        kl = kl * shrink + y_exp * log_ratio

        log_overlap = log_q + _at_most_0(log_ratio)
        overlap_exp, overlap_max, shrink = _exp_online(log_overlap, overlap_max)
        overlap = overlap * shrink + overlap_exp
        below = below * shrink + overlap_exp * w  # wherever w > 0 the overlap is q

        if REVERSE_KL:
            reverse_kl -= tl.exp(log_q) * log_ratio

    # Without a single target logit above the floor, the maximum is as good as -inf.
    target_max = tl.where(target_max > floor, target_max, _NEGATIVE_INFINITY)
    coverage = tl.sum(total, 0)
    target_log_sum = (target_max - log_z) + tl.log(coverage)
    covered = target_log_sum != _NEGATIVE_INFINITY  # true for nan, which must show
    overlap_sum = tl.sum(overlap, 0)
    log_alpha = overlap_max + tl.log(overlap_sum)

    tl.store(s.kl + row, tl.where(covered, tl.sum(kl, 0) / coverage - target_log_sum, 0.0))
    tl.store(s.alpha + row, tl.where(covered, tl.exp(log_alpha), 0.0))
    tl.store(s.log_alpha + row, tl.where(covered, log_alpha, 0.0))
    if REVERSE_KL:
        tl.store(s.reverse_kl + row, tl.where(covered, tl.sum(reverse_kl, 0), 0.0))
    tl.store(s.draft_shift + row, draft_shift)
    tl.store(s.draft_log_sum + row, draft_log_sum)
    tl.store(s.target_log_sum + row, target_log_sum)
    tl.store(s.below + row, tl.where(covered, tl.sum(below, 0) / overlap_sum, 0.0))


# The gradient may replace the draft logits: while it tunes, the autotuner must put them back.
@triton.autotune(_TILES, key=["vocabulary"], restore_value=["grad_ptr"])
@triton.jit
def _backward_kernel(
    z_ptr: tl.tensor,
    y_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    z_offsets_ptr: tl.tensor,
    y_offsets_ptr: tl.tensor,
    log_normalizer_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    tokens_ptr: tl.tensor | None,
    s: RowStatistics,
    gradients: RowGradients,
    vocabulary: int,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * vocabulary
    if not tl.load(mask_ptr + row):
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(grad_ptr + columns, tl.full((BLOCK,), 0.0, tl.float32), columns < vocabulary)
        return
    z_ptr += tl.multiple_of(tl.load(z_offsets_ptr + row), ALIGNMENT)
    y_ptr += tl.multiple_of(tl.load(y_offsets_ptr + row), ALIGNMENT)
    log_z = tl.load(log_normalizer_ptr + row)
    floor = tl.full((), _FLOOR, log_z.dtype)
    draft_shift = tl.load(s.draft_shift + row)
    draft_log_sum = tl.load(s.draft_log_sum + row)
    target_log_normalizer = log_z + tl.load(s.target_log_sum + row)
    log_alpha = tl.load(s.log_alpha + row)
    below = tl.load(s.below + row)
    reverse_kl = tl.load(s.reverse_kl + row)
    g_kl = 0.0 if gradients.kl is None else tl.load(gradients.kl + row)
    g_log_alpha = 0.0 if gradients.log_alpha is None else tl.load(gradients.log_alpha + row)
    g_reverse = 0.0 if gradients.reverse_kl is None else tl.load(gradients.reverse_kl + row)
    g_log_q = 0.0 if gradients.log_q is None else tl.load(gradients.log_q + row)
    token = 0 if tokens_ptr is None else tl.load(tokens_ptr + row)

    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _read(z_ptr, columns, vocabulary, floor)
        y = _read(y_ptr, columns, vocabulary, floor)
        log_q, log_ratio, w = _compare(z, y, log_z, draft_shift, draft_log_sum)
        q = tl.exp(log_q)
        p_renormalized = tl.exp(y - target_log_normalizer)
        # q / alpha in the log domain: both may underflow. It is at most 1 wherever w > 0.
        share = tl.exp(_at_most_0(log_q - log_alpha)) * w
        grad = (
            g_kl * (q - p_renormalized)
            + g_log_alpha * (share - q * below)
            - g_reverse * (q * (log_ratio + reverse_kl))
        )
        if gradients.log_q is not None:
            grad += g_log_q * (tl.where(columns == token, 1.0, 0.0) - q)
        tl.store(grad_ptr + columns, grad, columns < vocabulary)


@triton.jit
def _read(row_ptr: tl.tensor, columns: tl.tensor, vocabulary: int, floor: tl.tensor) -> tl.tensor:
    """Return a tile of logits in the dtype of ``floor``, none below it.

    Beyond the vocabulary they are so low that even a row of nothing but floors gives them no
    probability.
    """
    x = tl.load(row_ptr + columns, columns < vocabulary, 0.0).to(floor.dtype)
    x = tl.where(x < floor, floor, x)  # tl.maximum would drop nan
    return tl.where(columns < vocabulary, x, 2 * floor)


@triton.jit
def _exp_online(x: tl.tensor, largest: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return exp(x - m) with m the maximum so far, m, and the factor that older sums need."""
    m = tl.maximum(largest, tl.max(x, 0))
    return tl.exp(x - m), m, tl.exp(largest - m)


@triton.jit
def _compare(
    z: tl.tensor, y: tl.tensor, log_z: tl.tensor, draft_shift: tl.tensor, draft_log_sum: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return log q, log(p / q) and w = 1[q < p] + 1/2 1[q = p]; see `contract.Kernels`.

    There is no product here that the compiler could contract in one kernel and not in the other.
    """
    log_ratio = (y - z) - ((log_z - draft_shift) - draft_log_sum)
    w = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio == 0, 0.5, 0.0))
    return (z - draft_shift) - draft_log_sum, log_ratio, w


@triton.jit
def _at_most_0(x: tl.tensor) -> tl.tensor:
    """Return min(x, 0), or nan where x is."""
    return tl.where(x > 0, 0.0, x)
