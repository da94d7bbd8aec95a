"""The criteria that the benchmark judges by, each with its bound and what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import accuracy, linear, operation
from benchmarks.measured import Measured, Record, Section, allocated, fits, median, ratios, resident

#: Where the criteria of the operation are judged; worst cells are reported beside it.
HEADLINE: Final = operation.Cell(1024, 32000, "float32", 1.0)
LINEAR_HEADLINE: Final = linear.Cell(8192, 32000)
LOSSES: Final = ("kl", "lk_alpha", "lk_lambda")
ITEM_SIZE: Final = {"float32": 4, "bfloat16": 2}
#: Cells of more logits are far longer than a call takes to begin.
LARGE: Final = 10**7
#: Last-level cache where the machine does not say.
CACHE_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Criterion:
    """One line of the summary: a bound, and what was measured.

    Attributes:
        name: what is measured.
        bound: largest value that meets the criterion; None where there is none to meet.
        measured: the value at ``cell``; None if that was not measured.
        met: whether it is within the bound.
        cell: where it comes from.
        median, worst, worst_cell: the median and the largest value of all cells.
        cells, cells_met: how many cells have a value, and how many of those are in the bound.
        note: what a reader must know.
    """

    name: str
    bound: float | None
    measured: float | None
    met: bool | None
    cell: str
    median: float | None = None
    worst: float | None = None
    worst_cell: str = ""
    cells: int = 0
    cells_met: int | None = None
    note: str = ""


def all_criteria(measured: Measured) -> list[Criterion]:
    """Return every criterion of the benchmark, measured or not."""
    return [
        *_operation_criteria(measured),
        *_linear_criteria(measured.linear),
        *_training_criteria(measured.training),
        *_scaling_criteria(measured),
        *_accuracy_criteria(measured.accuracy),
    ]


def _operation_criteria(measured: Measured) -> Iterable[Criterion]:
    cells = measured.operation

    def criterion(
        name: str,
        bound: float | None,
        over: str,
        under: str,
        value: Callable[[Record], float],
        note: str = "",
    ) -> Criterion:
        return _judged(name, bound, ratios(cells, over, under, value), HEADLINE, note)

    for loss in ("lk_alpha", "lk_lambda"):
        pair = f"ours {loss}", "ours kl"
        yield criterion(f"{loss} over kl, time", 1.05, *pair, median)
        yield criterion(f"{loss} over kl, memory", 1.02, *pair, allocated)
        yield criterion(f"{loss} over kl, memory by RSS", 1.02, *pair, resident)
        values = ratios(cells, *pair, median)
        name = f"{loss} over kl, time"
        yield _of_cells(f"{name}, in half of the cells", 1.05, values, 0.5)
        name += ", in nine cells of ten"
        yield _of_cells(name, 1.1, _large(values), 0.9, LARGE_NOTE)
    ours = "ours lk_lambda"
    inductor = "SpecForge's formula through torch.compile, compilation not counted"
    for other, bound, note in (
        ("specforge kl", 0.8, ""),
        ("specforge kl, inductor", 0.5, inductor),
        ("specforge lk_lambda", 0.2, ""),
        ("specforge lk_lambda, inductor", 0.2, f"KL: {inductor}; acceptance eager"),
        ("speculators lk_hybrid", 0.25, ""),
    ):
        yield criterion(f"lk_lambda over {other}, time", bound, ours, other, median, note)
        yield criterion(f"lk_lambda over {other}, memory", None, ours, other, allocated)
    yield criterion("lk_lambda over cross-entropy, time", None, ours, "cross-entropy", median)
    yield criterion("lk_lambda over floor, time", None, ours, "floor", median)
    values = _large(ratios(cells, ours, "floor", median))
    for ending, bound in (("", 2.5), (" (moonshot)", 1.6)):
        name = f"lk_lambda over floor, time, in half of the cells{ending}"
        yield _of_cells(name, bound, values, 0.5, LARGE_NOTE)
    yield criterion(
        "lk_lambda over floor with a new gradient, time",
        None,
        ours,
        "floor, new gradient",
        median,
        "the gradient is allocated anew each time, as autograd does it",
    )
    for name, measure in (("allocator", allocated), ("RSS", resident)):
        values = {
            cell: max(
                (measure(found[f"ours {loss}"]) - found[f"ours {loss}"]["memory"]["gradient"])
                / (cell.tokens * cell.vocabulary * ITEM_SIZE[cell.dtype])
                for loss in LOSSES
            )
            for cell, found in cells.items()
            if all(fits(found, f"ours {loss}") for loss in LOSSES)
        }
        yield _judged(
            f"memory beyond gradient over one [N, V_d] tensor, {name}",
            0.01,
            values,
            HEADLINE,
        )


def _linear_criteria(cells: Section) -> Iterable[Criterion]:
    def criterion(
        name: str,
        bound: float | None,
        over: str,
        under: str,
        value: Callable[[Record], float],
        note: str = "",
    ) -> Criterion:
        values = ratios(cells, over, under, value)
        return _judged(f"linear_overlap: {name}", bound, values, LINEAR_HEADLINE, note)

    for over, under, bound in (
        ("fused lk_lambda", "fused kl", None),
        ("fused lk_lambda", "unfused lk_lambda", None),
        ("fused kl", "unfused kl", None),
        ("fused with target head lk_lambda", "fused lk_lambda", None),
        ("fused, frozen head lk_lambda", "unfused, frozen head lk_lambda", 1.25),
    ):
        yield criterion(f"{over} over {under}, time", bound, over, under, median)
    for name in ("fused", "fused with target head"):
        for meaning, measure, without in (
            ("in all", allocated, 0),
            ("in all, RSS", resident, 0),
            ("without returned gradients", allocated, 1),
        ):
            values = {
                cell: max(
                    (measure(record) - without * record["memory"]["gradient"])
                    / (cell.tokens * cell.vocabulary * ITEM_SIZE["float32"])
                    for record in (found[f"{name} kl"], found[f"{name} lk_lambda"])
                )
                for cell, found in cells.items()
            }
            yield _judged(
                f"linear_overlap: {name}, memory over one [N, V_d] tensor, {meaning}",
                1 / 8,
                values,
                LINEAR_HEADLINE,
            )


def _training_criteria(cells: Section) -> Iterable[Criterion]:
    for name, bound, over, under in (
        ("lk_alpha over kl", 1.03, "patched lk_alpha", "patched kl"),
        ("lk_lambda over kl", 1.03, "patched lk_lambda", "patched kl"),
        ("tau over lk_lambda", 1.1, "patched tau", "patched lk_lambda"),
        ("kl over unpatched SpecForge's kl", None, "patched kl", "unpatched kl"),
        *(
            (f"{loss} over unpatched SpecForge's {loss}", None, f"patched {loss}", under)
            for loss, under in (
                ("lk_alpha", "unpatched lk_alpha"),
                ("lk_lambda", "unpatched lk_lambda"),
            )
        ),
    ):
        values = ratios(cells, over, under, median)
        for cell in values or [None]:
            yield _judged(f"EAGLE-3 training step, {cell}: {name}, time", bound, values, cell)


def _scaling_criteria(measured: Measured) -> Iterable[Criterion]:
    cache = max(measured.machine.get("caches", {}).values(), default=CACHE_BYTES)
    note = f"logits tensors larger than the last-level cache, {cache >> 20} MiB"
    for symbol, fixed in (("N", "vocabulary"), ("V_d", "tokens")):
        for dtype, size in ITEM_SIZE.items():
            large = {
                cell: found
                for cell, found in measured.operation.items()
                if (cell.dtype, cell.supervised) == (dtype, 1.0)
                and cell.tokens * cell.vocabulary * size > cache
            }
            for ending, bound, implementations in (
                ("", 1.15, [f"ours {loss}" for loss in LOSSES]),
                # What the machine's memory does by itself.
                (", of the floors", None, ["floor", "floor, new gradient"]),
            ):
                spreads: dict[str, float] = {}
                for implementation in implementations:
                    spreads |= _spreads(large, implementation, fixed)
                worst = max(spreads, key=spreads.__getitem__, default=None)
                name = f"time per element over {symbol}, largest over smallest, {dtype}{ending}"
                yield _judged(name, bound, spreads, worst, note)


def _spreads(cells: Section, implementation: str, fixed: str) -> dict[str, float]:
    """Return largest over smallest time per element of cells that share their ``fixed`` size."""
    groups: dict[int, list[float]] = {}
    for cell, found in cells.items():
        if fits(found, implementation):
            per_element = median(found[implementation]) / (cell.tokens * cell.vocabulary)
            groups.setdefault(getattr(cell, fixed), []).append(per_element)
    return {
        f"{implementation}, {fixed} {size}": max(times) / min(times)
        for size, times in groups.items()
        if len(times) > 1
    }


def _accuracy_criteria(cells: Mapping[accuracy.Cell, dict[str, float]]) -> Iterable[Criterion]:
    for dtype, bound, part, meaning in (
        ("float32", 2e-6, "total", "float32 logits"),
        ("bfloat16", 1e-2, "operation", "bfloat16 logits, of the operation"),
        ("bfloat16", 1e-2, "total", "bfloat16 logits, their rounding included"),
        ("bfloat16", None, "input_rounding", "bfloat16 logits, of the rounding of logits alone"),
        ("bfloat16", None, "arithmetic", "bfloat16 logits, of the arithmetic alone"),
    ):
        values = {c: errors[part] for c, errors in cells.items() if c.dtype == dtype}
        worst = max(values, key=values.__getitem__, default=None)
        yield _judged(f"relative gradient error, {meaning}", bound, values, worst)


#: Of what is judged at large cells alone.
LARGE_NOTE: Final = "cells of more than 10^7 logits"


def _large(values: Mapping[operation.Cell, float]) -> dict[operation.Cell, float]:
    return {c: value for c, value in values.items() if c.tokens * c.vocabulary > LARGE}


def _of_cells(
    name: str, bound: float, values: Mapping[Any, float], share: float, note: str = ""
) -> Criterion:
    """Judge the least value that a ``share`` of all cells keeps to, not that of one cell."""
    ordered = sorted(values, key=values.__getitem__)
    cell = ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
    return _judged(name, bound, values, cell, note)


def _judged(
    name: str,
    bound: float | None,
    values: Mapping[Any, float],
    cell: object,
    note: str = "",
) -> Criterion:
    """Judge the value at ``cell``; the median and worst of all cells go with it."""
    measured = values.get(cell)
    worst = max(values, key=values.__getitem__, default=None)
    return Criterion(
        name=name,
        bound=bound,
        measured=measured,
        met=None if bound is None or measured is None else measured <= bound,
        cell=str(cell),
        median=statistics.median(values.values()) if values else None,
        worst=None if worst is None else values[worst],
        worst_cell=str(worst),
        cells=len(values),
        cells_met=None if bound is None else sum(value <= bound for value in values.values()),
        note=note,
    )
