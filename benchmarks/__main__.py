"""``make bench``: what LK losses cost, against KL, against others' code, and against the floor."""

from __future__ import annotations

import gc
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import (
    accuracy,
    linear,
    operation,
    plots,
    step_memory,
    summary,
    training_step,
)
from benchmarks.measured import read

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")

console = Console(highlight=False, soft_wrap=True)


class Section(StrEnum):
    """Parts of the benchmark, each with a results file of its own."""

    OPERATION = "operation"
    LINEAR = "linear"
    STEP = "step"
    MEMORY = "memory"
    ACCURACY = "accuracy"
    SUMMARY = "summary"


def main(
    only: Annotated[
        list[Section] | None, typer.Option(help="Run this section; may be given repeatedly.")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds of timing per implementation and cell, for 3 to 15 repeats; "
            "calls over 5 s are timed once."
        ),
    ] = 1.5,
    fresh: Annotated[
        bool, typer.Option(help="Start over rather than continue with earlier results.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="A few tiny cells, to see that it works; needs --output.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Directory of the results.")] = RESULTS,
) -> None:
    """Measure time, memory and accuracy, and judge the criteria.

    It continues where it was interrupted, unless machine or code have changed.
    """
    output = output.resolve()
    os.chdir(ROOT)
    if quick and output == RESULTS.resolve():
        raise typer.BadParameter("--quick would mix with real results: give --output")
    chosen = only or list(Section)
    begun = time.monotonic()
    # Objects of the imports never become garbage; collecting between calls is to be cheap.
    gc.freeze()
    if Section.ACCURACY in chosen:
        grid = accuracy.QUICK if quick else accuracy.GRID
        accuracy.run(output / "accuracy.json", grid, fresh=fresh, console=console)
    # The longest one last.
    for section, module, file in (
        (Section.MEMORY, step_memory, "step_memory.json"),
        (Section.STEP, training_step, "training_step.json"),
        (Section.LINEAR, linear, "linear.json"),
        (Section.OPERATION, operation, "operation.json"),
    ):
        if section in chosen:
            grid = module.QUICK if quick else module.GRID
            module.run(output / file, grid, budget=budget, fresh=fresh, console=console)
    if Section.SUMMARY in chosen:
        summary.write(output, console)
        plots.draw(read(output), output)
    console.print(f"[bold green]done[/] in {(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
