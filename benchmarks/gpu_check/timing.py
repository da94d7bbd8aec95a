"""Time and memory of a step on a GPU; on a CPU, where it rehearses, both mean nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Final

import torch

Step = Callable[[], object]
#: Milliseconds that a step is repeated for.
REPEATED_MS: Final = 100.0


def milliseconds(step: Step, device: str, repeated: float = REPEATED_MS) -> list[float]:
    """Return lower quartile, median and upper quartile of a step's time.

    Between repeats a cache as large as the card's is overwritten. What a step builds once, kernels
    among it, is built before.
    """
    if device == "cpu":
        began = time.perf_counter()
        step()
        return [1e3 * (time.perf_counter() - began)] * 3
    from triton.testing import do_bench

    step()
    found = do_bench(step, warmup=10, rep=int(repeated), quantiles=[0.25, 0.5, 0.75])
    return [float(f"{value:.5g}") for value in found]


def peak_mib(step: Step, device: str) -> float | None:
    """Return the MiB that a step allocates at most beyond what is there; None on a CPU."""
    if device == "cpu":
        return None
    tidy(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def tidy(device: str) -> None:
    """Free what nothing refers to, and give the allocator's memory back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def gigabytes_per_second(size: int, ms: float) -> float:
    """Return 10^9 bytes per second."""
    return size / ms / 1e6
