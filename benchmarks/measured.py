"""What the results files hold, as the summary and the plots read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import accuracy, linear, operation, training_step

Record = dict[str, Any]
#: The implementations of every cell of a section.
Section = dict[Any, dict[str, Record]]


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


def ratios(
    cells: Section, over: str, under: str, value: Callable[[Record], float]
) -> dict[Any, float]:
    """Return the ratio of two implementations' values in every cell where both were measured.

    Cells where ``under`` has a value of 0 are left out: a small tensor need not grow the process.
    """
    return {
        cell: value(found[over]) / value(found[under])
        for cell, found in cells.items()
        if fits(found, over) and fits(found, under) and value(found[under])
    }


def fits(found: Mapping[str, Record], name: str) -> bool:
    """Return whether an implementation was measured in a cell."""
    return "median" in found.get(name, {})


def median(record: Record) -> float:
    """Return the median time in seconds."""
    return record["median"]


def allocated(record: Record) -> float:
    """Return the peak bytes beyond inputs, by torch's allocator."""
    return record["memory"]["allocated"]


def resident(record: Record) -> float:
    """Return the growth of the process at its peak, in bytes."""
    return record["memory"]["resident"]


def does_not_fit(measured: Measured) -> list[dict[str, str]]:
    """Return implementations that could not run, with the cell and the allocation that failed."""
    return [
        {"implementation": name, "cell": str(cell), "reason": record["does_not_fit"]}
        for cell, found in measured.operation.items()
        for name, record in found.items()
        if "does_not_fit" in record
    ]
