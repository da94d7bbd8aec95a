"""``make gains``: trains what is missing of a part of the study, measures it, and reports.

A row of every draft is kept in the repository as soon as the draft is measured, so that a study
that is longer than a machine lives goes on elsewhere. What is there already, made from the same
inputs, is not made again.
"""

from __future__ import annotations

import os
import shutil
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from specforge.losses import installed_loss_registry

from experiments.assets import prepare
from experiments.gains import report
from experiments.gains.measure import Measurement
from experiments.gains.plan import (
    ARCHITECTURES,
    PARTS,
    SAMPLES,
    SEEDS,
    Run,
    check_objectives,
    features_of,
    runs_of,
)
from experiments.gains.results import PATH, Results
from experiments.runner import (
    ROOT,
    RUNS,
    Device,
    Training,
    capture,
    chosen_device,
    console,
    train,
)

CONVERSATIONS = 109
#: Drafts that are measured at once: the target's passes, most of the time, are made once for all.
#: More would keep a longer stretch of the study from the results file.
MEASURED_AT_ONCE = 8


def main(
    what: Annotated[
        str,
        typer.Argument(
            metavar="|".join((*PARTS, "report")),
            help="A part of the study to go on with, or only the report of what is there.",
        ),
    ],
    architectures: Annotated[str, typer.Option(help="Algorithms to train drafts of.")] = " ".join(
        ARCHITECTURES
    ),
    objectives: Annotated[
        str | None, typer.Option(help="Of the part's; kl is always there, to compare with.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds.")] = " ".join(map(str, SEEDS)),
    steps: Annotated[
        str | None, typer.Option(help="Optimizer steps; of `scratch`, those of both stages.")
    ] = None,
    start_steps: Annotated[
        str | None, typer.Option(help="Steps of the KL drafts to start from; not of `scratch`.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to train on.")] = SAMPLES,
    conversations: Annotated[
        int, typer.Option(min=1, help="Held-out responses of each file to measure along.")
    ] = CONVERSATIONS,
    device: Device = "auto",
    same_code: Annotated[
        bool, typer.Option("--same-code", help="Make anew the rows that other code made.")
    ] = False,
    path: Annotated[
        Path, typer.Option("--results", help="Rows to go on with; .md and .png go beside it.")
    ] = PATH,
) -> None:
    """Measure what a draft of SmolLM2-135M-Instruct gains by what it is trained with."""
    path = path.resolve()
    os.chdir(ROOT)
    started = time.monotonic()
    results = Results.read(path)
    if what == "report":
        _report(results, path)
        return
    if what not in PARTS:
        raise typer.BadParameter(f"{what!r}: name one of {', '.join(PARTS)}, report")
    if start_steps and not PARTS[what].start_steps:
        raise typer.BadParameter(f"{what} starts from scratch", param_hint="--start-steps")
    part = PARTS[what]
    runs = runs_of(
        what,
        _names(architectures, ARCHITECTURES, "--architectures"),
        _names(objectives, (*part.objectives, *part.then), "--objectives") if objectives else None,
        _numbers(seeds, "--seeds") or (),
        _numbers(steps, "--steps"),
        _numbers(start_steps, "--start-steps"),
        samples,
    )
    try:
        check_objectives({run.objective: None for run in runs}, installed_loss_registry())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    used = chosen_device(device)
    measurement = Measurement(prepare(RUNS).target, conversations, used)
    wanted = [
        run for run in runs if not results.has(run, measurement.responses, same_code=same_code)
    ]
    console.print(f"[bold]{what}[/]: {len(runs)} drafts, {len(runs) - len(wanted)} have rows")
    _make(wanted, measurement, path)
    _report(Results.read(path), path)
    console.print(f"[bold green]done[/] in {(time.monotonic() - started) / 60:.0f} minutes")


def _make(wanted: list[Run], measurement: Measurement, path: Path) -> None:
    """Train and measure runs; each has its row before the next ones begin."""
    cores = len(os.sched_getaffinity(0))
    for (features, mapping), config in features_of(wanted).items():
        capture(
            *(config, features, mapping, "training.loss=lk_lambda"),
            threads=cores,
            samples=wanted[0].samples,
            device=measurement.device,
        )
    for _, same in groupby(sorted(wanted, key=_when), _when):
        waiting = list(same)
        # A row may be there of a start whose draft is not: it was made on another machine.
        train(_starts(waiting), cores, measurement.device)
        while waiting:
            together, waiting = waiting[:MEASURED_AT_ONCE], waiting[MEASURED_AT_ONCE:]
            train([run.training for run in together], cores, measurement.device)
            measured = Results()
            measurement.add(measured, together)
            # Read only now: another process may have added rows meanwhile.
            results = Results.read(path)
            results.take(measured)
            results.write(path)
            for run in together:
                _prune(run.training)
                _say(results, run)


def _when(run: Run) -> tuple[int, int, int, int]:
    """Return what orders runs: what starts from a draft right after it, and equal steps together.

    So an interrupted study has whole comparisons.
    """
    place = ARCHITECTURES.index(run.architecture)
    return place, run.start_steps or run.steps, run.start_steps, run.steps


def _starts(runs: list[Run]) -> list[Training]:
    return list(dict.fromkeys(run.start.training for run in runs if run.start))


def _prune(training: Training) -> None:
    """Remove a run's checkpoints, which nothing reads once its draft is exported."""
    for found in training.directory.glob(f"{training.loss}-*"):
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink()


def _say(results: Results, run: Run) -> None:
    row = results.find(run)
    for rule, measured in (row.measured if row else {}).items():
        gain = measured.gain
        over = f", {gain.difference:+.4f} {gain.ci} over kl" if gain else ""
        console.print(f"{run.training.name}, {rule}: τ {measured.tau:.4f}{over}", markup=False)


def _report(results: Results, path: Path) -> None:
    for written in report.write(results, path):
        console.print(f"  {written}")


def _names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = list(dict.fromkeys(text.split()))
    if not names or (unknown := [name for name in names if name not in known]):
        shown = " ".join(unknown) if names else "nothing"
        raise typer.BadParameter(f"{shown}: name some of {', '.join(known)}", param_hint=option)
    return names


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    if not text.split() or not all(word.isdigit() for word in text.split()):
        raise typer.BadParameter(f"{text!r}: give numbers, such as 96 384", param_hint=option)
    return list(dict.fromkeys(map(int, text.split())))


if __name__ == "__main__":
    typer.run(main)
