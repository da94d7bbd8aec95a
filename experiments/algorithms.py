"""``make study``: every algorithm of SpecForge with its own loss, with KL and with LK losses.

For one target, SmolLM2-135M-Instruct, and one budget: the same responses, epochs, batch and
learning rate for every draft. Between the runs of one algorithm and seed `training.loss` alone
differs. Everything is kept under ``runs/study``; an interrupted study continues where it was.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.assets import prepare
from experiments.runner import ROOT, RUNS, Training, check_losses, console
from experiments.study import BATCH, STUDY, capture, publish, train_and_evaluate

ALGORITHMS = ("eagle3", "dflash", "dspark", "domino", "peagle")
#: One pass over the samples, in small steps.
EPOCHS = 1
NEW_TOKENS = 32


def main(
    algorithms: Annotated[str, typer.Option(help="Algorithms to train.")] = " ".join(ALGORITHMS),
    losses: Annotated[
        str, typer.Option(help="Losses to train each with, baselines first.")
    ] = "stock kl lk_alpha lk_lambda",
    seeds: Annotated[str, typer.Option(help="Training seeds.")] = "0 1",
    to: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="Also write the report here: a .json, with .md and .png beside it.",
        ),
    ] = None,
) -> None:
    """Train and evaluate every algorithm × loss × seed; about 140 minutes on two cores."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    check_losses(losses.split(), "--losses")
    report = STUDY / "report.json"
    assets = prepare(RUNS)
    captured: set[Path] = set()
    for algorithm in algorithms.split():
        # Losses innermost: those to be compared run at the same time, on the same seed.
        trainings = [
            Training(algorithm, loss, int(seed), STUDY, EPOCHS, BATCH)
            for seed, loss in itertools.product(seeds.split(), losses.split())
        ]
        console.print(f"\n[bold]{algorithm}[/]: {len(trainings)} drafts")
        if trainings[0].features not in captured:
            capture(trainings[0], cores)
            captured.add(trainings[0].features)
        train_and_evaluate(
            trainings,
            assets.target,
            assets.benchmarks,
            report,
            new_tokens=NEW_TOKENS,
            cores=cores,
        )
    console.print(f"[bold green]done[/] in {(time.monotonic() - started) / 60:.0f} minutes")
    if to is not None:
        publish(report, to, ["make", "study"])


if __name__ == "__main__":
    typer.run(main)
