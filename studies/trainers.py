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

from demo.__main__ import HELD_OUT, RESPONSES, SAMPLES
from demo.assets import prepare
from demo.training import ROOT, RUNS, Training, check_losses, console, execute, record, train
from specforge_lk.report import read_report, write_all

STUDY = RUNS / "study"
ALGORITHMS = ("eagle3", "dflash", "dspark", "domino", "peagle")
HEADS = 4
#: One pass over the samples, in small steps.
EPOCHS = 1
BATCH = 2
PROMPTS = 16
NEW_TOKENS = 32
#: Held-out responses to measure exactly; the draws of the bootstrap are whole conversations.
CONVERSATIONS = 64


def main(
    algorithms: Annotated[str, typer.Option(help="Algorithms to train.")] = " ".join(ALGORITHMS),
    losses: Annotated[
        str, typer.Option(help="Losses to train each with, baselines first.")
    ] = "stock kl lk_alpha lk_lambda",
    seeds: Annotated[str, typer.Option(help="Training seeds.")] = "0 1",
    publish: Annotated[
        Path | None,
        typer.Option(help="Also write the report here: a .json, with .md and .png beside it."),
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
    everything = []
    for algorithm in algorithms.split():
        # Losses innermost: those to be compared run at the same time, on the same seed.
        trainings = [
            Training(algorithm, loss, int(seed), STUDY, EPOCHS, BATCH)
            for seed, loss in itertools.product(seeds.split(), losses.split())
        ]
        console.print(f"\n[bold]{algorithm}[/]: {len(trainings)} drafts")
        if trainings[0].features not in captured:
            _capture(trainings[0], cores)
            captured.add(trainings[0].features)
        train(trainings, cores)
        execute(
            *("specforge-lk", "eval", "--target", assets.target, "--out", report),
            *(f"--draft={run.loss}@{run.seed}={run.draft}" for run in trainings),
            *(f"--benchmark={name}={path}" for name, path in assets.benchmarks.items()),
            *("--held-out", HELD_OUT, "--held-out-limit", CONVERSATIONS),
            *("--temperature", 0, "--temperature", 1, "--heads", HEADS, "--limit", PROMPTS),
            *("--max-new-tokens", NEW_TOKENS, "--max-length", 512),
            threads=cores,
        )
        everything += trainings
        record(report, everything)
    console.print(f"[bold green]done[/] in {(time.monotonic() - started) / 60:.0f} minutes")
    if publish is not None:
        _publish(report, publish)


def _capture(first: Training, cores: int) -> None:
    """Capture features; with a loss set, for DFlash and Domino then need the target's states."""
    mapping = ["--vocab-mapping", first.vocab_mapping] if first.vocab_mapping else []
    execute(
        *("specforge-lk", "capture", "--config", first.config_path, "--responses", RESPONSES),
        *("--limit", SAMPLES, "--out", first.features, *mapping, "training.loss=lk_lambda"),
        threads=cores,
    )


def _publish(report: Path, path: Path) -> None:
    """Write the report, its tables and its chart at ``path``, without the arrays."""
    content = read_report(report)
    # Every algorithm was evaluated by a command of its own: this one makes them all.
    content.command = ["make", "study"]
    for written in write_all(content, path):
        console.print(f"  {written}")


if __name__ == "__main__":
    typer.run(main)
