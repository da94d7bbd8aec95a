"""The operation on logits: time and memory of losses and baselines over sizes."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from rich.console import Console

from benchmarks.baselines import Implementation, check, implementations
from benchmarks.inputs import Inputs
from benchmarks.measure import (
    LONG_SECONDS,
    Results,
    distribution,
    is_out_of_memory,
    limited_memory,
    memory_limit,
    peak_allocated,
    peak_resident,
    repeats_for,
    shuffled_rounds,
    timed,
    touch,
)
from specforge_lk.cli.progress import each
from tools.wheels import SPECFORGE

T = TypeVar("T")

TOKENS: Final = (256, 1024, 4096, 8192)
VOCABULARIES: Final = (4096, 32000, 131072)
DTYPES: Final = ("float32", "bfloat16")
SUPERVISED: Final = (1.0, 0.5, 0.1)
SOURCES: Final = (
    *("benchmarks.baselines", "benchmarks.inputs", "benchmarks.operation"),
    "tools.wheels",
)
#: The N at which everything is measured, by more repeats. At others, baselines are measured with
#: all positions supervised, and only those that the criteria name.
MAIN_TOKENS: Final = 1024
MAIN_BUDGET: Final = 4


@dataclass(frozen=True)
class Cell:
    """A size: N positions, V_d tokens, dtype of the logits, share of supervised positions."""

    tokens: int
    vocabulary: int
    dtype: str
    supervised: float

    def __str__(self) -> str:
        share = f"{100 * self.supervised:g} % supervised"
        return f"{self.tokens} x {self.vocabulary} {self.dtype}, {share}"


#: Cells of one shape and dtype follow each other, and share their tensors. Small ones first.
GRID: Final = tuple(
    Cell(tokens, vocabulary, dtype, supervised)
    for tokens in TOKENS
    for vocabulary in VOCABULARIES
    for dtype in DTYPES
    for supervised in SUPERVISED
)
QUICK: Final = (Cell(64, 4096, "float32", 1.0), Cell(64, 4096, "bfloat16", 0.5))


class DoesNotFit(Exception):
    """An implementation needs more memory than it may have, even alone."""


def run(
    path: Path, grid: tuple[Cell, ...], *, budget: float, fresh: bool, console: Console
) -> None:
    """Measure the cells that ``path`` does not hold yet.

    Args:
        path: results file.
        grid: cells; neighbors of one shape and dtype share their tensors.
        budget: seconds of timing per implementation and cell, which set the repeats.
        fresh: start over.
        console: for progress.
    """
    known = implementations()
    errors = check(known)
    console.print(
        f"{len(errors)} gradients equal their float64 definitions; "
        f"largest relative error {max(errors.values()):.1e}"
    )
    with limited_memory() as limit:
        results = Results(
            path,
            *SOURCES,
            fresh=fresh,
            memory_limit=limit,
            minimum_budget_seconds=budget,
            specforge=SPECFORGE,
        )
        waiting = [cell for cell in grid if not results.has(asdict(cell))]
        previous = inputs = None
        for cell in each("operation", waiting, console):
            shape = cell.tokens, cell.vocabulary, cell.dtype
            if inputs is None or shape != previous:
                # The old tensors go before the new ones come.
                previous, inputs = shape, None
                inputs = Inputs(*shape[:2], getattr(torch, cell.dtype), cell.supervised)
            else:
                inputs.supervise(cell.supervised)
            chosen = {
                name: implementation
                for name, implementation in known.items()
                if _measured_at(cell, name, implementation)
            }
            seconds = budget * (MAIN_BUDGET if cell.tokens == MAIN_TOKENS else 1)
            results.add(asdict(cell), implementations=_measure(inputs, chosen, seconds))


def _measured_at(cell: Cell, name: str, implementation: Implementation) -> bool:
    if name.startswith(("ours", "floor")):
        return True
    # Baselines do the same work whatever is supervised.
    if implementation.everywhere:
        return cell.supervised == 1 or cell.tokens == MAIN_TOKENS
    return cell.supervised == 1 and cell.tokens == MAIN_TOKENS


def _measure(
    inputs: Inputs, chosen: Mapping[str, Implementation], budget: float
) -> dict[str, dict[str, Any]]:
    """Return every implementation's times and memory, or why it has none."""
    found: dict[str, dict[str, Any]] = {}
    remaining = dict(chosen)

    def attempt(name: str, measurement: Callable[[Inputs, Implementation], T]) -> T | None:
        try:
            return _with_room(inputs, remaining[name], measurement)
        except DoesNotFit as error:
            del remaining[name]
            found[name] = {"does_not_fit": str(error)}
            return None

    for name in list(remaining):
        record = attempt(name, _first_calls)
        if record is not None:
            found[name] = record
    wanted = {name: repeats_for(found[name]["first_seconds"], budget) for name in remaining}
    seconds: dict[str, list[float]] = {name: [] for name in remaining}
    for name in shuffled_rounds(wanted):
        if name in remaining:
            taken = attempt(name, partial(_time, size=found[name]["memory"]["allocated"]))
            if taken is not None:
                seconds[name].append(taken)
    for name in remaining:
        found[name] |= distribution(seconds[name])
    return found


def _with_room(
    inputs: Inputs,
    implementation: Implementation,
    measurement: Callable[[Inputs, Implementation], T],
) -> T:
    """Measure; where memory does not suffice, once more without the others' tensors.

    Raises:
        DoesNotFit: it does not suffice either.
    """
    reason = ""
    for only in (False, True):
        try:
            inputs.hold(implementation.reads, only=only)
            return measurement(inputs, implementation)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        gc.collect()
    wanted = re.search(r"\d+(?= bytes)", reason)
    of = f" of {int(wanted[0]) / 2**20:.0f} MiB" if wanted else ""
    raise DoesNotFit(f"does not fit in {memory_limit() / 2**30:.1f} GiB: an allocation{of} failed")


def _first_calls(inputs: Inputs, implementation: Implementation) -> dict[str, Any]:
    """Measure what is measured once: compilation, and peak memory beyond inputs."""
    record = {}
    if implementation.compiled:
        # A kernel for this very shape, rather than one for any: what suits torch.compile best.
        torch._dynamo.reset()
        record["compile_seconds"] = _time(inputs, implementation)
    inputs.release()
    with peak_resident() as grown:
        begun = time.perf_counter()
        allocated = peak_allocated(lambda: implementation.step(inputs))
        taken = time.perf_counter() - begun
        resident = grown()
    gradient = 0 if inputs.z.grad is None else inputs.z.grad.nbytes
    if taken < LONG_SECONDS:
        # Once more without the profiler's own memory, which is small beside that of long calls.
        # The first of all calls also pays for what the others find done.
        inputs.release()
        with peak_resident() as grown:
            taken = min(taken, timed(lambda: implementation.step(inputs)))
            resident = grown()
    memory = {"allocated": allocated, "resident": resident, "gradient": gradient}
    return record | {"first_seconds": taken, "memory": memory}


def _time(inputs: Inputs, implementation: Implementation, *, size: int = 0) -> float:
    """Return the seconds of one call, which needs ``size`` bytes beyond inputs."""
    inputs.release()
    touch(size)
    return timed(lambda: implementation.step(inputs))
