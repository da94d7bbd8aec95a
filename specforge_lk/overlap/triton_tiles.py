"""What the Triton kernels have in common: rows of any strides, tiles, sums that cannot overflow.

A tile is [BLOCK / EACH, EACH]: a thread holds EACH logits of it, and running maxima and sums are
one per thread. So no thread waits for another inside a loop over the vocabulary; after it,
`tl.reduce` merges the threads' sums once, by the rule that joins one tile to the next.
"""

import math
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from specforge_lk.overlap.contract import LOGIT_FLOOR
from specforge_lk.overlap.rows import row_offsets

_INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
FLOOR: Final = tl.constexpr(LOGIT_FLOOR)
NEGATIVE_INFINITY: Final = tl.constexpr(float("-inf"))
LOG2_E: Final = tl.constexpr(math.log2(math.e))


class Layout(NamedTuple):
    """Where the rows of logits are, as arguments of a kernel; see `start_of`.

    Attributes:
        lookup: int64 [N], which row position n is, counted in inner strides; None where it is
            where the grid says.
        outer_stride, inner_stride: of the two dimensions of the grid, in elements.
    """

    lookup: torch.Tensor | None
    outer_stride: int
    inner_stride: int


#: How many programs CUDA launches along the second dimension of a grid.
_MOST_OUTER: Final = 65_535


def grid_of(*logits: torch.Tensor) -> tuple[tuple[int, int], list[Layout]]:
    """Return the grid that has one program to a row, and where each tensor's rows are.

    Nothing is copied. Leading dimensions that lie in memory as one in every tensor are taken as
    one. Should more than two be left, every row's offset is looked up.

    Args:
        logits: tensors [..., V] of one shape and any strides.
    """
    shape, strides = logits[0].shape[:-1], [t.stride()[:-1] for t in logits]
    sizes: list[int] = []  # of what is left, the innermost first
    kept: list[tuple[int, ...]] = []
    for size, *of_all in reversed(list(zip(shape, *strides, strict=True))):
        if sizes and all(s == sizes[-1] * k for s, k in zip(of_all, kept[-1], strict=True)):
            sizes[-1] *= size
        elif size != 1:
            sizes.append(size)
            kept.append(tuple(of_all))
    if len(sizes) > 2 or (len(sizes) == 2 and sizes[1] > _MOST_OUTER):
        units = [math.gcd(*of_one) or 1 for of_one in zip(*kept, strict=True)]
        layouts = [Layout(row_offsets(t) // u, 0, u) for t, u in zip(logits, units, strict=True)]
        return (shape.numel(), 1), layouts
    inner, outer = (*sizes, 1, 1)[:2]
    nothing = (0,) * len(logits)
    inner_strides, outer_strides = (*kept, nothing, nothing)[:2]
    layouts = [Layout(None, o, i) for o, i in zip(outer_strides, inner_strides, strict=True)]
    return (inner, outer), layouts


def alignment(vocabulary: int, *layouts: Layout) -> int:
    """Return the power of two up to 16 that divides every row's offset.

    The compiler cannot know it by itself, and without it reads logits one by one.
    """
    return math.gcd(16, vocabulary, *(s for rows in layouts for s in rows[1:]))


def with_dense_rows(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits, or a copy of which the vocabulary is contiguous."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def tile(logits: torch.Tensor, block: int, warps: int) -> dict[str, int]:
    """Return a tile and the warps that it takes, as options of a launch.

    The sizes that kernels ask for are the ones that took an H100 least time, or nearly so, with
    every dtype, of those that benchmarks/results/gpu/h100-exploration.jsonl has in its section C. A
    thread holds the 16 bytes of neighboring logits that it reads, and writes, at once. What is
    interpreted takes as long for any tile: a small one gives small vocabularies more than one.
    """
    block = 256 if _INTERPRETED else block
    return {"BLOCK": block, "EACH": 16 // logits.element_size(), "num_warps": warps}


def require_gpu(logits: torch.Tensor, function: str, instead: str) -> None:
    """Raise ValueError for tensors on a CPU, unless kernels are interpreted."""
    if logits.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            f"impl='triton' needs tensors on a GPU; on a CPU use {function}(..., "
            f"impl={instead!r}), or impl='auto' for the fastest that can run"
        )


@triton.jit
def row_of() -> tl.tensor:
    """Return the number of the program's row."""
    return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def start_of(
    ptr: tl.tensor,
    lookup_ptr: tl.tensor | None,
    outer_stride: int,
    inner_stride: int,
    ALIGNMENT: tl.constexpr,
) -> tl.tensor:
    """Return where the first logit of the program's row is, by the `Layout`."""
    if lookup_ptr is None:
        outer, inner = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
        offset = outer * outer_stride + inner * inner_stride
    else:
        offset = tl.load(lookup_ptr + row_of()) * inner_stride
    return ptr + tl.multiple_of(offset, ALIGNMENT)


@triton.jit
def columns_of(BLOCK: tl.constexpr, EACH: tl.constexpr, ALIGNMENT: tl.constexpr) -> tl.tensor:
    """Return the tile of columns 0 to BLOCK, [BLOCK / EACH, EACH]: a thread's are those of a row.

    They are neighbors, which are read at once. Where rows begin anywhere, as with a vocabulary of
    odd size, logits are read one by one, and it is the threads of a warp that have neighbors.
    """
    threads, each = tl.arange(0, BLOCK // EACH)[:, None], tl.arange(0, EACH)[None, :]
    if ALIGNMENT % EACH == 0:
        return threads * EACH + each
    else:
        return threads + each * (BLOCK // EACH)


@triton.jit
def read(
    row_ptr: tl.tensor,
    columns: tl.tensor,
    vocabulary: int,
    floor: tl.tensor,
    LAST: tl.constexpr,
    HINT: tl.constexpr,
) -> tl.tensor:
    """Return a tile of logits in the dtype of ``floor``, none below it.

    Only the LAST tile may go beyond the vocabulary. What it has there is so low that even a row of
    nothing but floors gives it no probability.
    """
    if LAST:
        inside = columns < vocabulary
        x = tl.load(row_ptr + columns, inside, 0.0, eviction_policy=HINT).to(floor.dtype)
        x = tl.where(x < floor, floor, x)  # tl.maximum would drop nan
        return tl.where(inside, x, 2 * floor)
    else:
        x = tl.load(row_ptr + columns, eviction_policy=HINT).to(floor.dtype)
        return tl.where(x < floor, floor, x)


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """Return e^x. A GPU has an instruction for powers of 2; of e, it takes five."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def exp_online(x: tl.tensor, largest: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return exp(x - m) with m each thread's maximum so far, m, and the factor of older sums."""
    m = tl.maximum(largest, tl.max(x, 1))
    return exp(x - m[:, None]), m, exp(largest - m)


@triton.jit
def sum_row(
    row_ptr: tl.tensor,
    columns: tl.tensor,
    vocabulary: int,
    floor: tl.tensor,
    BLOCK: tl.constexpr,
    HINT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the row's maximum m, sum exp(x - m), and where the first tile with that maximum is."""
    whole = vocabulary // BLOCK * BLOCK
    m = tl.full((columns.shape[0],), NEGATIVE_INFINITY, floor.dtype)
    total = tl.full((columns.shape[0],), 0, floor.dtype)
    first = tl.full((columns.shape[0],), 0, tl.int32)
    for start in range(0, whole, BLOCK):
        x = read(row_ptr, start + columns, vocabulary, floor, False, HINT)
        m, total, first = _add(x, start, m, total, first)
    if whole < vocabulary:
        x = read(row_ptr, whole + columns, vocabulary, floor, True, HINT)
        m, total, first = _add(x, whole, m, total, first)
    return tl.reduce((m, total, first), 0, _merge)


@triton.jit
def index_of(
    value: tl.tensor, row_ptr: tl.tensor, columns: tl.tensor, vocabulary: int, floor: tl.tensor
) -> tl.tensor:
    """Return the first column whose logit is ``value``, int64: the last one where there is none."""
    x = read(row_ptr, columns, vocabulary, floor, True, "evict_first")
    found = tl.where(x == value, columns, vocabulary - 1)
    return tl.min(tl.min(found, 1), 0).to(tl.int64)


@triton.jit
def _add(
    x: tl.tensor, start: int, m: tl.tensor, total: tl.tensor, first: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile to what `sum_row` returns, of each thread."""
    x_exp, top, shrink = exp_online(x, m)
    return top, total * shrink + tl.sum(x_exp, 1), tl.where(top > m, start, first)


@triton.jit
def _merge(
    m: tl.tensor,
    total: tl.tensor,
    first: tl.tensor,
    other_m: tl.tensor,
    other_total: tl.tensor,
    other_first: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Join what `_add` keeps of two threads."""
    top = tl.maximum(m, other_m)
    total = total * exp(m - top) + other_total * exp(other_m - top)
    earlier = tl.minimum(first, other_first)
    first = tl.where(m > other_m, first, tl.where(m < other_m, other_first, earlier))
    return top, total, first
