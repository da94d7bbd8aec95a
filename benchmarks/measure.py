"""Time, memory and the results file: what all sections of the benchmark share."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

import specforge_lk.overlap
from specforge_lk.files import write_text

Call = Callable[[], object]

#: Share of the machine's memory that a section may allocate.
MEMORY_SHARE: Final = 0.9
MINIMUM_REPEATS: Final = 3
MAXIMUM_REPEATS: Final = 15
#: Calls that take longer are timed once.
LONG_SECONDS: Final = 5.0


# ---------------------------------------------------------------------------------- time


def repeats_for(seconds: float, budget: float) -> int:
    """Return how often to time a call of ``seconds``, given ``budget`` seconds for it."""
    if seconds > LONG_SECONDS:
        return 1
    return max(MINIMUM_REPEATS, min(MAXIMUM_REPEATS, int(budget / max(seconds, 1e-9))))


def shuffled_rounds(wanted: Mapping[str, int]) -> Iterator[str]:
    """Yield names in turn, each as often as wanted.

    A round has a random order: what a call leaves behind, in caches and in the kernel's free
    memory, is not to meet the same other every time.
    """
    order = random.Random(0)
    for done in range(max(wanted.values(), default=0)):
        names = [name for name, repeats in wanted.items() if repeats > done]
        yield from order.sample(names, len(names))


def touch(size: int) -> None:
    """Write to ``size`` bytes of memory and free them.

    A virtual machine may return freed memory to its host within seconds. Getting it back takes
    longer than the operation, and is not what is measured: it is back before the clock starts.
    """
    torch.empty(size, dtype=torch.uint8).zero_()


def timed(call: Call) -> float:
    """Return the seconds of one call, during which Python collects no garbage."""
    gc.disable()
    try:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    finally:
        gc.enable()


def distribution(seconds: list[float]) -> dict[str, Any]:
    """Return raw times with their median and quartiles, as results files have them."""
    first, _, third = statistics.quantiles(
        seconds * 2 if len(seconds) == 1 else seconds, n=4, method="inclusive"
    )
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "quartiles": [first, third],
    }


# -------------------------------------------------------------------------------- memory


def peak_allocated(call: Call) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once during ``call``.

    Bytes given out before are not counted. Memory that C++ code takes for itself is not seen;
    `peak_resident` sees it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def peak_resident() -> Iterator[Callable[[], int]]:
    """Yield a function that gives the growth of the process in bytes, at its peak, so far."""
    gc.collect()
    # The C library keeps freed memory: without giving it back, a call's memory would not show.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield lambda: max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def total_memory() -> int:
    """Return the bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def limited_memory() -> Iterator[int]:
    """Let allocations beyond `MEMORY_SHARE` of the machine fail rather than end the process.

    Yields:
        The limit in bytes, for all that the process holds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(total_memory() * MEMORY_SHARE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def memory_limit() -> int:
    """Return the bytes that the process may hold."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return total_memory() if limit == resource.RLIM_INFINITY else limit


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch or Python could not allocate."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


# ------------------------------------------------------------------------------- results


def machine() -> dict[str, Any]:
    """Describe the machine as far as figures depend on it; no name of it is among the facts."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch_compile": compiles(),
        "huge_pages": _huge_pages(),
    }


def compiles() -> bool:
    """Return whether torch.compile is on; TORCHDYNAMO_DISABLE=1 turns it off."""
    return os.environ.get("TORCHDYNAMO_DISABLE", "0") == "0"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _huge_pages() -> str:
    """Return who gets them: everybody ("always"), who asks ("madvise") or nobody ("never")."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else "never"


def _caches() -> dict[str, int]:
    """Return the bytes of the first core's data caches by level, such as {"L2": 524288}."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in _CACHE_FILES)
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return sizes


_CACHE_FILES: Final = ("level", "type", "size")


class Results:
    """Results of one section, on disk after every cell.

    A rerun continues with what is there if machine and code are the same.

    Args:
        path: the JSON file.
        sources: modules of this repository, by their dotted names, that the section's figures
            depend on, besides the overlap operation, the losses and this module.
        fresh: discard what is there.
        notes: further facts for the top of the file.
    """

    def __init__(self, path: Path, *sources: str, fresh: bool, **notes: Any) -> None:
        self.path = path
        # As it will be read back, so that both compare.
        self._head = json.loads(
            json.dumps({"machine": machine(), "sources": _digest(sources), **notes})
        )
        self.cells: list[dict[str, Any]] = []
        if path.exists() and not fresh:
            found = json.loads(path.read_text())
            if {name: found.get(name) for name in self._head} == self._head:
                self.cells = found["cells"]

    def has(self, cell: Mapping[str, Any]) -> bool:
        return any(known["cell"] == cell for known in self.cells)

    def add(self, cell: Mapping[str, Any], **measured: Any) -> None:
        self.cells.append({"cell": cell, **measured})
        write_json(self.path, {**self._head, "cells": self.cells})


def write_json(path: Path, value: object) -> None:
    """Write all of a JSON file or nothing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _digest(modules: tuple[str, ...]) -> str:
    package = Path(specforge_lk.overlap.__file__).parent
    root = Path(__file__).parent.parent
    sources = [*sorted(package.glob("*.py")), *sorted(package.glob("*.cpp"))]
    sources += [*sorted((package.parent / "losses").glob("*.py")), Path(__file__)]
    sources += [root.joinpath(*module.split(".")).with_suffix(".py") for module in modules]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
