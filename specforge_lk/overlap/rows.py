"""Walking over the rows of logits in chunks that stay in cache, without copying the whole."""

from collections.abc import Iterator
from typing import Final

import torch

from specforge_lk.overlap.contract import RowInputs

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
    size = rows_at_a_time(mask.device, logits[0].shape[-1], dtype)
    mask = mask.flatten()
    everything = bool(mask.all())
    for start, parts in matrices(0, *logits):
        stop = start + len(parts[0])
        if everything:
            for first in range(start, stop, size):
                rows = slice(first, min(first + size, stop))
                yield rows, tuple(m[first - start : rows.stop - start] for m in parts)
        else:
            for index in mask[start:stop].nonzero().squeeze(1).split(size):
                yield index + start, tuple(m.index_select(0, index) for m in parts)


def rows_at_a_time(device: torch.device, vocabulary: int, dtype: torch.dtype) -> int:
    """Return how many rows of logits make a chunk, at least one."""
    budget = _CPU_CHUNK_BYTES if device.type == "cpu" else _DEVICE_CHUNK_BYTES
    return max(1, budget // max(1, vocabulary * dtype.itemsize))


def matrices(start: int, *logits: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """View the tensors as [n, V] matrices: one each, or more where strides forbid (a slice of a
    padded [B, T, V], as the steps of EAGLE-3's training-time test have it)."""
    try:
        yield start, tuple(t.view(-1, t.shape[-1]) for t in logits)
    except RuntimeError:
        for parts in zip(*logits, strict=True):
            yield from matrices(start, *parts)
            start += parts[0].shape[:-1].numel()


def normalized(target_logits: torch.Tensor, rows: RowInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log Z and the log coverage of the rows, [...], given or computed; 0 where skipped.

    Args:
        target_logits: [..., V_d].
        rows: vectors [...], or flat.
    """
    if rows.log_normalizer is not None and rows.log_coverage is not None:
        return rows.log_normalizer, rows.log_coverage
    log_mass = torch.zeros(rows.mask.shape, dtype=rows.dtype, device=rows.mask.device)
    for at, (y,) in row_chunks(rows.mask, rows.dtype, target_logits):
        log_mass.view(-1)[at] = y.to(rows.dtype).logsumexp(-1)
    if rows.log_normalizer is not None:
        difference = log_mass - torch.where(rows.mask, rows.log_normalizer, 0.0)
        return rows.log_normalizer, difference
    # A full vocabulary has coverage 1, if there is a target at all; nan must show.
    return log_mass, torch.where(log_mass == -torch.inf, log_mass, log_mass * 0)


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
