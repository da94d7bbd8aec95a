"""summary.json and summary.md: the criteria with what was measured, from results files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.criteria import HEADLINE, Criterion, all_criteria
from benchmarks.measure import write_json
from benchmarks.measured import (
    Measured,
    Record,
    allocated,
    does_not_fit,
    fits,
    median,
    read,
    resident,
)
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table


def write(directory: Path, console: Console) -> None:
    """Write summary.json and summary.md of the results in ``directory``, and show the criteria."""
    measured = read(directory)
    criteria = [criterion for criterion in all_criteria(measured) if criterion.cells]
    missing = does_not_fit(measured)
    write_json(
        directory / "summary.json",
        {
            "machine": measured.machine,
            "targets": [asdict(criterion) for criterion in criteria],
            "does_not_fit": missing,
        },
    )
    write_text(directory / "summary.md", _markdown(measured, criteria, missing))
    console.print(_table(criteria))


_HEADERS: Final = ("target", "bound", "measured", "met", "cell", "median", "worst", "cells met")


def _row(criterion: Criterion) -> tuple[str, ...]:
    return (
        criterion.name,
        _number(criterion.bound),
        _number(criterion.measured),
        {True: "yes", False: "no", None: ""}[criterion.met],
        criterion.cell,
        _number(criterion.median),
        _number(criterion.worst),
        "" if criterion.cells_met is None else f"{criterion.cells_met}/{criterion.cells}",
    )


def _table(criteria: list[Criterion]) -> Table:
    """Return a table of the criteria that have a bound; summary.md has all of them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in ("target", "cell") else "right")
    for criterion in criteria:
        if criterion.bound is not None:
            style = {True: "green", False: "red", None: None}[criterion.met]
            table.add_row(*_row(criterion), style=style)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _markdown(measured: Measured, criteria: list[Criterion], missing: list[dict[str, str]]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in measured.machine.items())
    lines = ["# Benchmark", "", f"Written by `make bench`. {facts}.", "", "## Targets", ""]
    lines += _table_lines(
        _HEADERS,
        ((*_row(c)[:6], f"{_number(c.worst)} ({c.worst_cell})", _row(c)[7]) for c in criteria),
    )
    lines += [f"- {c.name}: {c.note}." for c in criteria if c.note]
    if HEADLINE in measured.operation:
        lines += ["", f"## {HEADLINE}", ""]
        found = measured.operation[HEADLINE]
        ours = median(found["ours kl"])
        lines += _table_lines(
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
                    f"{resident(record) / 2**20:.1f}",
                )
                for name, record in found.items()
                if fits(found, name)
            ),
        )
    if measured.operation:
        most: dict[str, Record] = max(measured.operation.values(), key=len)
        names = list(most)
        lines += ["", "## Median times [ms]", ""]
        lines += _table_lines(
            ("N x V_d", *names),
            (
                (str(cell), *(_milliseconds(found, name) for name in names))
                for cell, found in measured.operation.items()
            ),
        )
    lines += [f"- {m['implementation']} at {m['cell']}: {m['reason']}" for m in missing]
    return "\n".join(lines) + "\n"


def _milliseconds(found: Mapping[str, Record], name: str) -> str:
    if fits(found, name):
        return f"{1e3 * median(found[name]):.3g}"
    return "does not fit" if name in found else ""


def _table_lines(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [markdown_table(headers, rows), ""]
