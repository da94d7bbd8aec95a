"""Walking over the rows of logits in chunks that stay in cache, without copying the whole."""

from collections.abc import Iterator
from typing import Final

import torch

# One chunk's [rows, V_d] temporary in bytes. On a CPU it should fit L2 (and its siblings L3);
# a GPU has launches to amortize instead, and wants few chunks.
_CPU_CHUNK_BYTES: Final = 1 << 20
_DEVICE_CHUNK_BYTES: Final = 1 << 26

Index = slice | torch.Tensor


def row_chunks(
    mask: torch.Tensor, dtype: torch.dtype, *logits: torch.Tensor
) -> Iterator[tuple[Index, tuple[torch.Tensor, ...]]]:
    """Yield the rows in the mask in chunks: where they are, and each logits tensor's part.

    Args:
        mask: [...] bool; rows where it is False are left out.
        dtype: what the caller computes in; sets the number of rows to a chunk.
        logits: tensors [..., V] of one shape and any strides.

    Yields:
        rows: slice or int64 indices into the flattened [N] positions.
        parts: one [n, V] tensor per logits tensor, a view or a copy: not to be written to.
    """
    vocabulary = logits[0].shape[-1]
    budget = _CPU_CHUNK_BYTES if mask.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    size = max(1, budget // max(1, vocabulary * dtype.itemsize))
    mask = mask.flatten()
    everything = bool(mask.all())
    for start, matrices in _matrices(0, *logits):
        stop = start + len(matrices[0])
        if everything:
            for first in range(start, stop, size):
                rows = slice(first, min(first + size, stop))
                yield rows, tuple(m[first - start : rows.stop - start] for m in matrices)
        else:
            for index in mask[start:stop].nonzero().squeeze(1).split(size):
                yield index + start, tuple(m.index_select(0, index) for m in matrices)


def _matrices(start: int, *logits: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """View the tensors as [n, V] matrices: one each, or more where strides forbid (a slice of a
    padded [B, T, V], as the steps of EAGLE-3's training-time test have it)."""
    try:
        yield start, tuple(t.view(-1, t.shape[-1]) for t in logits)
    except RuntimeError:
        for parts in zip(*logits, strict=True):
            yield from _matrices(start, *parts)
            start += parts[0].shape[:-1].numel()


def log_coverage_of(
    target_logits: torch.Tensor, log_normalizer: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the log of the target's mass on the draft vocabulary, logsumexp(y) - log Z, [...].

    It is 0 where the mask is False. Arguments are those of `overlap_terms`, with a mask of bool;
    the dtype is ``log_normalizer``'s.
    """
    result = torch.zeros_like(log_normalizer, memory_format=torch.contiguous_format)
    flat, log_z = result.view(-1), log_normalizer.flatten()
    for rows, (y,) in row_chunks(mask, result.dtype, target_logits):
        flat[rows] = y.to(result.dtype).logsumexp(-1) - log_z[rows]
    return result


def row_offsets(logits: torch.Tensor) -> torch.Tensor:
    """Return the offset of every row of logits [..., V] from their first element: int64 [N].

    Offsets count elements. The leading dimensions may have any strides, so kernels need no copy
    of a slice.
    """
    offsets = torch.zeros((), dtype=torch.int64, device=logits.device)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        steps = torch.arange(size, device=logits.device) * stride
        offsets = offsets[..., None] + steps
    return offsets.reshape(-1)
