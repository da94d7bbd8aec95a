"""The targets, each with its bound and what was measured: from the results files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import accuracy, linear, operation, training_step
from benchmarks.measure import write_json

#: Where the targets of the operation are judged; worst cells are reported beside it.
HEADLINE: Final = operation.Cell(1024, 32000, "float32", 1.0)
LINEAR_HEADLINE: Final = linear.Cell(8192, 32000)
LOSSES: Final = ("kl", "lk_alpha", "lk_lambda")
ITEM_SIZE: Final = {"float32": 4, "bfloat16": 2}
#: Last-level cache where the machine does not say.
CACHE_BYTES: Final = 32 << 20

Record = dict[str, Any]
#: The implementations of every cell of a section.
Section = dict[Any, dict[str, Record]]


@dataclass(frozen=True)
class Target:
    """One line of the summary.

    Attributes:
        name: what is measured.
        bound: largest value that meets the target; None where there is none to meet.
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


@dataclass(frozen=True)
class Measured:
    """What the results files of a directory hold."""

    machine: Record
    operation: Section = field(default_factory=dict)
    linear: Section = field(default_factory=dict)
    training: Section = field(default_factory=dict)
    accuracy: dict[accuracy.Cell, dict[str, float]] = field(default_factory=dict)


def read(directory: Path) -> Measured:
    """Read the results files that are there."""
    machine: Record = {}

    def section(name: str, cell: Callable[..., Any], values: str) -> dict[Any, Any]:
        path = directory / f"{name}.json"
        if not path.exists():
            return {}
        found = json.loads(path.read_text())
        machine.update(found["machine"])
        return {cell(**entry["cell"]): entry[values] for entry in found["cells"]}

    return Measured(
        machine,
        section("operation", operation.Cell, "implementations"),
        section("linear", linear.Cell, "implementations"),
        section("training_step", training_step.Cell, "implementations"),
        section("accuracy", accuracy.Cell, "errors"),
    )


def write(directory: Path, console: Console) -> None:
    """Write summary.json and summary.md of the results in ``directory``, and show the targets."""
    measured = read(directory)
    targets = [target for target in all_targets(measured) if target.cells]
    missing = does_not_fit(measured)
    write_json(
        directory / "summary.json",
        {
            "machine": measured.machine,
            "targets": [asdict(target) for target in targets],
            "does_not_fit": missing,
        },
    )
    (directory / "summary.md").write_text(_markdown(measured, targets, missing))
    console.print(_table(targets))


# ------------------------------------------------------------------------------- targets


def all_targets(measured: Measured) -> list[Target]:
    """Every target of the benchmark, measured or not."""
    return [
        *_operation_targets(measured),
        *_linear_targets(measured.linear),
        *_training_targets(measured.training),
        *_scaling_targets(measured),
        *_accuracy_targets(measured.accuracy),
    ]


def _operation_targets(measured: Measured) -> Iterable[Target]:
    cells = measured.operation

    def target(
        name: str,
        bound: float | None,
        over: str,
        under: str,
        value: Callable[[Record], float],
        note: str = "",
    ) -> Target:
        return _judged(name, bound, _ratios(cells, over, under, value), HEADLINE, note)

    for loss in ("lk_alpha", "lk_lambda"):
        pair = f"ours {loss}", "ours kl"
        yield target(f"{loss} over kl, time", 1.05, *pair, _median)
        yield target(f"{loss} over kl, memory", 1.02, *pair, allocated)
        yield target(f"{loss} over kl, memory by RSS", 1.02, *pair, _resident)
    ours = "ours lk_lambda"
    inductor = "SpecForge's formula through torch.compile, compilation not counted"
    for other, bound, note in (
        ("specforge kl", 0.8, ""),
        ("specforge kl, inductor", 0.8, inductor),
        ("specforge lk_lambda", 0.2, ""),
        ("specforge lk_lambda, inductor", 0.2, f"KL: {inductor}; acceptance eager"),
        ("speculators lk_hybrid", 0.25, ""),
    ):
        yield target(f"lk_lambda over {other}, time", bound, ours, other, _median, note)
        yield target(f"lk_lambda over {other}, memory", None, ours, other, allocated)
    yield target("lk_lambda over cross-entropy, time", None, ours, "cross-entropy", _median)
    yield target("lk_lambda over floor, time", 2.5, ours, "floor", _median)
    yield target("lk_lambda over floor, time (moonshot)", 1.6, ours, "floor", _median)
    yield target(
        "lk_lambda over floor with a new gradient, time",
        None,
        ours,
        "floor, new gradient",
        _median,
        "the gradient is allocated anew each time, as autograd does it",
    )
    for name, measure in (("allocator", allocated), ("RSS", _resident)):
        values = {
            cell: max(
                (measure(found[f"ours {loss}"]) - found[f"ours {loss}"]["memory"]["gradient"])
                / (cell.tokens * cell.vocabulary * ITEM_SIZE[cell.dtype])
                for loss in LOSSES
            )
            for cell, found in cells.items()
            if all(_fits(found, f"ours {loss}") for loss in LOSSES)
        }
        yield _judged(
            f"memory beyond gradient over one [N, V_d] tensor, {name}",
            0.01,
            values,
            HEADLINE,
        )


def _linear_targets(cells: Section) -> Iterable[Target]:
    def target(
        name: str,
        bound: float | None,
        over: str,
        under: str,
        value: Callable[[Record], float],
        note: str = "",
    ) -> Target:
        values = _ratios(cells, over, under, value)
        return _judged(f"linear_overlap: {name}", bound, values, LINEAR_HEADLINE, note)

    for over, under in (
        ("fused lk_lambda", "fused kl"),
        ("fused lk_lambda", "unfused lk_lambda"),
        ("fused kl", "unfused kl"),
        ("fused with target head lk_lambda", "fused lk_lambda"),
    ):
        yield target(f"{over} over {under}, time", None, over, under, _median)
    for name in ("fused", "fused with target head"):
        for meaning, measure, without in (
            ("in all", allocated, 0),
            ("in all, RSS", _resident, 0),
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


def _training_targets(cells: Section) -> Iterable[Target]:
    for name, bound, over, under in (
        ("lk_alpha over kl", 1.03, "patched lk_alpha", "patched kl"),
        ("lk_lambda over kl", 1.03, "patched lk_lambda", "patched kl"),
        ("kl over unpatched SpecForge's kl", None, "patched kl", "unpatched kl"),
        *(
            (f"{loss} over unpatched SpecForge's {loss}", None, f"patched {loss}", under)
            for loss, under in (
                ("lk_alpha", "unpatched lk_alpha"),
                ("lk_lambda", "unpatched lk_lambda"),
            )
        ),
    ):
        values = _ratios(cells, over, under, _median)
        for cell in values or [None]:
            yield _judged(f"EAGLE-3 training step, {cell}: {name}, time", bound, values, cell)


def _scaling_targets(measured: Measured) -> Iterable[Target]:
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
    """Largest over smallest time per element of the cells that share their ``fixed`` size."""
    groups: dict[int, list[float]] = {}
    for cell, found in cells.items():
        if _fits(found, implementation):
            per_element = _median(found[implementation]) / (cell.tokens * cell.vocabulary)
            groups.setdefault(getattr(cell, fixed), []).append(per_element)
    return {
        f"{implementation}, {fixed} {size}": max(times) / min(times)
        for size, times in groups.items()
        if len(times) > 1
    }


def _accuracy_targets(cells: Mapping[accuracy.Cell, dict[str, float]]) -> Iterable[Target]:
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


def _judged(
    name: str,
    bound: float | None,
    values: Mapping[Any, float],
    cell: object,
    note: str = "",
) -> Target:
    """The target at ``cell``, and the median and worst of all cells."""
    measured = values.get(cell)
    worst = max(values, key=values.__getitem__, default=None)
    return Target(
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


def _ratios(
    cells: Section, over: str, under: str, value: Callable[[Record], float]
) -> dict[Any, float]:
    """Of every cell where both were measured, and ``under`` is large enough to be seen: a small
    tensor need not grow the process."""
    return {
        cell: value(found[over]) / value(found[under])
        for cell, found in cells.items()
        if _fits(found, over) and _fits(found, under) and value(found[under])
    }


def _fits(found: Mapping[str, Record], name: str) -> bool:
    return "median" in found.get(name, {})


def _median(record: Record) -> float:
    return record["median"]


def allocated(record: Record) -> float:
    """Peak bytes beyond inputs, by torch's allocator."""
    return record["memory"]["allocated"]


def _resident(record: Record) -> float:
    return record["memory"]["resident"]


def does_not_fit(measured: Measured) -> list[dict[str, str]]:
    """Implementations that could not run, with the cell and the allocation that failed."""
    return [
        {"implementation": name, "cell": str(cell), "reason": record["does_not_fit"]}
        for cell, found in measured.operation.items()
        for name, record in found.items()
        if "does_not_fit" in record
    ]


# --------------------------------------------------------------------------- presentation


_HEADERS: Final = ("target", "bound", "measured", "met", "cell", "median", "worst", "cells met")


def _row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        _number(target.bound),
        _number(target.measured),
        {True: "yes", False: "no", None: ""}[target.met],
        target.cell,
        _number(target.median),
        _number(target.worst),
        "" if target.cells_met is None else f"{target.cells_met}/{target.cells}",
    )


def _table(targets: list[Target]) -> Table:
    """What has a bound; summary.md has all of it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in ("target", "cell") else "right")
    for target in targets:
        if target.bound is not None:
            style = {True: "green", False: "red", None: None}[target.met]
            table.add_row(*_row(target), style=style)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _markdown(measured: Measured, targets: list[Target], missing: list[dict[str, str]]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in measured.machine.items())
    lines = ["# Benchmark", "", f"Written by `make bench`. {facts}.", "", "## Targets", ""]
    lines += _markdown_table(
        _HEADERS,
        ((*_row(t)[:6], f"{_number(t.worst)} ({t.worst_cell})", _row(t)[7]) for t in targets),
    )
    lines += [f"- {t.name}: {t.note}." for t in targets if t.note]
    if HEADLINE in measured.operation:
        lines += ["", f"## {HEADLINE}", ""]
        found = measured.operation[HEADLINE]
        ours = _median(found["ours kl"])
        lines += _markdown_table(
            (
                *("implementation", "time [ms]", "quartiles", "over our kl"),
                *("peak beyond inputs [MiB]", "by RSS [MiB]"),
            ),
            (
                (
                    name,
                    f"{1e3 * record['median']:.1f}",
                    " to ".join(f"{1e3 * t:.1f}" for t in record["quartiles"]),
                    _number(record["median"] / ours),
                    f"{allocated(record) / 2**20:.1f}",
                    f"{_resident(record) / 2**20:.1f}",
                )
                for name, record in found.items()
                if _fits(found, name)
            ),
        )
    if measured.operation:
        names = list(max(measured.operation.values(), key=len))
        lines += ["", "## Median times [ms]", ""]
        lines += _markdown_table(
            ("N x V_d", *names),
            (
                (str(cell), *(_milliseconds(found, name) for name in names))
                for cell, found in measured.operation.items()
            ),
        )
    lines += [f"- {m['implementation']} at {m['cell']}: {m['reason']}" for m in missing]
    return "\n".join(lines) + "\n"


def _milliseconds(found: Mapping[str, Record], name: str) -> str:
    if _fits(found, name):
        return f"{1e3 * _median(found[name]):.3g}"
    return "does not fit" if name in found else ""


def _markdown_table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    headers = tuple(headers)
    lines = [headers, ("---",) * len(headers), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
